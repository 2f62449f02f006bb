"""Look for faults of accessibility with axe-core, in both themes and languages, wide and narrow.

python3 tests/tools/axe.py path/to/axe.min.js http://127.0.0.1:8320/?range=7d

axe.min.js is no part of the dashboard; `npm install axe-core` in a folder elsewhere brings it. The address is that of
a running dashboard, such as the demo. It prints each violation, and ends with 1 where there is one.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from webdriver import Browser  # noqa: E402

WIDTHS = (1440, 390)
READY = "document.body && !document.body.classList.contains('booting') && document.querySelectorAll('#requests tbody tr').length > 0"
LOOK = """
const [source, done] = arguments;
if (!window.axe) new Function(source)();
window.axe.run(document, {resultTypes: ['violations', 'incomplete']}).then(
  ({violations}) => done(violations.map((v) => ({id: v.id, help: v.help, nodes: v.nodes.map((n) => `${n.target.join(' ')}: ${n.failureSummary}`)}))),
  (fault) => done([{id: 'axe', help: String(fault), nodes: []}]));
"""


def violations(browser: Browser, address: str, axe: str, width: int, lang: str, dark: bool) -> list[dict[str, Any]]:
    """Open a view with a request unfolded and one kind of token isolated, and return what axe finds there."""
    browser.resize(width, 1000)
    browser.emulate(dark=dark, reduced_motion=True)
    browser.goto(address)
    browser.script("localStorage.clear(); localStorage.setItem('lang', arguments[0])", lang)
    browser.goto(address)
    browser.wait_until(READY)
    browser.script(
        "for (const css of ['#requests tbody button', '#legend button']) document.querySelector(css).click()"
    )
    browser.wait_until("document.querySelector('#requests .detail')")
    return browser.run_async(LOOK, axe)


def main(arguments: list[str]) -> int:
    path, address = arguments
    axe, found = Path(path).read_text(encoding="utf-8"), 0
    with Browser() as browser:
        for view in itertools.product(WIDTHS, ("en", "vi"), (False, True)):
            faults = violations(browser, address, axe, *view)
            found += len(faults)
            print(*view, "no violation" if not faults else "")
            for fault in faults:
                print(f"  {fault['id']}: {fault['help']}", *fault["nodes"], sep="\n    ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
