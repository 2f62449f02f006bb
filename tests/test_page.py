"""The page as a whole: its words, its own rules, what it shows of each state, filters, and who looks at it."""

from __future__ import annotations

import gzip
import json
import re
import socket

import pytest
from page_support import HOUR, LANGS, PAGE, WORDS, many, save_quota, set_state, tokens
from support import event, free_port, put
from webdriver import Browser

import usage_dashboard as app

SCRIPT = re.search(r'<script type="module">(.*?)</script>', PAGE, re.S).group(1)
MARKUP = re.sub(r"<(script|style)\b.*?</\1>|<!--.*?-->", "", PAGE[PAGE.index("<body") :], flags=re.S)

# ---- the file ---------------------------------------------------------------------------------------------------


def test_every_word_is_there_in_both_languages_with_the_same_places():
    block = re.search(r'id="i18n">\n(.*?)\n *</script>', PAGE, re.S).group(1)
    assert len(WORDS) == block.count("\n") + 1 > 200  # no key twice
    for key, texts in WORDS.items():
        assert len(texts) == 2 and all(text.strip() for text in texts), key
        places = [sorted(set(re.findall(r"{\w+}", text))) for text in texts]
        assert places[0] == places[1] or texts[0] == "{message}", key  # the program tells it in English
        # what is a loan word in Vietnamese, and "khóa" is left for what is locked
        assert not re.search(r"(?i)mô hình|đặt lại|nút home|khóa (api|quản lý|client)|\bchép\b(?<!sao chép)", texts[1]), key


def test_every_word_is_used_and_every_used_word_is_there():
    plain = set(re.findall(r"\b(?:t|plural)\('([\w.]+)'", SCRIPT))
    plain |= set(re.findall(r'data-(?:t|label)="([\w.]+)"', MARKUP))
    assert plain <= set(WORDS) and len(plain) > 80
    quoted = set(re.findall(r"['`]([\w.]+)['`]", SCRIPT))
    made = set(re.findall(r"`([a-z]+(?:\.[a-z]+)*)\.\$\{", SCRIPT)) | set(re.findall(r"worded\('([\w.]+)'", SCRIPT))
    for key in WORDS:
        assert key in plain | quoted or key.rpartition(".")[0] in made, key


def test_page_has_no_text_outside_the_dictionary():
    assert re.sub(r"<[^>]*>", "", MARKUP).split() == []


def test_page_keeps_its_own_rules():
    for forbidden in ("innerHTML", "insertAdjacent", "document.write", "eval(", "style=", "@import", "url(http"):
        assert forbidden not in PAGE, forbidden
    for url in re.findall(r'(?:href|src|action)="([^"]*)"', PAGE):
        assert url.startswith(("data:", "#", "https://ttaisolutions.com")), url
    assert "<script src" not in PAGE and not re.search(r"fetch\(\s*['\"`]/", PAGE)  # relative, so that a sub-path works
    words = [line for line in PAGE.split("\n") if " | " in line]
    assert [line for line in PAGE.split("\n") if len(line) > 120 and line not in words] == []


def test_page_is_small_enough_for_a_small_board():
    assert len(gzip.compress(PAGE.encode(), 9)) <= 52 * 1024


# ---- figures, words, ranges -------------------------------------------------------------------------------------


def test_figures_on_the_page_equal_what_the_api_says(page, site):
    page.open()
    # 90,122 + 4,210 and so on, added up by hand.
    expected = {"requests": 3, "total": 98_303, "input": 94_332, "output": 3_971, "reasoning": 2_502}
    assert {name: page.figure(name) for name in expected} == expected
    assert page.text("#kpi-total") == "98.3k"


@pytest.mark.parametrize("failed, told", [(1, ">99.9% succeeded"), (1999, "<0.1% succeeded"), (40, "98% succeeded")])
def test_share_is_never_told_as_all_or_none_while_it_is_neither(page, site, between, failed, told):
    requests = 12_300 if failed == 1 else 2000
    between.changes["/api/summary"] = lambda body: body["summary"].update(requests=requests, failed=failed)
    assert told in page.open(server=between).one("#sub-requests", "e.title")


def test_rate_limited_requests_are_told_apart_where_failures_are_counted(page, empty):
    codes = enumerate([429, 429, 500, 401])
    put(empty.store, event(at=empty.now - 99), *[event(at=empty.now - n, failed=1, status_code=code) for n, code in codes])
    for lang, told in (("vi", "4 lỗi, 2 do rate limit"), ("en", "4 failed, 2 rate-limited")):
        page.open("?range=24h").speak(lang)
        assert page.text("#sub-requests") == told and told in page.text("#chart-readout")
        assert page.js("document.querySelector('#accounts .fl[title]').title") == told
        assert page.js("document.querySelector('#panel li button').title").endswith(told)
    page.open("?range=24h&status=429")
    assert page.figure("requests") == 2 and page.picked("status") == "Failed with 429 (2)"


