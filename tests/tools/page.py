"""Measure the page with pools larger than anybody's: nodes, frames while it is scrolled, language, first figures.

python3 tests/tools/page.py [CASE …]

It makes its own dashboards and prints one line for each case, with `!` behind what is beyond its limit; it ends with 1
where there is one. A frame takes 16.7 ms at least. Nothing else should run beside it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from page_stages import crowd, site_of  # noqa: E402
from page_support import Page  # noqa: E402
from support import Site  # noqa: E402
from webdriver import Browser  # noqa: E402

# What is stored, and how many requests are loaded into the list.
CASES: dict[str, tuple[dict[str, int], int]] = {
    "300 accounts": ({"accounts": 300, "requests": 1000}, 0),
    "300 accounts, 5000 rows": ({"accounts": 300, "requests": 5000}, 5000),
    "5000 accounts": ({"accounts": 5000}, 0),
    "10000 models": ({"accounts": 8, "models": 10000}, 0),
    "300 keys": ({"accounts": 8, "keys": 300}, 0),
}
LIMITS = {"nodes": 15_000, "frame_ms": 20, "language_ms": 200, "first_ms": 300}
# Notes when the first figure stands there.
FIRST = """
const look = () => {
  if (document.querySelector('#kpi-requests')?.title) window.firstAt = performance.now();
  else requestAnimationFrame(look);
};
look();
"""
LOAD = """
const [rows, done] = arguments;
const boxes = () => [document.scrollingElement, ...document.querySelectorAll('.scroll')];
const asked = () => performance.getEntriesByType('resource').filter((e) => e.name.includes('/api/requests')).length;
const until = performance.now() + 60000;
const on = () => {
  for (const box of boxes()) box.scrollTop = box.scrollHeight;
  if (asked() * 100 >= rows || performance.now() > until) done(asked() * 100);
  else setTimeout(on, 20);
};
on();
"""
SCROLL = """
const [done] = arguments, frames = [];
const scrolled = [document.scrollingElement, ...document.querySelectorAll('.scroll')]
  .filter((box) => box.scrollHeight > box.clientHeight + 50);
for (const box of scrolled) box.scrollTop = box.scrollHeight > 50000 ? box.scrollHeight / 2 : 0;
let last = 0, at = 0;
const step = (now) => {
  if (last) frames.push(now - last);
  last = now;
  if (frames.length >= 80 * scrolled.length) return done(frames.sort((a, b) => a - b)[Math.floor(frames.length * .95)]);
  const box = scrolled[Math.floor(at / 80)];
  box?.scrollBy({top: 150, behavior: 'instant'});
  at += 1;
  requestAnimationFrame(step);
};
requestAnimationFrame(step);
"""
# Once what the scrolling made it load is there, until the next picture is drawn.
SPEAK = """
const [done] = arguments;
setTimeout(() => {
  const from = performance.now();
  document.querySelector('#lang-vi').click();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - from)));
}, 1000);
"""


def measure(browser: Browser, site: Site, rows: int) -> dict[str, Any]:
    """Return what was measured on the page of a site, with so many requests loaded."""
    page = Page(browser, site)
    with browser.before_load(FIRST):
        page.open("?range=7d")
        page.open("?range=7d", fresh=False)  # as somebody who was here
    found = {"first_ms": page.js("window.firstAt")}
    if rows:
        found["rows"] = page.run_async(LOAD, rows)
    found["frame_ms"] = page.run_async(SCROLL)
    found["nodes"] = page.js("document.querySelectorAll('*').length")
    found["language_ms"] = page.run_async(SPEAK)
    return found


def main(arguments: list[str]) -> int:
    beyond = 0
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        for number, case in enumerate(arguments or CASES):
            stored, rows = CASES[case]
            site = site_of(Path(folder, str(number)))
            try:
                crowd(site, **stored)
                found = measure(browser, site, rows)
                browser.goto("about:blank")
            finally:
                site.close()
            limits = {**LIMITS, "first_ms": LIMITS["first_ms"] if "300" in case else 5000}
            late = [name for name, most in limits.items() if found[name] > most]
            beyond += len(late)
            print(f"{case}:", *[f"{name} {value:,.0f}{'!' * (name in late)}" for name, value in found.items()])
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
