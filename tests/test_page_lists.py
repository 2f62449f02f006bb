"""Long lists: what of them is in the document, and how they are scrolled, refreshed, searched and printed."""

from __future__ import annotations

import base64
import re

import pytest
from page_support import many

ROWS = "#requests tr[data-id]"
IN_VIEW = """
const box = document.querySelector(arguments[0]).getBoundingClientRect();
const [top, bottom] = [Math.max(0, box.top) + 30, Math.min(innerHeight, box.bottom) - 2];
const x = box.left + 40;
return [top, (top + bottom) / 2, bottom].map((y) => document.elementFromPoint(x, y)?.closest('tr, li')?.innerText);"""


@pytest.fixture
def big(site, between):
    """Stand before the site with thousands of everything; what is put into the dict changes how many."""
    sizes = {"accounts": 300, "models": 5, "keys": 5, "requests": 5000}

    def rows(body):
        if not body["requests"]:
            return
        row, last = body["requests"][0], sizes["requests"]
        body["requests"] = [{**row, "id": n, "ts_epoch": site.now - last + n} for n in range(last, last - 5000, -1)]
        body["total"] = last

    def summary(body):
        for part, name in (("accounts", "account"), ("models", "model"), ("keys", "key")):
            row = {**body[part][0], "name": None}
            names = (f"n{n}@example.com" if part == "accounts" else f"name-{n} #{n:06x}" for n in range(sizes[part]))
            body[part] = [{**row, name: called, "total_tokens": 1000 + n} for n, called in enumerate(names)]

    between.changes.update({"/api/requests": rows, "/api/summary": summary})
    between.sizes = sizes
    return between


def nodes(page):
    return page.js("document.querySelectorAll('*').length")


def scroll(page, css, part):
    """Scroll a list to a part of its height, in its box or with the page, and return what is then seen of it."""
    page.run_async("""
      const [css, part, done] = arguments;
      const box = document.querySelector(css);
      const within = box.scrollHeight > box.clientHeight + 1;
      const e = within ? box : document.scrollingElement;
      e.scrollTop = part * box.scrollHeight + (within ? 0 : scrollY + box.getBoundingClientRect().top);
      requestAnimationFrame(() => requestAnimationFrame(done));""", css, part)
    return page.script(IN_VIEW, css)


@pytest.mark.parametrize("sizes, tab", [
    ({}, "models"), ({"accounts": 5000}, "models"), ({"models": 10_000}, "models"), ({"keys": 300}, "keys"),
])  # fmt: skip
@pytest.mark.parametrize("width", [1440, 390])
def test_of_thousands_of_rows_those_in_view_are_in_the_document(page, big, sizes, tab, width):
    big.sizes.update(sizes)
    page.resize(width, 900)
    page.open(server=big)
    page.click(f"#tab-{tab}")
    page.wait_for(ROWS, "e.dataset.id === '5000'")
    if width == 390:  # it begins with few of them
        page.click("#all-accounts")
    assert nodes(page) < 15_000
    assert page.one("#requests", "e.getAttribute('aria-rowcount')") == "5001"
    accounts = page.one("#accounts", "e.getAttribute('aria-rowcount')")
    assert int(accounts) == big.sizes["accounts"] + 1 + 4  # of which only the quota is known
    for css in ("#scroll", "#accounts-scroll", *(["#panel"] if sizes.get("models") and width > 720 else [])):
        page.script("document.querySelector(arguments[0]).scrollIntoView()", css)
        seen = [text for part in (0.1, 0.5, 0.9) for text in scroll(page, css, part)]
        assert all(seen) and len(set(seen)) > 3, (css, seen)
    assert nodes(page) < 15_000