def test_labels_are_the_public_ones_and_switch_to_vietnamese(page, site):
    page.open()
    text = page.js("document.body.innerText")
    for label in (
        "CLIProxyAPI Usage Dashboard", "Requests / Tasks", "Total Tokens", "Input Tokens", "Output Tokens",
        "Reasoning Tokens", "5h quota left", "7d quota left", "Status", "Updated", "© 2025", "TTAI Solutions Software",
    ):  # fmt: skip
        assert label in text, label
    assert page.all(".acts button") == ["Refresh Quota", "Refresh"]
    ranges = ["Today", "Yesterday", "Last 1 hour", "Last 5 hours", "Last 24 hours", "Last 7 days"]
    assert page.all("#range option")[:6] == ranges
    page.speak("vi")
    left = page.js("document.body.innerText")
    assert "Tổng token" in left
    assert not any(word in left for word in ("Total Tokens", "Refresh Quota", "quota left"))
    page.open(fresh=False)
    assert page.js("document.documentElement.lang") == "vi"  # kept over a reload


def test_first_visit_follows_the_browsers_language_and_theme(browser, site):
    with Browser(width=390, height=844, accept_lang="vi-VN", dark=True) as phone:
        phone.goto(f"http://127.0.0.1:{site.port}/")
        phone.wait_until("document.querySelector('#kpi-requests').title")
        html = "document.documentElement"
        assert phone.script(f"return [{html}.lang, {html}.dataset.theme]") == ["vi", "dark"]
        assert phone.script(f"return {html}.scrollWidth") <= 390
        box = phone.script("return document.querySelector('#refresh-quota').getBoundingClientRect().toJSON()")
        assert 0 <= box["left"] < box["right"] <= 390
        assert phone.console_errors() == []


def test_each_range_shows_its_own_number(page, site):
    page.open("")
    for name in ("7d", "24h", "5h", "1h", "today"):
        page.select("#range", name)
        page.wait_until(f"location.search.includes('range={name}') || '{name}' === 'today'")
        midnight = page.js("new Date().setHours(0, 0, 0, 0) / 1000")
        query = f"range=today&start={midnight:.0f}" if name == "today" else f"range={name}"
        page.wait_for_requests(site.json(f"/api/summary?{query}")["summary"]["requests"])


# ---- states of the collector ------------------------------------------------------------------------------------


def test_demo_says_it_is_made_up_and_a_server_that_goes_away_leaves_its_numbers(page, program):
    page.site = type("Demo", (), {"port": free_port()})
    running = program.start("demo", "--no-browser", "--host", "127.0.0.1", "--port", str(page.site.port))
    running.wait_for_line("Demo with made-up data")
    page.open("?range=7d")
    page.wait_for("#demo-banner", "e.innerText.length > 10")
    assert page.figure("requests") > 3000
    page.faults_expected = True
    running.kill()
    page.click("#refresh")
    page.wait_for("#stale", "!e.hidden")
    assert page.figure("requests") > 3000


def test_first_run_no_requests_and_no_match_are_told_apart_each_with_a_way_out(page, empty, between):
    set_state(empty, "wrong_password", publishing=None)
    between.changes["/api/health"] = lambda body: body.update(account_files={"found": 0})
    page.open(server=between)
    page.wait_for("#empty", "e.dataset.kind === 'first'")
    parts = "#pool, #filters, #kpis, #chart, #reading, .side, #quota, #list"
    assert not any(page.all(parts, "e.checkVisibility()"))  # no zeros around it
    assert "python3 usage_dashboard.py check" in page.text("#empty")
    steps = page.all("#empty li", "[e.firstChild.textContent, e.textContent]")
    assert [mark for mark, _ in steps] == ["✓", "✕", "·", "✕"]
    for (_, text), words in zip(steps, (("Proxy reachable", "done"), ("management_password", "to do"),
                                        ("not known yet",), ("into auth_dir.",))):  # fmt: skip
        assert all(word in text for word in words)
    assert page.one("#remedy", "e.hidden")  # it stands in the list

    set_state(empty, "waiting", publishing=True)
    put(empty.store, event(at=empty.now - 30 * HOUR))
    page.click("#refresh")
    page.wait_for("#empty", "e.dataset.kind === 'range'")
    for css, told in (("#empty", "No requests in this range"), ("#panel", "No requests in this range"),
                      ("#pool", "There is no Codex account file"), ("#accounts-note", "No account was used in this ra")):  # fmt: skip
        assert told in page.text(css)
    empty.status["last_event"] = empty.now - 30 * HOUR
    page.click("#refresh")
    page.wait_for_text("#empty", "Show: Last 7 days")
    page.click("#empty button")
    page.wait_for_requests(1)

    page.open("?range=24h&model=no-such-model", server=between)
    page.wait_for("#empty", "e.dataset.kind === 'filter'")
    assert [page.text(css)[:16] for css in ("#empty", "#panel", "#accounts-note")] == ["No request match"] * 3
    page.click("#empty button")
    page.wait_for("#empty", "e.dataset.kind === 'range'")


