"""The list of requests, what is copied of the tables, and what a refresh leaves alone."""

from __future__ import annotations

import csv
import io
import threading

import pytest
from page_support import HOUR, many
from support import event, put

import usage_dashboard as app

ROWS = "#requests tr[data-id]"


def scroll_to_the_end(page):
    page.script("const s = document.querySelector('#scroll'); s.scrollTop = s.scrollHeight")


def column(page, by):
    return page.all(f"#requests td[data-by={by}]")


def test_requests_list_what_failed_and_why(page, site):
    page.open()
    page.wait_for_rows(3)
    assert "429 usage_limit_reached" in page.text("#requests")
    assert page.one("#requests td.bad", "e.title") == "429 usage_limit_reached: The usage limit"
    page.click("#failed-only")
    page.wait_for_rows(1)
    page.wait_for_requests(1)
    assert "status=failed" in page.js("location.search")


@pytest.mark.parametrize("width, label, told", [
    (width, *one) for width in (1440, 390)
    for one in (("account", "account=b%40example.com"), ("model", "model=gpt-5.5"), ("api_key", "key=4bdca8"))
])  # fmt: skip
def test_row_opens_and_names_in_it_filter_which_stand_in_the_details_on_a_phone(page, site, width, label, told):
    page.resize(width, 900)
    page.open()
    page.wait_for_rows(3)
    row = f"{ROWS}:nth-child(2)"
    if label == "api_key" or width == 390:
        page.click(f"{row} [data-by={'total' if label == 'api_key' else label}]")
        page.wait_for_text("#requests .detail", "Exact time")
        assert page.js("location.search") == "?range=24h"
        row = "#requests .detail"
    names = page.all(f"{row} .pick")
    name = next(n for n in names if n == {"account": "b@example.com", "model": "gpt-5.5"}.get(label, n))
    nth = len(names) - 1 if label == "api_key" else names.index(name)
    assert page.all(f"{row} .pick", "e.offsetHeight")[nth] >= (40 if width == 390 else 16)
    page.script("document.querySelectorAll(arguments[0])[arguments[1]].id = 'found'", f"{row} .pick", nth)
    page.click("#found")
    page.wait_until(f"location.search.includes('{told}')")


def test_older_rows_load_as_one_scrolls_and_are_asked_for_again_where_that_failed(page, empty, between):
    many(empty, 350)
    held, waiting = threading.Event(), threading.Event()

    def hold(handler):
        if "before=" in handler.path and not held.is_set():
            waiting.set()
            held.wait(20)
            return handler.refuse(500, "internal_error")
        answer, body = empty.ask(handler.path)
        handler.reply(answer.status, body)

    between.faults["/api/requests"] = hold
    page.open(server=between)
    page.wait_for_rows(100)
    scroll_to_the_end(page)
    assert waiting.wait(10)
    put(empty.store, event(at=empty.now - 5, request_id="new"))
    empty.now += 1  # another answer than before
    page.click("#refresh")
    page.wait_for_rows(101)
    page.faults_expected = True
    held.set()
    page.wait_for("#stale", "!e.hidden")
    page.click("#refresh")
    for count in (201, 301, 351):
        page.wait_until(f"document.querySelectorAll('{ROWS}').length >= {count}")
        scroll_to_the_end(page)
    page.wait_for_text("#end", "That is all")
    assert len(set(page.all(ROWS, "e.dataset.id"))) == 351


def test_rows_are_sorted_by_a_click_on_the_head_both_ways(page, empty):
    many(empty, 30)
    page.open()
    page.wait_for_rows(30)
    page.click("#requests-head [data-sort=total]")
    page.wait_for(ROWS, "e.textContent.includes('1,049')")
    down = [int(text.replace(",", "")) for text in column(page, "total")]
    assert down == sorted(down, reverse=True) and len(set(down)) == 30
    assert page.js("document.activeElement.dataset.sort") == "total"
    page.click("#requests-head [data-sort=total]")
    page.wait_for(ROWS, "e.textContent.includes('1,020')")
    assert [int(text.replace(",", "")) for text in column(page, "total")] == down[::-1]
    assert all(24 <= height <= 28 for height in page.all(ROWS, "e.offsetHeight"))