@pytest.mark.parametrize("width", [1440, 390])
def test_long_list_stays_to_the_pixel_with_what_is_open_and_focused(page, big, width):
    page.resize(width, 900)
    page.open(server=big)
    page.wait_for(ROWS, "e.dataset.id === '5000'")
    scroll(page, "#scroll", 0.5)
    page.script("""
      const rows = [...document.querySelectorAll('#requests tr[data-id]')];
      const box = document.querySelector('#scroll').getBoundingClientRect();
      const [first, , , second] = rows.filter((row) => row.getBoundingClientRect().top > Math.max(0, box.top) + 50);
      first.querySelector('button').click();
      second.querySelector('button').focus({preventScroll: true});
      window.first = first.dataset.id;
      window.second = second;
      window.lost = 0;
      second.addEventListener('focusout', () => { window.lost += 1; });""")
    within = " - document.querySelector('#scroll').getBoundingClientRect().top" if width == 1440 else ""
    where = f"window.second.getBoundingClientRect().top{within}"
    before = page.js(where)
    big.sizes["requests"] += 1
    page.click("#refresh") if width == 1440 else page.script("document.querySelector('#refresh').click()")
    page.wait_for("#requests", "e.getAttribute('aria-rowcount') === '5002'")
    if width == 1440:  # there a click takes the focus
        page.script("window.second.querySelector('button').focus({preventScroll: true}); window.lost = 0")
    assert page.js(where) == pytest.approx(before, abs=1)
    number = page.js("[window.second.getAttribute('aria-rowindex'), window.second.dataset.id]")
    assert int(number[0]) + int(number[1]) == 5001 + 2
    for part in (0.9, 0.01):
        scroll(page, "#scroll", part)
        assert page.js("window.second.contains(document.activeElement) && window.lost === 0")
        assert not page.js("document.querySelector('#requests .detail')")
    page.script("document.activeElement.scrollIntoView({block: 'center'})")
    page.wait_for(f"{ROWS}.open", "e.dataset.id === window.first && e.nextSibling.className === 'detail'")
    page.script("document.activeElement.blur()")
    scroll(page, "#scroll", 0)
    page.script("""
      window.moved = [];
      const note = (list) => list.forEach((m) => window.moved.push(...m.addedNodes));
      for (const body of document.querySelectorAll('tbody[id]')) {
        for (const row of body.rows) row.kept = true;
        new MutationObserver(note).observe(body, {childList: true});
      }""")
    big.sizes["requests"] += 1
    page.script("document.querySelector('#refresh').click()")
    page.wait_for("#requests", "e.getAttribute('aria-rowcount') === '5003'")
    assert page.js("window.moved.filter((row) => row.dataset.id === '5002').length") == 1
    assert page.js("window.moved.filter((row) => row.kept).length") == 0
    assert sum(page.all(ROWS, "e.kept ? 1 : 0")) > 10


def test_find_dialog_opens_on_a_long_list_filters_and_searches_requests(page, big):
    big.changes["/api/summary"] = lambda body: body["choices"].update(
        account=[{"value": f"n{n}@example.com", "name": None, "requests": 1} for n in range(300)])  # fmt: skip
    page.open(server=big)
    page.wait_for(ROWS, "e.dataset.id === '5000'")
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'f', ctrlKey: true, cancelable: true}))"
    page.script("document.querySelector('#theme').focus()")
    assert page.js(press) is False  # the browser's own would find what is in view alone
    assert len(page.all("#hits button")) == 50
    page.press("Escape")
    assert page.js("document.activeElement.id") == "theme" and not page.js("document.querySelector('#find').open")
    page.js(press)
    page.press("n17")
    told = page.all("#hits button")
    assert told[0] == "Account: n17@example.com" and told[-1] == "Search requests for “n17”"
    page.press("Enter")
    page.wait_until("decodeURIComponent(location.search).includes('account=n17@example.com')")
    page.script("history.back()")
    page.wait_for(ROWS, "e.dataset.id === '5000'")
    page.js(press)
    page.press("503")
    page.click("#hits li:last-child button")
    page.wait_for_text("#searched", "Search: 503 ×")
    page.click("#searched")
    page.wait_until("!location.search.includes('q=')")
    assert page.js("document.activeElement.id") == "search"


def test_ctrl_f_is_the_browser_s_own_where_all_rows_are_in_the_document(page, site):
    page.open()
    assert page.js("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'f', ctrlKey: true, cancelable: true}))")


def test_printed_page_tells_when_and_what_part_of_the_list_it_is_on_three_pages(page, empty):
    many(empty, 150)
    page.open("?range=7d")
    page.wait_for_rows(100)
    edge = {f"margin{side}": 0.315 for side in ("Top", "Bottom", "Left", "Right")}
    paper = page.cdp("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, **edge)["data"]
    assert len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(paper))) <= 3
    page.emulate(print=True)
    page.wait_for("#paper", "e.offsetHeight && /^Printed .*20\\d\\d.*Last 7 days$/.test(e.textContent)")
    assert page.text("#end") == "first 100 of 150"


def test_printed_list_has_its_first_500_rows(page, big):
    page.open(server=big)
    page.wait_for(ROWS, "e.dataset.id === '5000'")
    page.emulate(print=True)
    page.wait_for_rows(500)
    assert page.text("#end") == "first 500 of 5,000"
    page.emulate(print=False)
    page.wait_until(f"document.querySelectorAll('{ROWS}').length < 200")