def test_every_fault_of_the_collector_is_told_with_its_remedy_in_both_languages(page, site):
    site.status.update(until=site.now + 600, publishing=None, retention_seconds=60)
    page.open()
    for state in sorted(set(app.STATE_REMEDIES) - {"starting", "recording", "waiting"}):
        set_state(site, state, message=f"the proxy: {state} in English")
        page.click("#refresh")
        for n, lang in enumerate(LANGS):
            page.speak(lang)
            page.wait_for_text("#status-text", WORDS[f"state.{state}"][n])
            told = page.text("#remedy")
            remedy = (f"The proxy: {state} in English.", WORDS[f"remedy.{state}"][1])[n]
            assert all(part in told for part in re.split(r"{\w+}", remedy)) and "{" not in told
            forgets = WORDS["forgets"][n].replace("{t}", ("1m", "1 phút")[n])
            assert (forgets in told) is (state not in ("publishing_off", "example_keys", "no_queue", "foreign_list"))
            assert ("in English" in page.js("document.body.innerText")) is (lang == "en")
    page.speak("en")
    site.status.update(state="brand_new", message="Feed the hamster.")  # of a newer program
    page.click("#refresh")
    page.wait_for_text("#status-text", "State unknown")
    page.wait_for_text("#remedy", "Feed the hamster.")


def test_proxy_that_forgets_too_soon_is_warned_of_while_recording_goes_on(page, site):
    site.status.update(warning="retention_short", retention_seconds=10)
    page.open()
    page.wait_for_text("#remedy", "forgets after 10s")
    assert "Recording" in page.text("#status")
    assert "fail" not in page.one("#remedy", "e.className")
    page.click("#lang-vi")
    page.wait_for_text("#remedy", "quên sau 10 giây")


def test_footer_tells_what_is_kept_and_read_from_where_and_of_alerts(page, site, between):
    told = {"sent_today": 0, "last_failed_at": None}
    between.changes["/api/health"] = lambda body: [body.update(alerts=told), body["database"].update(retention_days=30)]
    page.open(server=between)
    words = "single requests are kept for 30 days · reads from the proxy at 127.0.0.1:8317"
    page.wait_for("#facts", f"e.textContent.endsWith('{words}')")
    told.update(sent_today=1, last_failed_at=site.now - 60)
    page.click("#refresh")
    page.wait_for_text("#facts", "8317 · 1 alert sent today · an alert could not be sent (")


def test_program_that_takes_records_is_told_of_quietly_with_what_to_do(page, site):
    site.status.update(rival={"expected": 1500, "received": 24, "since": site.now - 600})
    page.open()
    for lang, words in (("en", ["counted 1,500 requests", "24 came", "Stop"]), ("vi", ["1.500 yêu cầu", "Hãy dừng"])):
        page.speak(lang)
        page.wait_for_text("#remedy", words[0])
        assert all(word in page.text("#remedy") for word in words) and "{" not in page.text("#remedy")
        assert "fail" not in page.one("#remedy", "e.className")
    site.status.update(rival=None)
    page.click("#refresh")
    page.wait_until("document.getElementById('remedy').hidden")


# ---- filters ----------------------------------------------------------------------------------------------------


def test_models_accounts_and_chips_filter_everything(page, site):
    page.open()
    page.click("#panel li[data-row='gpt-5.5'] button")
    page.wait_for_requests(1)
    page.wait_for_rows(1)
    page.pick("model", "All")
    page.wait_for_requests(3)
    page.click("#accounts tr[data-account='b@example.com'] .link")
    page.wait_for_requests(2)
    page.wait_until("document.querySelectorAll('#accounts tbody tr').length === 1")
    page.open("?range=24h&account=b%40example.com", fresh=False)  # a bookmark
    assert page.figure("requests") == 2 and page.picked("account") == "b@example.com (2)"


def test_selects_offer_what_the_other_filters_leave_and_keep_what_is_chosen(page, named, between):
    page.open(server=between)
    options = "[...e.options].map((o) => o.textContent)"
    everything = {
        "account": ["All accounts (2)", "Ops (7)", "bo@example.com (1)"],
        "model": ["All models (2)", "gpt-5.4 (7)", "m (1)"],
        "key": ["All API keys (3)", "An's laptop (6)", "without a key (1)", "sk-…0042 #0042ab (1)"],
        "status": ["All results", "Succeeded only (7)", "Failed with 502 (1)", "Failed only (1)"],
    }
    assert {name: page.one(f"#f-{name}", options) for name in everything} == everything
    labels = page.all("#filters > select, #rest select", "[e.id, e.ariaLabel]")
    assert labels == [["range", "Range"], ["f-account", "Account"], ["f-model", "Model"], ["f-key", "API key"],
                      ["f-status", "Status"]]  # fmt: skip
    page.pick("key", "without a key")
    page.wait_for_requests(1)
    assert "key=none" in page.js("location.search") and page.one("#f-model", options) == ["All models (1)", "m (1)"]
    page.pick("status", "Succeeded")
    page.wait_for("#clear", "!e.hidden")
    page.script("history.back()")
    page.wait_for("#f-status", "!e.selectedIndex")
    assert page.picked("key") == "without a key (1)"
    page.open("?range=24h&account=Ops&status=502", server=between)
    page.wait_for_requests(0)
    assert [page.picked(name) for name in everything] == ["Ops (0)", "All models (0)", "All API keys (0)",
                                                          "Failed with 502 (0)"]  # fmt: skip
    models = [{"value": f"m{n}", "requests": 9} for n in range(900)]
    between.changes["/api/summary"] = lambda body: body["choices"].update(model=models)
    page.click("#refresh")
    page.wait_for_text("#f-model", "All models (900)")
    assert len(page.all("#f-model option")) == 202 and page.picked("model") == "All models (900)"
    page.pick("model", "Find another…")
    assert page.js("document.activeElement.id") == "find-words" and page.picked("model") == "All models (900)"