def test_select_in_place_of_the_head_sorts_on_a_phone_in_step_with_it(page, empty):
    many(empty, 3)
    put(empty.store, event(at=empty.now - 99, source="b@example.com", auth_index="b", total_tokens=1))
    page.open()
    page.wait_for_rows(4)
    assert page.one("#requests-sort", "e.offsetHeight") == 0
    page.click("#requests-head [data-sort=latency]")
    page.resize(390, 844)
    for table, shown in (("requests", "Slowest first"), ("accounts", None)):
        told = page.one(f"#{table}-sort", "[e.offsetHeight >= 40, e.selectedOptions[0].textContent]")
        assert told[0] and told[1] == (shown or told[1]) and page.one(f"#{table}-head", "e.offsetHeight") == 0
    page.select("#requests-sort", "total up")
    page.wait_for(ROWS, "e.innerText.split('\\n').includes('1 token')")
    page.select("#accounts-sort", "name down")
    page.wait_for("#accounts-body tr", "e.innerText.includes('b@example.com')")
    page.resize(1440, 900)
    assert page.one("#requests-head [aria-sort=ascending] button", "e.dataset.sort") == "total"
    assert page.one("#accounts-head [aria-sort=descending] button", "e.dataset.sort") == "name"


def test_list_is_sorted_over_the_whole_range_and_says_how_many_there_are(page, empty, between):
    many(empty, 150)
    slow = {"latency_ms": 77_000, "request_id": "slow", "total_tokens": 5}
    put(empty.store, event(at=empty.now - 3 * 3600, **slow))
    page.open(server=between)
    page.wait_for_text("#requests-note", "151 requests, newest first")
    assert "sort=" not in "".join(between.asked)
    page.click("#requests-head [data-sort=latency]")
    page.wait_for_text("#requests-note", "151 requests, slowest first")
    page.wait_for(ROWS, "e.textContent.includes('1m 17s')")  # the oldest of all
    page.click("#requests-head [data-sort=total]")
    page.click("#requests-head [data-sort=total]")
    page.wait_for("#requests td[data-by=total]", "e.textContent === '5'")
    scroll_to_the_end(page)
    page.wait_for_rows(151)
    assert page.text("#requests-note") == "151 requests, fewest tokens first"
    # What the server does not sort, nobody can sort, so that no order is one of the loaded rows alone.
    assert page.all("#requests-head button", "e.dataset.sort") == ["time", "total", "ttft", "latency"]


def test_range_is_downloaded_under_its_filters_but_not_from_a_masked_page(page, site):
    page.open("?range=24h&account=b%40example.com&status=failed")
    page.wait_for_rows(1)
    for name in ("csv", "jsonl"):
        link, plain = page.one(f"#export-{name}", "[e.getAttribute('href'), e.hasAttribute('download')]")
        assert link.startswith("api/export?range=24h&account=b%40example.com&status=failed") and plain
        assert f"format={name}" in link and "tz_offset=0" in link
    page.click("#privacy")
    page.wait_for("#export-csv", "e.hidden && !e.hasAttribute('href')")


def test_list_says_how_long_single_requests_are_kept_whichever_answer_comes_last(page, site, between):
    put(site.store, *[event(at=site.now - days * 24 * HOUR, request_id=f"d{days}") for days in (4, 5)])
    site.store.delete_some(site.now - 2 * 24 * HOUR)
    listed, kept = threading.Event(), "Single requests are kept for 2 days; older ones are in the sums only."
    between.changes["/api/health"] = lambda body: [listed.wait(5), body["database"].update(retention_days=2)]
    page.open("?range=7d", server=between)
    page.wait_for_text("#end", "That is all in this range.")
    listed.set()
    page.wait_for_text("#end", f"That is all in this range. {kept}")
    assert sum(path.startswith("/api/requests") for path in between.asked) == 1  # not with the next refresh
    assert page.figure("requests") == 5 and page.text("#requests-note").startswith("3 requests")
    start = int(site.now - 6 * 24 * HOUR)
    page.open(f"?range=7d&start={start}&end={start + 2 * 24 * int(HOUR)}", server=between)
    page.wait_for_text("#requests-note", kept)
    assert page.figure("requests") == 2


