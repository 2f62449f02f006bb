"""Look for faults of accessibility with axe-core: both themes and languages, three widths, every state of the page.

python3 tests/tools/axe.py path/to/axe.min.js [STATE …]

axe.min.js is no part of the dashboard; `npm install axe-core` in a folder elsewhere brings it. It makes its own
dashboards, prints each violation once with the views that have it, and ends with 1 where there is one.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from page_stages import STAGES, Stages  # noqa: E402
from webdriver import Browser  # noqa: E402

WIDTHS = (1440, 768, 390)
LOOK = """
const [source, done] = arguments;
if (!window.axe) new Function(source)();
window.axe.run(document, {resultTypes: ['violations']}).then(
  ({violations}) => done(violations.flatMap((v) => v.nodes.map((n) =>
    [`${v.id}: ${v.help}`, n.target.join(' '), n.failureSummary.split('\\n').slice(1).join(' ').trim()]))),
  (fault) => done([['axe', '', String(fault)]]));
"""


def main(arguments: list[str]) -> int:
    axe, chosen = Path(arguments[0]).read_text(encoding="utf-8"), arguments[1:] or STAGES
    found: dict[tuple[str, str, str], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder, Browser() as browser, Stages(browser, Path(folder)) as stages:
        browser.emulate(reduced_motion=True)
        for stage in chosen:
            browser.resize(1440, 1000)
            page = stages.show(stage)
            for lang, dark, width in itertools.product(("en", "vi"), (False, True), WIDTHS):
                page.speak(lang)
                browser.emulate(dark=dark)
                page.wait_for("html", f"e.dataset.theme === '{'dark' if dark else 'light'}'")
                browser.resize(width, 1000)
                page.wait_until(f"innerWidth === {width}")
                view = f"{stage}, {lang}, {'dark' if dark else 'light'}, {width}"
                for fault in page.run_async(LOOK, axe):
                    found.setdefault(tuple(fault), []).append(view)
    for (what, where, why), views in sorted(found.items()):
        print(f"{what}\n  {where}: {why}\n  in {len(views)} views: {'; '.join(views[:3])}")
    print(f"{len(found)} violations in {12 * len(chosen)} views")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