def test_line_of_filters_compares_with_the_time_before_where_that_is_known(page, site, between):
    before = {"total_tokens": 90_000, "requests": 2, "failed": 4}
    between.changes["/api/summary"] = lambda body: body.update(previous=before, end=body["start"] + 24 * HOUR)
    page.open(server=between)
    assert page.text("#compare") == "against the time before: requests +50%, failed −3"
    page.select("#range", "today")
    page.wait_for_text("#compare", "against yesterday until 00:00: requests ")
    page.speak("vi")
    assert page.text("#compare").startswith("so với hôm qua đến 00:00: yêu cầu ")
    before = None
    page.select("#range", "7d")
    page.wait_for("#compare", "!e.textContent")


def test_window_alone_without_requests_is_an_empty_range_and_an_unknown_status_no_filter(page, site):
    start = int(site.now - 300 * HOUR)
    page.open(f"?range=7d&start={start}&end={start + HOUR}&status=blah")
    assert page.one("#empty", "e.dataset.kind") == "range"
    page.wait_for_text("#requests-note", "No requests in this range.")
    assert page.text("#narrowed").startswith("Time: ")


def test_models_under_the_failed_filter_are_told_by_their_failures(page, site):
    nothing = tokens(0, 0, 0, 0, 0)
    put(site.store, *[event(at=site.now - 60 - n, model="gpt-5.5", failed=1, **nothing) for n in range(3)])
    page.open("?range=24h&status=failed")
    told = page.all("#panel li", "e.innerText.split(/\\s+/).join(' ').slice(0, 20)")
    assert told == ["gpt-5.5 3 failed 75%", "gpt-5.4 1 failed 25%"]
    shares = page.all("#panel canvas", """(() => {
      const red = getComputedStyle(document.querySelector('[data-kind=failed] i')).backgroundColor, d = e.getContext('2d');
      const at = (x) => `rgb(${[...d.getImageData(x, 1, 1, 1).data].slice(0, 3).join(', ')})`;
      return [...Array(e.width).keys()].filter((x) => at(x) === red).length / e.width;
    })()""")
    assert shares == pytest.approx([1, 1 / 3], abs=0.01)


def test_filter_taken_away_leaves_the_focus_in_the_line_of_filters(page, site):
    page.open(f"?range=24h&status=ok&model=gpt-5.5&start={site.now - 9000:.0f}&end={site.now:.0f}")
    for button in ("narrowed", "clear"):
        page.script(f"document.querySelector('#{button}').focus()")
        page.press("Enter")
        assert page.js("document.activeElement.id") == "range"
    assert page.js("location.search") == "?range=24h"


@pytest.fixture
def named(empty, tmp_path):
    """Store requests of two client keys and one without, of which the first key and the first account have names."""
    names = {"#4bdca8": "An's laptop", "an@example.com": "Ops"}
    (tmp_path / "config.json").write_text(json.dumps({"names": names}), encoding="utf-8")
    more = {"api_key": "sk-…0042 #0042ab", "source": "bo@example.com", "auth_index": "b", "total_tokens": 360}
    put(empty.store, *[event(at=empty.now - 60 - n) for n in range(6)], event(at=empty.now - 50, model="m", api_key=""),
        event(at=empty.now - 40, failed=1, status_code=502, error="502 bad gateway", **more))  # fmt: skip
    return empty


def test_side_panel_shows_one_breakdown_at_a_time_whose_rows_filter_and_remembers_it(page, named, between):
    nobody = {"key": None, "unknown": True, "status_code": None, "error": None, "last_at": named.now, "accounts": []}
    between.changes["/api/summary"] = lambda body: [
        body[part].append({**body["keys"][-1], **nobody}) for part in ("keys", "failures")]  # fmt: skip
    page.open(server=between)
    page.script("document.querySelector('#tab-models').focus()")
    page.press("ArrowRight")
    assert page.js("document.activeElement.id") == "tab-keys"
    told = page.all("#panel li", "[e.innerText.replace(/\\s+/g, ' '), e.firstChild.tagName]")
    assert [tag for _, tag in told] == ["BUTTON", "BUTTON", "BUTTON", "DIV"]
    assert re.fullmatch(r"An's laptop 720 60% 6 requests · median 0\.9s · \$0\.00\d+ at list price", told[0][0])
    names = ["sk-…0042 #0042ab", "without a key", "key no longer known"]
    assert [words.startswith(name) for (words, _), name in zip(told[1:], names)] == [True] * 3
    for row, key, word in ((2, "0042ab", names[0]), (3, "none", names[1])):
        page.click(f"#panel li:nth-child({row}) button")
        page.wait_for_rows(1)
        assert page.js("location.search").endswith(f"key={key}") and page.picked("key") == f"{word} (1)"
        page.click("#panel li [aria-pressed=true]")
        page.wait_until("!location.search.includes('key=')")
    page.open("?range=24h", server=between, fresh=False)
    assert page.all("#tabs [aria-selected=true]", "e.id") == ["tab-keys"]
    page.click("#tab-failures")
    told = page.all("#panel li", "[e.innerText.replace(/\\s+/g, ' '), e.firstChild.tagName]")
    assert re.fullmatch(r"502 bad gateway 1 request 100% last \d\d:\d\d · bo@example.com", told[0][0])
    assert told[1][0].startswith("reason no longer known") and told[1][1] == "DIV"
    page.click("#panel li button")
    page.wait_until("location.search.includes('status=502')")
    page.wait_for("#panel li button", "e.getAttribute('aria-pressed') === 'true'")