def test_row_opens_to_all_that_is_known_of_the_request(page, empty):
    put(empty.store, event(at=empty.now - 60, latency_ms=5_000, ttft_ms=1_000, output_tokens=200, alias="an-alias",
                          failed=1, status_code=503, error="503 server_error: overloaded", service_tier="priority"))
    page.open()
    page.wait_for_rows(1)
    page.script(f"document.querySelector('{ROWS} button').focus()")
    page.press("Enter")
    page.wait_for("#requests .detail", "true")
    facts = dict(page.all(".detail dl > div", "[e.firstChild.textContent, e.lastChild.textContent]"))
    expected = {
        "Alias": "an-alias", "Endpoint": "POST /v1/responses", "Effort": "high", "Tier": "priority",
        "First token": "1.0s", "Latency": "5.0s", "Reason": "503 server_error: overloaded", "Status code": "503",
        "Written to cache": "—", "List price": "$0.00307",
        "Output speed": "50 tokens/s",  # 200 tokens in the four seconds after the first
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    page.press("Escape")
    page.wait_until("!document.querySelector('#requests .detail')")
    page.click(f"{ROWS} .r-total")
    page.wait_for("#requests .detail", "true")
    page.press("Escape")
    page.wait_until("document.activeElement.closest('#requests tr') && !document.querySelector('#requests .detail')")


def test_view_is_copied_as_csv_and_masked_with_the_page(page, site):
    put(site.store, event(at=site.now - 90, model='=cmd,"x"'))
    page.cdp("Browser.setPermission", permission={"name": "clipboard-read"}, setting="granted")
    page.open()
    page.wait_for_rows(4)

    def copied(button):
        page.click(button)
        page.wait_for_text("#live", "copied")
        page.script("document.querySelector('#live').textContent = ''")
        head, *rows = csv.reader(io.StringIO(page.js("navigator.clipboard.readText()")))
        return [dict(zip(head, row)) for row in rows]

    rows = copied("#copy-csv")
    newest = rows[0]
    assert len(rows) == 4 and list(newest)[:4] == ["Time", "Account", "Model", "Tokens"]
    assert newest["Model"] == '\'=cmd,"x"' and newest["Tokens"] == "120" and newest["Status"] == "OK"
    assert {"First token (ms)", "Latency (ms)", "Request id"} <= set(newest)
    assert app.parse_time(newest["Time"])[0] == pytest.approx(site.now - 90, abs=0.01)
    an = next(row for row in copied("#copy-accounts") if row["Account"] == "an@example.com")
    expected = {"5h Remaining": "62", "7d Remaining": "5", "Plan": "plus", "Status": "Active", "Cached": "88080",
                "Tokens Left 7d (estimate)": ""}  # fmt: skip
    assert {name: an[name] for name in expected} == expected and 59 <= int(an["Updated (s)"]) <= 120
    resets = [app.parse_time(an[f"Reset Time {label}"])[0] - site.now for label in ("5h", "7d")]
    assert resets == pytest.approx([2 * HOUR, 96 * HOUR], abs=2)
    page.click("#privacy")
    for button in ("#copy-csv", "#copy-accounts"):
        assert "@example.com" not in str(copied(button))


def test_refresh_keeps_rows_scroll_selection_and_open_details(page, empty):
    many(empty, 120)
    page.open()
    page.wait_until(f"document.querySelectorAll('{ROWS}').length >= 100")
    page.script("""
      const rows = [...document.querySelectorAll('#requests tr[data-id]')];
      rows.forEach((row) => { row.kept = true; });
      rows[40].querySelector('button').click();
      document.querySelector('#scroll').scrollTop = 700;
      getSelection().selectAllChildren(rows[42].querySelector('[data-by=model]'));""")
    put(empty.store, event(at=empty.now - 5, request_id="new"))
    empty.now += 1  # another answer than before
    page.click("#refresh")
    page.wait_for_requests(121)
    page.wait_for(ROWS, "e.kept === undefined")
    assert sum(page.all(ROWS, "e.kept ? 1 : 0")) >= 100
    assert page.js("String(getSelection())") == "gpt-5.4"
    assert page.all(ROWS, "e.nextSibling?.className")[41] == "detail"
    assert page.one("#scroll", "e.scrollTop") >= 700