def test_lines_under_the_figures_tell_speed_list_price_and_the_change(page, site, between):
    speed = {"latency_ms": {"p50": 8200, "p95": 29900}, "ttft_ms": {"p50": 1600, "p95": 2500},
             "tokens_per_second": {"p50": 91.9}}  # fmt: skip
    facts = {"cost_usd": 41.2, "unpriced_tokens": 0}, {"total_tokens": 100_000}

    def change(body):
        body["summary"].update(facts[0])
        body.update(speed=speed, previous=facts[1], prices_as_of="2026-11")

    between.changes["/api/summary"] = change
    page.open(server=between)
    assert page.text("#sub-requests") == "1 failed, 1 rate-limited\nmedian 8.2s"
    assert page.text("#sub-total") == "$41.20 at list price\n−2% on the time before"
    assert page.text("#sub-output").endswith("92 tokens/s, first after 1.6s")
    assert page.text("#sub-input") == "95.5% from cache\n4,284 uncached input"
    assert page.text("#sub-reasoning").endswith("1,469 answer")  # as the legend has it
    assert "standard tier, by the list prices of November 2026" in page.one("#sub-total", "e.title")
    facts = {"cost_usd": 1234.5, "unpriced_tokens": 1420}, {"total_tokens": 40_000}
    page.click("#lang-vi")
    page.click("#refresh")
    page.wait_for_text("#sub-total", "giá niêm yết ≥ 1.235\u00a0$+146% so với trước đó")
    assert "1.420 token thuộc model chưa có giá" in page.one("#sub-total", "e.title")
    facts = {"cost_usd": None}, None
    page.click("#refresh")
    page.wait_for("#sub-total", "e.textContent === '32,8k/yêu cầu'")


@pytest.mark.parametrize("scale, dark", [(1, False), (2, True)])
def test_figure_tells_exactly_at_a_press_and_draws_its_course_where_something_was_recorded(page, site, scale, dark):
    page.resize(390, 844, scale)
    page.emulate(dark=dark)
    page.open()
    size, height = "parseFloat(getComputedStyle(e).fontSize)", page.one("#kpis", "e.clientHeight")
    page.script("document.querySelector('#kpi-total button').focus()")
    large = page.one("#kpi-total button", size)
    page.press("Enter")
    assert page.all(".figure") == ["3", "98,303", "94,332", "3,971", "2,502"]
    assert page.one("#kpi-total button", size) < large and page.one("#kpis", "e.clientHeight") == height
    page.click("#kpi-total button")
    assert page.text("#kpi-total") == "98.3k" and page.one("#kpi-total button", size) == large
    told = page.one("#course-total", "e.ariaLabel")
    assert re.fullmatch(r"Latest [\d.k]+ \(.*\), highest 93\.1k \(.*\)", told)
    sharp, pixels = page.one("#course-total", """(() => {
      const d = e.getContext('2d').getImageData(0, 0, e.width, e.height).data, pixels = [];
      d.forEach((a, i) => { if (i % 4 === 3 && a) pixels.push([a, (i >> 2) % e.width / e.width, ...d.slice(i - 3, i)]); });
      return [e.width === e.clientWidth * devicePixelRatio, pixels.sort((a, b) => a[0] - b[0])];
    })()""")
    accent = page.one("#refresh-quota", "getComputedStyle(e).backgroundColor.match(/\\d+/g).map(Number)")
    assert sharp and pixels[-1][2:] == pytest.approx(accent, abs=3)
    assert 0.8 < min(pixel[1] for pixel in pixels) < 0.95 < max(pixel[1] for pixel in pixels)


def test_yesterday_and_two_dates_are_local_days_that_address_and_reload_keep(page, empty, between):
    midnight = page.js("new Date().setHours(0, 0, 0, 0) / 1000")
    put(empty.store, *[event(at=midnight + 1 - 24 * HOUR * days) for days in range(5) for _ in range(days + 1)])
    page.open("?range=yesterday", server=between)
    assert page.figure("requests") == 2 and len(page.chart()["bars"]) == 24
    page.select("#range", "dates")
    page.wait_until("location.search.includes('range=dates')")
    assert page.figure("requests") == 2  # they begin as what was shown
    day = "new Date(arguments[0] * 1000).toLocaleDateString('sv')"
    before, *days = (page.js(day, midnight - 24 * HOUR * n) for n in (4, 3, 1))
    pick = "const [e, day] = arguments; e.value = day; e.dispatchEvent(new Event('change'))"
    page.script(pick, page.find("#from"), days[0])
    page.wait_for_requests(2 + 3 + 4)
    assert f"from={days[0]}&to={days[1]}" in page.js("location.search")
    assert any(f"start={midnight - 72 * HOUR:.0f}&end={midnight:.0f}" in path for path in between.asked)
    page.open(page.js("location.search"), server=between, fresh=False)
    assert page.figure("requests") == 9 and page.all("#dates input", "e.value") == days
    page.script(pick, page.find("#to"), before)
    page.wait_for_requests(5)  # the other day follows one that would stand before it
    page.open("?range=dates&from=2026-02-31&to=x", server=between)
    assert page.one("#range", "e.value") == "today"


# ---- the mask ---------------------------------------------------------------------------------------------------


def test_masked_page_holds_neither_names_nor_search_but_tells_accounts_apart(page, site):
    page.open("?range=24h&account=b%40example.com&q=example")
    assert "b@example.com" in page.js("document.body.outerHTML")
    page.click("#privacy")
    page.wait_until("location.search === '?range=24h'")
    assert page.figure("requests") == 2 and page.one("#search", "e.value") == "" and page.picked("account").startswith("b***")
    page.pick("account", "All")
    page.wait_for_requests(3)
    page.wait_for_rows(3)
    assert "@example.com" not in page.js("document.body.outerHTML")
    names = page.all("#accounts-body .link")
    assert len(set(names)) == len(names) >= 4
    page.open("?range=24h&account=b%40example.com", fresh=False)  # an address from elsewhere
    assert page.figure("requests") == 2 and page.js("location.search") == "?range=24h"
    page.click("#search")
    page.press("gpt-5.5")
    page.wait_for_rows(1)
    assert page.js("location.search") == "?range=24h"
    page.click("#privacy")
    page.wait_until("decodeURIComponent(location.search).includes('b@example.com')")


def test_owner_s_names_stand_in_place_of_mails_and_keys_also_on_a_masked_page(page, named):
    save_quota(named, "an@example.com", 62, 5)
    page.open("?range=24h&account=an%40example.com&key=4bdca8")
    page.wait_for_rows(6)
    page.click("#tab-keys")
    page.click("#requests tr[data-id] button")
    assert page.text("#accounts .link") == "Ops" and page.text("#requests [data-by=account]") == "Ops"
    assert [page.picked("account"), page.picked("key")] == ["Ops (6)", "An's laptop (6)"]
    assert "API key\nAn's laptop" in page.text("#requests .detail")
    page.click("#privacy")
    page.wait_until("location.search === '?range=24h'")
    for css in ("#filters", "#panel", "#requests .detail"):
        assert "An's laptop" in page.text(css)
    page.click("#clear")
    page.wait_for_rows(8)
    left = page.js("document.body.outerHTML")
    assert "Ops" in left and "An's laptop" in left and "example.com" not in left and "0042 #" not in left


# ---- for everyone -----------------------------------------------------------------------------------------------


def test_keyboard_alone_reaches_and_operates_everything(page, site):
    page.open()
    page.script("document.activeElement.blur()")
    reached = {}
    for _ in range(120):
        page.press("Tab")
        name, outlined = page.script("""
          const e = document.activeElement, s = getComputedStyle(e);
          const name = e.id || e.dataset.kind || e.dataset.sort || e.className.split(' ')[0];
          return [e === document.body ? null : name, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2];""")
        if name is None:
            break
        reached[name] = outlined and reached.get(name, True)
    wanted = (
        "skip refresh-quota refresh lang-en lang-vi theme range f-account f-model f-key f-status cached failed chart privacy copy-accounts search "
        "failed-only copy-csv export-csv export-jsonl tab-models twist link total"
    )
    assert set(wanted.split()) <= set(reached)
    assert [name for name, outlined in reached.items() if not outlined] == []
    page.script("document.querySelector('#theme').focus()")
    page.press("Enter")
    page.wait_until("document.documentElement.dataset.theme === 'dark'")
    page.script("document.querySelector('#chart').focus()")
    page.press("Home", "End", "ArrowLeft", "ArrowRight", "Enter")
    page.wait_until("location.search.includes('start=')")
    page.press("Escape")
    page.wait_until("!location.search.includes('start=')")
    page.script("document.querySelector('#panel button').focus()")
    page.press("Space")
    page.wait_until("location.search.includes('model=')")


def test_page_never_scrolls_sideways(page, site):
    page.open("?range=dates&from=2026-11-01&to=2026-11-30")
    page.speak("vi")
    page.script("document.querySelector('#accounts .twist').click()")
    for width in (320, 768, 1150, 2560):
        page.resize(width, 900)
        page.wait_until(f"innerWidth === {width}")
        assert page.js("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("width, height", [(390, 844), (1280, 720), (1440, 900)])
def test_first_screen_answers_the_questions_of_the_day(page, site, between, width, height):
    soon = app.utc_text(site.now + 2.8 * HOUR)

    def pool(body):
        b = next(row for row in body["quotas"] if row["email"] == "b@example.com")
        b["windows"][0].update(remaining_percent=0, reset_at=soon)
        body["pool"] = [{"label": label, "accounts": 3, "remaining_percent": 41, "next_reset_at": soon,
                         "forecast": {"runs_out_at": soon, "until": soon}} for label in ("5h", "7d")]  # fmt: skip

    between.changes["/api/quota"] = pool
    between.changes["/api/summary"] = lambda body: body.update(previous={"total_tokens": 9, "failed": 0})
    page.resize(width, height)
    page.open(server=between)
    is_seen = (
        "(({top, bottom, left, right}) => top >= 0 && bottom > top && bottom <= innerHeight && left >= 0"
        " && right <= innerWidth)(e.getBoundingClientRect())"
    )
    for lang, told in (("en", "next back: b@example.com in 2h 4"), ("vi", "sắp có lại: b@example.com sau 2 giờ 4")):
        page.speak(lang)
        assert told in page.text("#pool")
        answers = "#status, #updated, #pool h2, .pool, #pool .note, #need, #kpi-total, #sub-total, #sub-requests .bad"
        assert page.all(answers, is_seen) == [True] * 10
    if width < 721:
        assert page.one("#rest", "e.offsetHeight") == 0
        page.click("#fold")
        targets = "header button, #pool button, #filters :is(button, select)"
        assert min(page.all(targets, "e.offsetHeight || 99")) >= 40 and page.one("#rest", "e.offsetHeight") > 0
        page.pick("status", "Lỗi 429")
        page.wait_for("#fold", "e.textContent === 'Lọc (1)'")
    page.click("#need")
    page.wait_until("scrollY > 0 && document.activeElement.closest('#accounts-body')")
    page.click("#privacy")
    assert "b*** #" in page.text("#pool") and "@example" not in page.text("#pool")


@pytest.mark.parametrize("lang", LANGS)
def test_no_label_is_cut_on_the_narrowest_phone(page, site, between, lang):
    page.resize(360, 800)
    between.changes["/api/quota"] = lambda body: body.update(cooldown_seconds=299)
    page.open(server=between)
    page.speak(lang)
    page.wait_for("#refresh-quota", "/\\d:\\d\\d/.test(e.textContent)")
    page.script("document.querySelector('#requests tr[data-id] button').click()")
    words = (
        "h1, h2, button:not(.link, .chip, #panel *), dt, dd, .note, .notice, .tag, .est, .when span, .say, .st, .more, "
        ".figure, .sub, #status, #chart-readout, footer span, option:checked"
    )
    is_cut = (
        "e.offsetParent && !e.closest('.vh') && (e.getBoundingClientRect().right > innerWidth + .5"
        " || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline')"
    )
    assert [text for text in page.all(words, f"{is_cut} && `${{e.className}} ${{e.textContent}}`") if text] == []
    room, wide = page.script("""
      const s = document.querySelector('#range'), c = document.createElement('canvas').getContext('2d');
      c.font = getComputedStyle(s).font;
      return [s.clientWidth, c.measureText(s.selectedOptions[0].textContent).width];""")
    assert room >= wide + 30  # the arrow and the edges


def test_paper_is_white_whole_and_without_controls(page, empty):
    many(empty, 60)
    page.resize(725, 1000)  # A4 within its margins
    page.emulate(dark=True)
    page.open()
    page.wait_for_rows(60)
    page.emulate(print=True)
    page.wait_until("document.documentElement.dataset.theme === 'light'")
    for css in (".controls", ".tools", "#more"):
        assert page.one(css, "getComputedStyle(e).display") == "none"
    assert page.one("#scroll", "e.scrollHeight <= e.clientHeight")
    assert page.one("html", "e.scrollWidth <= e.clientWidth")
    assert page.one("body", "getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    page.emulate(print=False)
    page.wait_until("document.documentElement.dataset.theme === 'dark'")


# ---- staying as it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(1440, 2000), (1440, 500), (390, 500)])  # with and without a scroll bar
def test_first_load_moves_nothing(page, site, width, height):
    page.resize(width, height)
    with page.before_load("""
      window.moved = 0;
      new PerformanceObserver((list) => { for (const e of list.getEntries()) window.moved += e.value; })
        .observe({type: 'layout-shift', buffered: true});"""):
        page.open()
    page.wait_for_rows(3)
    page.run_async("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")
    assert page.js("window.moved") == 0


def test_hidden_tab_asks_for_nothing_and_catches_up_when_it_is_seen(page, site, between):
    # The timer of 30 seconds is fired by hand.
    with page.before_load("""
      const start = window.setTimeout.bind(window);
      window.setTimeout = (act, delay) => delay === 30000 ? (window.fire = act, 0) : start(act, delay);"""):
        page.open(server=between)
    answered = "performance.getEntriesByType('resource').filter((e) => e.name.includes('/api/'))"
    page.wait_until(f"window.fire && {answered}.filter((e) => e.responseEnd).length === 4")
    page.script("""
      window.hidden_at = null;
      document.addEventListener('visibilitychange', () => {
        if (document.hidden) { window.fire(); window.hidden_at = performance.now(); } });""")
    asked = len(between.asked)
    with page.other_tab():
        page.goto("about:blank")
        assert len(between.asked) == asked
    page.wait_until(f"!document.hidden && {answered}.some((e) => e.startTime > window.hidden_at)")
    assert len(between.asked) > asked


def test_time_of_the_answer_is_told_and_a_lost_server_asked_again_soon_by_one_request_at_a_time(page, site, between):
    with page.before_load("""
      const start = window.setTimeout.bind(window);
      window.setTimeout = (act, delay) => delay === 4000 ? (window.again = act, 0) : start(act, delay);"""):
        page.open(server=between)
    page.faults_expected = True
    clock = page.js("new Date(arguments[0] * 1000).toLocaleTimeString('en-GB')", site.now)
    assert page.text("#updated") == f"Updated {clock} · every 30s"
    paths = [f"/api/{name}" for name in ("summary", "quota", "requests", "health")]
    between.faults.update({path: lambda handler: handler.connection.shutdown(socket.SHUT_RDWR) for path in paths})
    page.click("#refresh")
    page.wait_until("window.again")
    assert "Dashboard does not answer, trying again" in page.text("#status")
    assert page.text("#updated") == f"Updated {clock} · every 4s"
    again = "const {again} = window; window.again = null; again()"
    between.asked.clear()
    page.script(again)
    page.wait_until("window.again")
    assert len(between.asked) == 1
    between.faults.clear()
    site.now += 7
    page.script(again)
    page.wait_for_text("#updated", "every 30s")
    page.wait_for_text("#status", "Recording")
    assert clock not in page.text("#updated") and page.one("#main", "e.ariaBusy") == "false"


def test_two_tabs_agree_on_theme_language_mask_and_the_lock_of_refresh_quota(page, site, between):
    lock, page.faults_expected = {}, True
    between.changes["/api/quota"] = lambda body: body.update(lock)
    between.faults["/api/quota?force=1"] = lambda handler: [
        lock.update(cooldown_seconds=200), handler.refuse(429, "cooldown", Retry_After="200")]  # fmt: skip
    page.open(server=between)
    with page.other_tab():
        page.open(server=between, fresh=False)
        for name in ("lang-vi", "theme", "privacy", "refresh-quota"):
            page.click(f"#{name}")
    page.wait_until("document.querySelector('#refresh-quota').textContent.startsWith('Làm mới quota · 3:')", 20)
    assert page.js("document.documentElement.dataset.theme") == "dark"
    assert "@example.com" not in page.js("document.body.outerHTML")


# ---- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, status, key", [
    ("internal_error", 500, "why.internal_error"), ("foreign_site", 403, "why.foreign_site"),
    ("password_needed", 401, "why.password_needed"), ("bad_start", 400, "why.bad"), ("a_newer_code", 418, "why.http"),
])  # fmt: skip
def test_refusals_are_told_in_the_page_s_own_words(page, site, between, code, status, key):
    page.open(server=between)
    page.faults_expected = True
    between.faults["/api/summary"] = lambda handler: handler.refuse(status, code)
    page.click("#refresh")
    page.wait_for("#stale", "!e.hidden")
    for n, lang in enumerate(LANGS):
        page.speak(lang)
        page.wait_for_text("#stale", WORDS[key][n].replace("{v}", str(status)))
        assert "said in English" not in page.text("#stale")
    assert page.figure("requests") == 3


def test_answer_cut_off_leaves_the_old_numbers_grey_under_their_own_range_until_it_is_back(page, site, between):
    page.open("?range=all", server=between)
    page.faults_expected = True

    def cut(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(b'{"summary": {"requests": 9')
        handler.close_connection = True

    between.faults["/api/summary"] = cut
    page.select("#range", "24h")
    page.wait_for_text("#stale", "Usage could not be loaded")
    assert "(All time)" in page.text("#stale") and page.figure("requests") == 3
    assert page.one("#kpis", "getComputedStyle(e).filter") == "grayscale(1)"
    page.speak("vi")  # draws everything again
    page.speak("en")
    assert page.text("#chart-readout").startswith("All time · 98.3k tokens")
    between.faults.clear()
    page.click("#refresh")
    page.wait_for_text("#chart-readout", "Last 24 hours · 98.3k tokens")
    page.wait_for("#stale", "e.hidden")
    assert page.one("#kpis", "getComputedStyle(e).filter") == "none"


def test_first_load_that_fails_says_so_and_recovers(page, site, between):
    page.faults_expected = True
    between.faults["/api/summary"] = lambda handler: handler.reply(200, b"<html>a proxy's own page</html>")
    page.open(server=between, ready=False)
    page.wait_for("#error", "e.checkVisibility({visibilityProperty: true})")
    assert "the answer was not understood" in page.text("#error")
    assert page.text("#kpi-requests") == "—"
    between.faults.clear()
    page.click("#refresh")
    page.wait_for_requests(3)
    assert page.one("#error", "e.hidden")
