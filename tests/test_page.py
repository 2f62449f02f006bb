from __future__ import annotations

import csv
import http.server
import io
import json
import re
import threading
import time

import pytest
from support import free_port
from test_store import event, put, reading
from test_web import Site
from webdriver import Browser

import usage_dashboard as app

PAGE = (app.BASE_DIR / "usage-dashboard.html").read_text(encoding="utf-8")
HOUR = 3600


def dictionary():
    """Give each word's key with its English and its Vietnamese text."""
    block = re.search(r'<script type="text/plain" id="i18n">\n(.*?)\n *</script>', PAGE, re.S).group(1)
    return {key: texts for key, *texts in (line.strip().split(" | ") for line in block.split("\n"))}


def test_every_word_is_there_in_both_languages_with_the_same_places():
    block = re.search(r'id="i18n">\n(.*?)\n *</script>', PAGE, re.S).group(1)
    words = dictionary()
    assert len(words) == block.count("\n") + 1 > 200  # no key twice
    for key, texts in words.items():
        assert len(texts) == 2 and all(text.strip() for text in texts), key
        places = [sorted(set(re.findall(r"{\w+}", text))) for text in texts]
        assert places[0] == places[1] or texts[0] == "{message}", key  # the program tells it in English


def test_every_word_is_used_and_every_used_word_is_there():
    script = re.search(r'<script type="module">(.*?)</script>', PAGE, re.S).group(1)
    markup = PAGE[PAGE.index("<body") : PAGE.index('<script type="text/plain"')]
    words = dictionary()
    plain = set(re.findall(r"\b(?:t|plural)\('([\w.]+)'", script)) | set(
        re.findall(r'data-(?:t|label)="([\w.]+)"', markup)
    )
    assert plain <= set(words) and len(plain) > 80
    quoted = set(re.findall(r"['`]([\w.]+)['`]", script))
    made = set(re.findall(r"`([a-z]+(?:\.[a-z]+)*)\.\$\{", script)) | set(re.findall(r"worded\('([\w.]+)'", script))
    for key in words:
        assert key in plain | quoted or key.rpartition(".")[0] in made, key


def test_page_has_no_text_outside_the_dictionary():
    markup = re.sub(r"<(script|style)\b.*?</\1>|<!--.*?-->", "", PAGE, flags=re.S)
    body = markup[markup.index("<body") :]
    left = re.sub(r"<[^>]*>", " ", body)
    assert set(left.split()) <= {"©", "2025", "TTAI", "Solutions", "Software", "·", "CLIProxyAPI", "Usage", "Dashboard"}


def test_page_keeps_its_own_rules():
    for forbidden in (
        "innerHTML",
        "document.write",
        "eval(",
        "style=",
        "@import",
        "url(http",
        "<script src",
        "insertAdjacentHTML",
    ):
        assert forbidden not in PAGE, forbidden
    for url in re.findall(r'(?:href|src|action)="([^"]*)"', PAGE):
        assert url.startswith(("data:", "#", "https://ttaisolutions.com")), url
    assert not re.search(r"fetch\(\s*['\"`]/", PAGE)  # relative, so that a sub-path works


def test_every_state_of_the_program_has_words_and_a_remedy_in_both_languages():
    words = dictionary()
    for state in app.STATE_REMEDIES:
        assert f"state.{state}" in words, state
        assert (f"remedy.{state}" in words) != (state in ("starting", "recording", "waiting")), state
    for state in app.QUOTA_MESSAGES:
        assert f"quota.state.{state}" in words and f"quota.fix.{state}" in words, state


def test_page_is_small_enough_for_a_small_board():
    import gzip

    assert len(gzip.compress(PAGE.encode(), 9)) <= 52 * 1024


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, PAGE)
    made.now = time.time()
    made.status.update(
        state="recording",
        last_event=made.now - 4,
        endpoint="127.0.0.1:8317",
        mode="pop",
        events=3,
        rejected=0,
        ignored=0,
        publishing=True,
        since=made.now - 100,
        until=None,
    )
    yield made
    made.close()


def fill(site):
    put(
        site.store,
        event(
            at=site.now - 0.2 * HOUR,
            input_tokens=90_122,
            cached_tokens=88_000,
            output_tokens=3_021,
            reasoning_tokens=1_990,
            total_tokens=93_143,
        ),
        event(
            at=site.now - 2 * HOUR,
            source="b@example.com",
            auth_index="bb",
            model="gpt-5.5",
            input_tokens=4_210,
            cached_tokens=2_048,
            output_tokens=950,
            reasoning_tokens=512,
            total_tokens=5_160,
        ),
        event(
            at=site.now - 2.1 * HOUR,
            source="b@example.com",
            auth_index="bb",
            input_tokens=0,
            cached_tokens=0,
            output_tokens=0,
            reasoning_tokens=0,
            total_tokens=0,
            failed=1,
            status_code=429,
            error="429 usage_limit_reached: The usage limit",
        ),
    )
    soon, later = app.utc_text(site.now + 2 * HOUR), app.utc_text(site.now + 4 * 24 * HOUR)

    def windows(five, week):
        return json.dumps(
            [
                {
                    "label": label,
                    "seconds": seconds,
                    "used_percent": 100 - left,
                    "remaining_percent": left,
                    "reset_at": at,
                    "meter": None,
                }
                for label, seconds, left, at in (("5h", 18000, five, soon), ("7d", 604800, week, later))
                if left is not None
            ]
        )

    def save(email, five, week, **changes):
        row = reading(
            email=email, account_id_tag="#" + email[:6], ts_epoch=site.now - 60, windows=windows(five, week), **changes
        )
        for place, left, at in (("primary", five, soon), ("secondary", week, later)):
            row.update(
                {
                    f"{place}_used_percent": None if left is None else 100 - left,
                    f"{place}_remaining_percent": left,
                    f"{place}_reset_at": None if left is None else at,
                }
            )
        site.store.save_reading(row)

    save("an@example.com", 62, 5)
    save("b@example.com", 20, 71, state="limited", limit_reached=1)
    save("weekly@example.com", None, 88)
    site.store.save_quota_state("old@example.com", "#old", "plus", "relogin", "sign in again", site.now)


class Between:
    """Stand between the browser and a dashboard.

    `changes` edit the answer of a path, `faults` take its place: functions of the handler, which has reply().
    """

    def __init__(self, site):
        self.changes, self.faults, self.asked = {}, {}, []
        between = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                between.asked.append(self.path)
                fault = between.faults.get(path + "?force=1" if "force=1" in self.path else path)
                if fault:
                    return fault(self)
                answer, body = site.ask(self.path)
                if path in between.changes:
                    content = json.loads(body)
                    between.changes[path](content)
                    body = json.dumps(content).encode()
                kept = {name: answer.headers[name] for name in ("Content-Type", "Content-Security-Policy")}
                self.reply(answer.status, body, **kept)

            def reply(self, status, body, **headers):
                self.send_response(status)
                for name, text in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), text)
                self.end_headers()
                self.wfile.write(body)

            def refuse(self, status, code, **headers):
                self.reply(status, json.dumps({"error": "said in English", "code": code}).encode(), **headers)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def between(site):
    made = Between(site)
    yield made
    made.close()


class Shown:
    """Open pages in the browser as a first visitor sees them; what goes wrong in them fails the test."""

    def __init__(self, browser):
        self.browser, self.hosts, self.faults_expected = browser, set(), False

    def __call__(self, server, query="?range=24h", fresh=True, ready=True):
        address = f"http://127.0.0.1:{server.port}/{query}"
        self.hosts.add(f"http://127.0.0.1:{server.port}/")
        if fresh:
            self.browser.goto(f"http://127.0.0.1:{server.port}/favicon.ico")  # of the same origin, without the page
            self.browser.script("localStorage.clear(); sessionStorage.clear()")
            self.browser.console_errors()
        self.browser.goto(address)
        if ready:
            self.browser.wait_until("document.querySelector('#kpi-requests').dataset.value !== undefined")
            self.browser.wait_until("!document.body.classList.contains('booting')")
        return self.browser

    def check(self):
        errors = self.browser.console_errors()
        if self.faults_expected:  # the browser notes each failed load itself
            errors = [error for error in errors if "Failed to load resource" not in error]
        assert errors == []
        others = [url for url in self.browser.requested_urls() if not url.startswith((*self.hosts, "data:"))]
        assert others == []


@pytest.fixture
def show(browser):
    """Open a server's page in an English browser; console errors and requests to another host fail the test."""
    browser.resize(1440, 900, 1)
    browser.emulate(dark=False)
    browser.goto("about:blank")
    browser.console_errors()
    browser.requested_urls()
    shown = Shown(browser)
    yield shown
    shown.check()
    browser.goto("about:blank")  # so that nothing asks on while the servers close
    browser.resize(1440, 900, 1)
    browser.emulate(dark=False, print=False)


@pytest.fixture
def page(show, site):
    """Open the page of the site."""
    return lambda *args, **options: show(site, *args, **options)


def value(browser, name):
    return int(browser.script(f"return document.querySelector('#kpi-{name}').dataset.value"))


def test_figures_on_the_page_equal_what_the_api_says(page, site):
    fill(site)
    shown = page()
    # 90,122 + 4,210 and so on, added up by hand.
    assert [value(shown, name) for name in ("requests", "total", "input", "output", "reasoning")] == [
        3,
        98_303,
        94_332,
        3_971,
        2_502,
    ]
    assert "98,303" in shown.script("return document.querySelector('#kpi-total').title")


@pytest.mark.parametrize("failed, told", [(1, ">99.9% succeeded"), (1999, "<0.1% succeeded"), (40, "98% succeeded")])
def test_share_is_never_told_as_all_or_none_while_it_is_neither(show, site, between, failed, told):
    fill(site)
    between.changes["/api/summary"] = lambda body: body["summary"].update(requests=2000 + (failed == 1) * 10_300, failed=failed)
    assert show(between).text("#sub-requests").endswith(told)


def test_bars_are_as_high_as_their_tokens(page, site):
    fill(site)
    shown = page()
    bars = shown.script("return window.__page.geometry().map(b => ({...b}))")
    heights = {}
    for bar in bars:
        heights.setdefault(bar["kind"], []).append(bar["h"])
    assert {"cached", "input", "output", "reasoning"} <= set(heights)
    biggest = max(heights["cached"])
    assert max(heights["input"]) == pytest.approx(biggest * 2_122 / 88_000, abs=1.6)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("dark", [False, True])
def test_canvas_is_sharp_and_drawn_in_the_colours_of_the_tokens(page, site, browser, scale, dark):
    hour = int(site.now) // HOUR * HOUR
    sums = {
        "input_tokens": 5000,
        "cached_tokens": 2000,
        "output_tokens": 4000,
        "reasoning_tokens": 2000,
        "total_tokens": 9500,
    }
    put(site.store, event(at=hour - 1800, **sums), event(at=hour - 1800, failed=1, **sums))
    browser.resize(1440, 900, scale)
    browser.emulate(dark=dark)
    shown = page()
    size = shown.script(
        "const c = document.querySelector('#chart'); return [c.width, c.height, c.clientWidth, c.clientHeight]"
    )
    assert size[:2] == [size[2] * scale, size[3] * scale]
    drawn, wanted = shown.script(
        """
      const c = document.querySelector('#chart'), probe = document.createElement('i'), drawn = {}, wanted = {};
      document.body.append(probe);
      for (const b of window.__page.geometry()) {
        drawn[b.kind] = `rgb(${[...c.getContext('2d').getImageData((b.x + b.w / 2) * arguments[0], (b.y + b.h / 2) * arguments[0], 1, 1).data].slice(0, 3).join(', ')})`;
        probe.style.color = `var(--s-${b.kind})`;
        wanted[b.kind] = getComputedStyle(probe).color;
      }
      probe.remove();
      return [drawn, wanted];""",
        scale,
    )
    assert set(drawn) == {"cached", "input", "output", "reasoning", "other", "failed"} and len(set(drawn.values())) == 6
    assert drawn == wanted


def cell_texts(browser, account):
    return browser.script(
        "const row = [...document.querySelectorAll('#accounts tr')].find(r => [r.dataset.account, r.dataset.email].includes(arguments[0]));"
        "return row ? row.innerText.replace(/\\s+/g, ' ') : null",
        account,
    )


def test_accounts_show_usage_and_quota_with_the_three_colours(page, site):
    fill(site)
    shown = page()
    shown.wait_until("document.querySelectorAll('#accounts tbody tr').length >= 4")
    assert "62%" in cell_texts(shown, "an@example.com") and "Active" in cell_texts(shown, "an@example.com")
    assert "Limited" in cell_texts(shown, "b@example.com") and "20%" in cell_texts(shown, "b@example.com")
    weekly = cell_texts(shown, "weekly@example.com")
    assert "—" in weekly and "88%" in weekly and "100%" not in weekly
    assert "Sign in again" in cell_texts(shown, "old@example.com")
    colours = shown.script("""
      const probe = document.createElement('i'); document.body.append(probe);
      const of = (token) => { probe.style.color = `var(--${token})`; return getComputedStyle(probe).color; };
      const want = {ok: of('ok'), warn: of('warn'), bad: of('bad')};
      const used = new Set([...document.querySelectorAll('#accounts *')].map(n => getComputedStyle(n).backgroundColor));
      return Object.fromEntries(Object.entries(want).map(([name, colour]) => [name, used.has(colour)]));""")
    assert colours == {"ok": True, "warn": True, "bad": True}


def test_requests_list_what_failed_and_why(page, site):
    fill(site)
    shown = page()
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 3")
    assert "429 usage_limit_reached" in shown.text("#requests")
    room, wide = shown.script("const e = document.querySelector('#requests td.bad'); return [e.clientWidth, e.scrollWidth]")
    assert wide <= room
    shown.click("#failed-only")
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 1")
    shown.wait_until("document.querySelector('#kpi-requests').dataset.value === '1'")
    assert "status=failed" in shown.script("return location.search")


def test_labels_are_the_public_ones_and_switch_to_vietnamese(page, site):
    fill(site)
    shown = page()
    text = shown.script("return document.body.innerText")
    for label in (
        "CLIProxyAPI Usage Dashboard",
        "Requests / Tasks",
        "Total Tokens",
        "Input Tokens",
        "Output Tokens",
        "Reasoning Tokens",
        "5h Remaining",
        "7d Remaining",
        "Status",
        "Reset Time",
        "Refresh Quota",
        "Refresh",
        "TTAI Solutions Software",
        "© 2025",
    ):
        assert label in text, label
    options = shown.script("return [...document.querySelector('#range').options].map(o => o.textContent)")
    assert options[:5] == ["Today", "Last 1 hour", "Last 5 hours", "Last 24 hours", "Last 7 days"]
    order = shown.script(
        "return document.querySelector('#refresh-quota').compareDocumentPosition(document.querySelector('#refresh'))"
    )
    assert order & 4  # Refresh Quota comes first
    shown.click("#lang-vi")
    shown.wait_until("document.documentElement.lang === 'vi' && document.body.innerText.includes('Tổng token')")
    left = shown.script("return document.body.innerText")
    assert "Total Tokens" not in left and "Refresh Quota" not in left and "Remaining" not in left
    page(fresh=False)
    shown.wait_until("document.documentElement.lang === 'vi'")  # kept over a reload


@pytest.mark.browser
def test_first_visit_follows_the_browsers_language_and_theme(browser, site):
    fill(site)
    with Browser(width=390, height=844, accept_lang="vi-VN", dark=True) as phone:
        phone.goto(f"http://127.0.0.1:{site.port}/")
        phone.wait_until("document.querySelector('#kpi-requests').dataset.value !== undefined")
        assert phone.script("return [document.documentElement.lang, document.documentElement.dataset.theme]") == [
            "vi",
            "dark",
        ]
        assert phone.script("return document.documentElement.scrollWidth") <= 390
        buttons = phone.script(
            "const b = document.querySelector('#refresh-quota').getBoundingClientRect(); return [b.left >= 0, b.right <= innerWidth]"
        )
        assert buttons == [True, True]
        assert phone.console_errors() == []


@pytest.mark.parametrize("width", [360, 768, 2560])
def test_page_never_scrolls_sideways(page, site, width):
    fill(site)
    shown = page()
    shown.resize(width, 900)
    shown.wait_until(f"innerWidth === {width}")
    assert shown.script("return document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("name", ["today", "1h", "5h", "24h", "7d"])
def test_each_range_shows_its_own_number(page, site, name):
    fill(site)
    shown = page("")
    shown.select("#range", name)
    shown.wait_until(f"location.search.includes('range={name}') || '{name}' === 'today'")
    midnight = int(shown.script("const d = new Date(); d.setHours(0, 0, 0, 0); return d / 1000"))
    query = f"range=today&start={midnight}" if name == "today" else f"range={name}"
    expected = site.json(f"/api/summary?{query}")["summary"]["requests"]
    shown.wait_until(f"document.querySelector('#kpi-requests').dataset.value === '{expected}'")


def test_refresh_quota_locks_with_a_countdown_that_a_reload_keeps(page, site, tmp_path, chatgpt, monkeypatch):
    for key, text in chatgpt.environment.items():
        monkeypatch.setenv(key, text)
    (tmp_path / "accounts").mkdir()
    content = {"type": "codex", "email": "an@example.com", "account_id": "acc-1", "access_token": "tok-1"}
    (tmp_path / "accounts" / "a.json").write_text(json.dumps(content))
    chatgpt.answer(
        "tok-1",
        body={
            "plan_type": "plus",
            "rate_limit": {
                "allowed": True,
                "limit_reached": False,
                "primary_window": {"used_percent": 58, "limit_window_seconds": 18000, "reset_after_seconds": 3600},
            },
        },
    )
    fill(site)
    shown = page()
    shown.click("#refresh-quota")
    shown.wait_until("document.querySelector('#accounts').innerText.includes('42%')")
    shown.wait_until("/\\d:\\d\\d/.test(document.querySelector('#refresh-quota').textContent)")
    assert len(chatgpt.requests) == 1
    page(fresh=False)
    shown.wait_until("/\\d:\\d\\d/.test(document.querySelector('#refresh-quota').textContent)")
    assert shown.script(
        "const b = document.querySelector('#refresh-quota'); return b.disabled || b.getAttribute('aria-disabled') === 'true'"
    )


def test_demo_says_it_is_made_up_and_a_server_that_goes_away_leaves_its_numbers(browser, program):
    port = free_port()
    running = program.start("demo", "--no-browser", "--host", "127.0.0.1", "--port", str(port))
    running.wait_for_line("Demo with made-up data")
    browser.goto(f"http://127.0.0.1:{port}/?range=7d")
    browser.wait_until(
        "!document.querySelector('#demo-banner').hidden && document.querySelector('#demo-banner').innerText.length > 10"
    )
    browser.wait_until("Number(document.querySelector('#kpi-requests').dataset.value) > 3000")
    running.kill()
    browser.click("#refresh")
    browser.wait_until("!document.querySelector('#error').hidden || !document.querySelector('#stale').hidden")
    assert value(browser, "requests") > 3000


def test_first_run_no_requests_and_no_match_are_told_apart_each_with_a_way_out(show, site, between):
    site.status.update(state="wrong_password", message=app.STATE_REMEDIES["wrong_password"], publishing=None)
    between.changes["/api/health"] = lambda body: body.update(account_files={"found": 0})
    shown = show(between)
    shown.wait_until("document.querySelector('#empty').dataset.kind === 'first'")
    steps = shown.script(
        "return [...document.querySelectorAll('#empty li')].map(li => [li.firstChild.textContent, li.innerText])"
    )
    assert [mark for mark, _ in steps] == ["✓", "✕", "·", "✕"]
    assert "Proxy reachable" in steps[0][1] and "done" in shown.script(
        "return document.querySelector('#empty li').textContent"
    )
    assert "management_password" in steps[1][1] and "not known yet" in steps[2][1] and "into auth_dir." in steps[3][1]
    assert shown.script("return document.querySelector('#remedy').hidden")  # it stands in the list

    site.status.update(state="waiting", publishing=True)
    put(site.store, event(at=site.now - 30 * HOUR))
    shown.click("#refresh")
    shown.wait_until("document.querySelector('#empty').dataset.kind === 'range'")
    assert "No requests in this range" in shown.text("#empty")

    show(between, "?range=24h&model=no-such-model")
    shown.wait_until("document.querySelector('#empty').dataset.kind === 'filter'")
    assert "No request matches" in shown.text("#empty")
    shown.click("#empty button")
    shown.wait_until("document.querySelector('#empty').dataset.kind === 'range'")


def test_window_alone_without_requests_is_an_empty_range_and_an_unknown_status_no_filter(page, site):
    fill(site)
    start = int(site.now - 300 * HOUR)
    shown = page(f"?range=7d&start={start}&end={start + HOUR}&status=blah")
    assert shown.script("return document.querySelector('#empty').dataset.kind") == "range"
    shown.wait_until("document.querySelector('#requests-note').textContent === 'No requests in this range.'")
    assert len(shown.script("return [...document.querySelectorAll('.chip')]")) == 1


def test_wrong_password_state_is_told_with_its_remedy(page, site):
    site.status.update(state="wrong_password", message=app.STATE_REMEDIES["wrong_password"], publishing=None)
    shown = page()
    shown.wait_until("document.body.innerText.includes('management_password')")
    assert "Recording" not in shown.text("#status")


def test_chart_is_read_out_by_the_keyboard(page, site):
    fill(site)
    shown = page()
    shown.wait_until("window.__page.geometry().length > 0")
    before = shown.text("#chart-readout")
    shown.script("document.querySelector('#chart').focus()")
    shown.press("End")
    shown.wait_until("document.querySelector('#chart-readout').textContent !== " + json.dumps(before))


def test_names_are_masked_but_stay_distinguishable(page, site):
    fill(site)
    shown = page()
    shown.click("#privacy")
    shown.wait_until("!document.querySelector('#accounts').innerText.includes('an@example.com')")
    names = shown.script("return [...document.querySelectorAll('#accounts tbody tr')].map(r => r.cells[0].innerText)")
    assert len(set(names)) == len(names) >= 4
    shown.click("#privacy")


# ---- what the dashboard says about quota ----------------------------------------------------------------------


def test_countdown_pace_and_source_of_a_reading_are_told(show, site, between):
    fill(site)
    between.changes["/api/quota"] = lambda body: body["quotas"][0].update(source="traffic")
    shown = show(between)
    row = "document.querySelector('#accounts tr[data-email=\"an@example.com\"]')"
    # 62 % are left two hours before a 5-hour reset: an even pace would have left 40 %.
    assert "62% left. An even pace would leave" in shown.script(f"return {row}.querySelector('.l5 .win').title")
    assert re.search(r"62%\s1h 5\dm|62%\s2h", shown.script(f"return {row}.querySelector('.l5').innerText"))
    tick = shown.script(f"return parseFloat({row}.querySelector('.l5 .meter b').style.left)")
    assert tick == pytest.approx(40, abs=1)
    assert re.search(r"Read \dm ago, from a request", shown.script(f"return {row}.querySelector('.age').title"))
    other = shown.script("return document.querySelector('#accounts tr[data-email=\"b@example.com\"] .age').textContent")
    assert re.search(r"^↻ \dmRead \dm ago, by a refresh$", other)
    shown.resize(390, 800)
    shown.wait_until("innerWidth === 390")
    assert re.search(r"Active · ⇄ \dm", cell_texts(shown, "an@example.com"))


def test_window_whose_reset_has_passed_is_due_in_words_and_without_a_percentage(show, site, between):
    fill(site)

    def passed(body):
        row = next(row for row in body["quotas"] if row["email"] == "an@example.com")
        row.update(state="reset_due", primary_remaining_percent=None, primary_used_percent=None)
        row["windows"][0].update(due=True, remaining_percent=None, used_percent=None, reset_at=None)

    between.changes["/api/quota"] = passed
    shown = show(between)
    text = cell_texts(shown, "an@example.com")
    assert "reset due" in text and "Reset due" in text and "62%" not in text and "5%" in text
    shown.click("#lang-vi")
    shown.wait_until("document.querySelector('#accounts').innerText.includes('đến giờ đặt lại')")


def test_forecasts_are_told_only_where_there_are_any(show, site, between):
    fill(site)
    assert "pace" not in cell_texts(show(between), "an@example.com")

    def add(body):
        row = next(row for row in body["quotas"] if row["email"] == "an@example.com")
        row["windows"][0]["forecast"] = {"used_per_hour": 50, "runs_out_at": app.utc_text(site.now + 2900)}
        row["windows"][1]["forecast"] = {"used_per_hour": 0.1, "runs_out_at": None}
        reset = app.utc_text(site.now + 3 * HOUR)
        body["pool"] = [
            {"label": "5h", "accounts": 2, "remaining_percent": 41, "next_reset_at": reset,
             "forecast": {"runs_out_at": app.utc_text(site.now + HOUR), "until": reset}},
            {"label": "7d", "accounts": 3, "remaining_percent": 54.7, "next_reset_at": reset, "forecast": None},
            {"label": "30d", "accounts": 1, "remaining_percent": 88, "next_reset_at": reset, "forecast": None},
            {"label": "9h", "accounts": 2, "remaining_percent": 70, "next_reset_at": reset,
             "forecast": {"runs_out_at": None, "until": reset}},
        ]  # fmt: skip

    between.changes["/api/quota"] = add
    shown = show(between)
    assert "empty in 48m at this pace" in cell_texts(shown, "an@example.com")
    assert "empty in" not in cell_texts(shown, "b@example.com")
    titles = shown.script(
        "return [...document.querySelectorAll('#accounts tr[data-email=\"an@example.com\"] .win')].map(w => w.title)"
    )
    assert "At the pace of the last hour it is empty" in titles[0] and "lasts until the reset" in titles[1]
    clock = "new Intl.DateTimeFormat('en-GB', {hour: '2-digit', minute: '2-digit'}).format(arguments[0] * 1000)"
    note = shown.text("#accounts-note")
    dry, lasts = (shown.script(f"return {clock}", site.now + hours * HOUR) for hours in (1, 3))
    assert re.search(rf"5h 41% left \(runs dry (\w+ )?{dry}\)", note)
    assert "7d 54% left9h" in note.replace(" · ", "")  # without a forecast nothing is said
    assert "30d" not in note  # one account is no pool
    assert re.search(rf"9h 70% left \(lasts to (\w+ )?{lasts}\)", note)


def test_windows_of_other_lengths_and_meters_stand_beneath_under_their_own_names(show, site, between):
    fill(site)

    def add(body):
        rows = {row["email"]: row for row in body["quotas"]}
        reset = app.utc_text(site.now + 50 * HOUR)
        window = {"seconds": None, "used_percent": 23, "remaining_percent": 77, "reset_at": reset, "meter": None}
        rows["weekly@example.com"].update(windows=[{**window, "label": "30d", "seconds": 30 * 24 * HOUR}])
        rows["an@example.com"]["windows"] += [
            {**window, "label": "9h"},
            {**window, "label": "5h", "remaining_percent": 33, "meter": "spark"},
        ]

    between.changes["/api/quota"] = add
    shown = show(between)
    row = "[...document.querySelectorAll('#accounts tr')].find(r => r.dataset.email === arguments[0])"
    monthly = shown.script(
        f"const r = {row}; return [r.querySelector('.l5').innerText, r.querySelector('.l7').innerText, r.querySelector('.more').innerText]",
        "weekly@example.com",
    )
    assert monthly[:2] == ["—", "—"] and re.search(r"^30d window\s+77%\s+2d\s+\w+ \d\d:\d\d$", monthly[2])
    places = shown.script(
        f"const r = {row}; return ['.more .tag', '.more .meter', '.st', '.more .at', '.rst'].map((s) => r.querySelector(s).getBoundingClientRect()).map((b) => [b.left, b.right])",
        "weekly@example.com",
    )
    (_, name_end), (bar, bar_end), (status, _), (reset, _), (resets, _) = places
    assert name_end <= bar < bar_end < status and reset == pytest.approx(resets, abs=1)
    more = shown.script(f"return {row}.querySelector('.more').innerText", "an@example.com")
    assert re.search(r"9h window\s+77%.*spark\s+33%", more, re.S)
    assert "62%" in shown.script(f"return {row}.querySelector('.l5').innerText", "an@example.com")


def test_failures_stand_in_words_beside_the_last_good_value_and_its_age(show, site, between):
    fill(site)

    def fail(body):
        for row in body["quotas"]:
            if row["email"] == "an@example.com":
                row.update(
                    state="rate_limited",
                    message="said in English",
                    ts_epoch=site.now - 3 * HOUR,
                    retry_at=app.utc_text(site.now + 900),
                )
            if row["email"] == "weekly@example.com":
                row.update(state="disabled", message="said in English")

    between.changes["/api/quota"] = fail
    shown = show(between)
    failed = cell_texts(shown, "an@example.com")
    assert "Backing off" in failed and "62%" in failed and "last good reading 3h ago" in failed
    assert re.search(r"asked again from \d\d:\d\d on", failed)
    assert "Switched off" in cell_texts(shown, "weekly@example.com")
    assert "0 of 3 with quota left" in shown.text("#accounts-note")  # who is switched off does not count
    shown.click("#lang-vi")
    shown.wait_until("document.querySelector('#accounts').innerText.includes('số liệu tốt gần nhất 3 giờ trước')")
    assert "said in English" not in shown.script("return document.documentElement.outerHTML")


def test_every_quota_state_is_told_with_what_to_do_in_both_languages(page, site):
    states = sorted(set(app.QUOTA_MESSAGES) - {"disabled"})
    for state in states:
        site.store.save_quota_state(f"{state}@example.com", f"#{state}", "plus", state, "said in English", site.now)
    shown = page()
    words = dictionary()
    for lang in (0, 1):
        shown.click(("#lang-en", "#lang-vi")[lang])
        shown.wait_until(f"document.documentElement.lang === '{('en', 'vi')[lang]}'")
        for state in states:
            row = cell_texts(shown, f"{state}@example.com")
            assert words[f"quota.state.{state}"][lang] in row
            assert ("Said in English", words[f"quota.fix.{state}"][1])[lang] in row
            assert ("in English" in row) is (lang == 0)


def test_account_without_windows_is_neither_active_nor_counted(page, site):
    fill(site)
    site.store.save_reading(reading(email="none@example.com", account_id_tag="#none", state="no_windows", ts_epoch=site.now))
    shown = page()
    text = cell_texts(shown, "none@example.com")
    assert "⚪ No quota window" in text and "Active" not in text
    assert "2 of 4 with quota left" in shown.text("#accounts-note")
    assert shown.script(
        "return document.querySelector('#accounts tr[data-email=\"weekly@example.com\"] .rst').firstChild.textContent"
    ) == "—"


def test_every_fault_of_the_collector_is_told_with_its_remedy_in_both_languages(page, site):
    fill(site)
    site.status.update(until=site.now + 600, publishing=None, retention_seconds=60)
    shown = page()
    words = dictionary()
    for state in sorted(set(app.STATE_REMEDIES) - {"starting", "recording", "waiting"}):
        site.status.update(state=state, message=f"the proxy: {state} in English")
        shown.click("#refresh")
        shown.wait_until(f"document.querySelector('#status').dataset.state === '{state}'")
        for lang in (0, 1):
            shown.click(("#lang-en", "#lang-vi")[lang])
            shown.wait_until(f"document.documentElement.lang === '{('en', 'vi')[lang]}'")
            assert words[f"state.{state}"][lang] in shown.text("#status")
            told = shown.text("#remedy")
            remedy = (f"The proxy: {state} in English.", words[f"remedy.{state}"][1])[lang]
            assert all(part in told for part in re.split(r"{\w+}", remedy)) and "{" not in told
            forgets = words["forgets"][lang].replace("{t}", ("1m", "1 phút")[lang])
            assert (forgets in told) is (state != "publishing_off")  # then it records none
            assert ("in English" in shown.script("return document.body.innerText")) is (lang == 0)


def test_proxy_that_forgets_too_soon_is_warned_of_while_recording_goes_on(page, site):
    fill(site)
    site.status.update(warning="retention_short", retention_seconds=10)
    shown = page()
    shown.wait_until("!document.querySelector('#remedy').hidden")
    assert "forgets after 10s" in shown.text("#remedy") and "Recording" in shown.text("#status")
    assert "fail" not in shown.script("return document.querySelector('#remedy').className")
    shown.click("#lang-vi")
    shown.wait_until("document.querySelector('#remedy').textContent.includes('quên sau 10 giây')")


def test_state_of_a_newer_program_is_told_in_its_own_words(page, site):
    site.status.update(state="brand_new", message="Feed the hamster.")
    fill(site)
    shown = page()
    shown.wait_until("document.querySelector('#status-text').textContent.startsWith('State unknown')")
    assert shown.text("#remedy") == "Feed the hamster."


# ---- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code, status, key", [
    ("internal_error", 500, "why.internal_error"), ("foreign_site", 403, "why.foreign_site"),
    ("password_needed", 401, "why.password_needed"), ("bad_start", 400, "why.bad"), ("of_a_newer_version", 418, "why.http"),
])  # fmt: skip
def test_refusals_are_told_in_the_page_s_own_words(show, site, between, code, status, key):
    fill(site)
    shown = show(between)
    show.faults_expected = True
    between.faults["/api/summary"] = lambda handler: handler.refuse(status, code)
    shown.click("#refresh")
    shown.wait_until("!document.querySelector('#stale').hidden")
    for lang in (0, 1):
        shown.click(("#lang-en", "#lang-vi")[lang])
        expected = dictionary()[key][lang].replace("{v}", str(status))
        shown.wait_until(f"document.querySelector('#stale').textContent.includes({json.dumps(expected)})")
        assert "said in English" not in shown.text("#stale")
    assert value(shown, "requests") == 3


def test_server_cut_in_mid_answer_leaves_the_numbers_greyed_until_it_is_back(show, site, between):
    fill(site)
    shown = show(between)
    show.faults_expected = True

    def cut(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(b'{"summary": {"requests": 9')
        handler.close_connection = True

    between.faults["/api/summary"] = cut
    shown.click("#refresh")
    shown.wait_until("!document.querySelector('#stale').hidden")
    assert "Usage could not be loaded" in shown.text("#stale")
    assert value(shown, "requests") == 3
    assert shown.script("return getComputedStyle(document.querySelector('#kpis')).filter") == "grayscale(1)"
    del between.faults["/api/summary"]
    shown.click("#refresh")
    shown.wait_until("document.querySelector('#stale').hidden")
    assert shown.script("return getComputedStyle(document.querySelector('#kpis')).filter") == "none"


def test_range_that_cannot_be_loaded_leaves_the_old_numbers_under_their_own_range(show, site, between):
    fill(site)
    shown = show(between, "?range=all")
    show.faults_expected = True
    between.faults["/api/summary"] = lambda handler: handler.refuse(500, "internal_error")
    shown.select("#range", "24h")
    shown.wait_until("!document.querySelector('#stale').hidden")
    assert "(All time)" in shown.text("#stale")
    shown.click("#lang-vi")  # draws everything anew
    shown.click("#lang-en")
    assert shown.text("#chart-readout").startswith("All time · 98.3k tokens")
    del between.faults["/api/summary"]
    shown.click("#refresh")
    shown.wait_until("document.querySelector('#chart-readout').textContent.startsWith('Last 24 hours · 98.3k tokens')")


def test_first_load_that_fails_says_so_and_recovers(show, site, between):
    fill(site)
    show.faults_expected = True
    between.faults["/api/summary"] = lambda handler: handler.reply(200, b"<html>a proxy's own page</html>")
    shown = show(between, ready=False)
    shown.wait_until("document.querySelector('#error').textContent.includes('the answer was not understood')")
    assert shown.text("#kpi-requests") == "—"
    del between.faults["/api/summary"]
    shown.click("#refresh")
    shown.wait_until(
        "document.querySelector('#error').hidden && document.querySelector('#kpi-requests').textContent === '3'"
    )


def test_refresh_of_quota_that_runs_elsewhere_is_followed(show, site, between):
    fill(site)
    running = {"refreshing": False, "progress": {"done": 2, "total": 5}}
    between.changes["/api/quota"] = lambda body: body.update(running)
    shown = show(between)
    show.faults_expected = True
    running["refreshing"] = True
    between.faults["/api/quota?force=1"] = lambda handler: handler.refuse(409, "refresh_running")
    shown.click("#refresh-quota")
    shown.wait_until("document.querySelector('#refresh-quota').textContent === 'Reading 2 of 5'")
    assert shown.script(
        "return document.querySelector('#refresh-quota').disabled && document.querySelector('#error').hidden"
    )
    running.update(refreshing=False, cooldown_seconds=120)
    shown.wait_until(
        "/^Refresh Quota · [12]:\\\\d\\\\d$/.test(document.querySelector('#refresh-quota').textContent)".replace(
            "\\\\", "\\"
        )
    )


def test_refresh_of_quota_inside_the_cool_down_tells_when_it_opens(show, site, between):
    fill(site)
    shown = show(between)
    show.faults_expected = True
    between.faults["/api/quota?force=1"] = lambda handler: handler.refuse(429, "cooldown", Retry_After="200")
    shown.click("#refresh-quota")
    shown.wait_until("!document.querySelector('#error').hidden")
    assert re.search(r"the button opens at \d\d:\d\d", shown.text("#error"))
    assert re.search(r"^Refresh Quota · 3:[0-2]\d$", shown.text("#refresh-quota"))
    assert shown.script("return document.querySelector('#refresh-quota').disabled")


def test_refresh_of_quota_that_fails_says_why_and_keeps_what_was_read(show, site, between):
    fill(site)
    shown = show(between)
    show.faults_expected = True
    between.faults["/api/quota?force=1"] = lambda handler: handler.refuse(403, "foreign_site")
    shown.click("#refresh-quota")
    shown.wait_until("!document.querySelector('#error').hidden")
    assert shown.text("#error").startswith("Quota was not refreshed: it takes this from its own page only")
    shown.click("#lang-vi")
    shown.wait_until(
        "document.querySelector('#error').textContent.startsWith('Chưa làm mới được quota: lệnh này chỉ nhận')"
    )
    assert "62%" in cell_texts(shown, "an@example.com")
    assert not shown.script("return document.querySelector('#refresh-quota').disabled")


# ---- the chart --------------------------------------------------------------------------------------------------


def test_outages_that_lost_requests_look_and_read_otherwise_than_kept_ones(show, site, between):
    fill(site)
    hour = int(site.now) // HOUR * HOUR
    between.changes["/api/summary"] = lambda body: body.update(outages=[
        {"from": hour - 20 * HOUR, "to": hour - 19 * HOUR, "reason": "stopped", "lost": True},
        {"from": hour - 10 * HOUR, "to": hour - 9 * HOUR, "reason": "unreachable", "lost": False},
        {"from": hour - 6 * HOUR, "to": hour - 5 * HOUR, "reason": "unreachable"},
    ])  # fmt: skip
    shown = show(between)
    lines = """
      const c = document.querySelector('#chart').getContext('2d'), g = window.__page.picture();
      return g.outages.map((o) => {
        const d = c.getImageData(o.x, g.plot.y + 12, o.w, 1).data;   // one row of pixels, between two lines of the grid
        let lines = 0, red = 0;
        for (let i = 4; i < d.length; i += 4) { if (d[i + 3] > 24 && d[i - 1] <= 24) lines += 1; if (d[i + 3] > 24 && d[i] > d[i + 1] + 40) red += 1; }
        return [lines, red > 0]; });"""
    lost, kept, unknown = shown.script(lines)
    assert lost[0] == unknown[0] > kept[0] >= 3
    assert [lost[1], kept[1], unknown[1]] == [True, False, False]
    words = dictionary()
    for back, told in ((20, "chart.lost"), (10, "chart.kept"), (6, None)):
        index = shown.script(
            "return window.__page.picture().buckets.findIndex(b => b.start === arguments[0])", hour - back * HOUR
        )
        x, y = shown.script(
            "const g = window.__page.picture(); return [g.plot.x + (arguments[0] + .5) * g.slot, g.plot.y + 20]", index
        )
        shown.move_to("#chart", x, y)
        shown.wait_until("document.querySelector('#chart-readout').textContent.includes('not recording')")
        shown.wait_until(f"document.querySelector('#chart').getAttribute('aria-valuenow') === '{index}'")
        text = shown.text("#chart-readout")
        assert [key for key in ("chart.lost", "chart.kept") if words[key][0] in text] == ([told] if told else [])


def moments(*texts):
    return [app.parse_time(text)[0] for text in texts]


@pytest.mark.parametrize("start, end, days, expected", [
    # Berlin, autumn: 26 October 2025 has 25 hours, and October as seen from winter lies in summer time.
    ("2025-10-20T00:00:00+02:00", "2025-11-02T00:00:00+01:00", 13,
     {"2025-10-25T23:30:00+02:00": 5, "2025-10-26T00:30:00+02:00": 6, "2025-10-26T23:30:00+01:00": 6, "2025-10-27T00:30:00+01:00": 7}),
    # Spring: 30 March 2025 has 23 hours.
    ("2025-03-24T00:00:00+01:00", "2025-04-06T00:00:00+02:00", 13,
     {"2025-03-29T23:30:00+01:00": 5, "2025-03-30T00:30:00+01:00": 6, "2025-03-30T23:30:00+02:00": 6, "2025-03-31T00:30:00+02:00": 7}),
    # Wholly in the other half of the year than most of the days on which this test runs.
    ("2025-07-01T00:00:00+02:00", "2025-07-14T00:00:00+02:00", 13,
     {"2025-07-02T00:30:00+02:00": 1, "2025-07-02T23:30:00+02:00": 1, "2025-07-03T00:10:00+02:00": 2}),
    ("2025-01-01T00:00:00+01:00", "2025-01-14T00:00:00+01:00", 13,
     {"2025-01-02T00:30:00+01:00": 1, "2025-01-02T23:30:00+01:00": 1, "2025-01-03T00:10:00+01:00": 2}),
])  # fmt: skip
def test_days_begin_at_local_midnight_also_over_a_change_of_the_clocks(page, site, browser, start, end, days, expected):
    put(site.store, *[event(at=at) for at in moments(*expected)])
    first, last = moments(start, end)
    browser.cdp("Emulation.setTimezoneOverride", timezoneId="Europe/Berlin")
    try:
        shown = page(f"?range=7d&start={first:.0f}&end={last:.0f}")
        buckets = shown.script("""return window.__page.picture().buckets.map((b) => {
          const d = new Date(b.start * 1000); return [d.getHours() * 60 + d.getMinutes(), b.requests, b.start, b.end]; })""")
    finally:
        browser.cdp("Emulation.setTimezoneOverride", timezoneId="")
    assert [minutes for minutes, *_ in buckets] == [0] * days
    counted = [0] * days
    for day in expected.values():
        counted[day] += 1
    assert [requests for _, requests, *_ in buckets] == counted
    assert [buckets[i][3] for i in range(days - 1)] == [bucket[2] for bucket in buckets[1:]]


def test_days_begin_at_local_midnight_also_where_only_the_middle_has_another_time(page, site, browser):
    put(site.store, *[event(at=at) for at in moments("2025-01-02T12:00:00-05:00", "2025-07-02T12:00:00-04:00")])
    first, last = moments("2025-01-01T00:00:00-05:00", "2025-12-01T00:00:00-05:00")
    summer, winter = moments("2025-07-01T00:00:00-04:00", "2025-12-15T00:00:00-05:00")
    watch = browser.new_document_script(f"Date.now = () => {winter * 1000:.0f}")
    browser.cdp("Emulation.setTimezoneOverride", timezoneId="America/New_York")
    try:
        shown = page(f"?range=all&start={first:.0f}&end={last:.0f}")
        buckets = shown.script("return window.__page.picture().buckets.map(b => [new Date(b.start * 1000).getHours(), b.start])")
    finally:
        browser.cdp("Emulation.setTimezoneOverride", timezoneId="")
        browser.remove_document_script(watch)
    assert {hour for hour, _ in buckets} == {0} and len(buckets) > 100
    assert buckets[0][1] == first and any(abs(start - summer) <= 2 * 24 * HOUR for _, start in buckets)


def test_today_is_told_by_the_hour_from_its_first_minute_on(show, site, between):
    fill(site)
    shown = show(between, "?range=today")
    assert all("bucket=" not in path for path in between.asked if path.startswith("/api/summary"))
    assert {b["seconds"] for b in shown.script("return window.__page.picture().buckets")} == {3600}


def test_hours_of_a_week_are_cut_by_the_wall_clock_over_a_change_of_the_clocks(page, site, browser):
    put(site.store, *[event(at=at) for at in moments("2025-10-24T05:59:00+02:00", "2025-10-28T06:00:00+01:00")])
    first, last = moments("2025-10-22T00:00:00+02:00", "2025-10-29T00:00:00+01:00")
    browser.resize(2560, 1000)
    browser.cdp("Emulation.setTimezoneOverride", timezoneId="Europe/Berlin")
    try:
        shown = page(f"?range=7d&start={first:.0f}&end={last:.0f}")
        hours, used, whole = (
            shown.script("""const b = window.__page.picture().buckets, hour = (at) => new Date(at * 1000).getHours();
          return [b.map((x) => hour(x.start)), b.filter((x) => x.requests).map((x) => hour(x.start)), b.slice(1).every((x, i) => x.start === b[i].end)]""")
        )
        marked = shown.script(
            "const g = window.__page.picture(); return g.xTicks.map((t) => new Date(g.buckets[t.i].start * 1000).getHours())"
        )
    finally:
        browser.cdp("Emulation.setTimezoneOverride", timezoneId="")
    assert hours == list(range(0, 24, 3)) * 7 and whole
    assert used == [3, 6]
    assert marked == [0, 12] * 7


def test_legend_isolates_a_kind_and_rescales(page, site):
    fill(site)
    shown = page()
    highest = "Math.max(...window.__page.geometry().filter(b => b.kind === arguments[0]).map(b => b.h))"
    before, plot = shown.script(f"return [{highest}, window.__page.picture().plot.h]", "reasoning")
    shown.click("#legend [data-kind=reasoning]")
    shown.wait_until(
        "window.__page.geometry().length > 0 && window.__page.geometry().every(b => ['reasoning', 'failed'].includes(b.kind))"
    )
    after = shown.script(f"return {highest}", "reasoning")
    assert before < plot / 10 and after > plot * 0.6
    assert "Reasoning tokens" in shown.text("#chart-title")
    shown.click("#legend [data-kind=reasoning]")
    shown.wait_until("new Set(window.__page.geometry().map(b => b.kind)).size === 5")


def bar_place(browser, kind="cached"):
    """Give the middle of the highest bar of a kind, in pixels of the canvas, with its bucket."""
    return browser.script(
        "const b = window.__page.geometry().filter(b => b.kind === arguments[0]).sort((p, q) => q.h - p.h)[0];"
        "return [b.x + b.w / 2, b.y + Math.min(b.h / 2, 20), b.index]", kind)  # fmt: skip


def test_click_on_a_bar_narrows_everything_to_it_and_back_undoes_it(page, site):
    fill(site)
    shown = page()
    x, y, index = bar_place(shown)
    start, end, requests, total = shown.script(
        "const b = window.__page.picture().buckets[arguments[0]]; return [b.start, b.end, b.requests, b.total_tokens]",
        index,
    )
    shown.move_to("#chart", x, y)
    shown.wait_until(f"document.querySelector('#chart-readout').dataset.total === '{total}'")
    assert 0 < requests < 3
    shown.press_mouse()
    shown.wait_until(f"document.querySelector('#kpi-requests').dataset.value === '{requests}'")
    assert shown.script("return location.search").endswith(f"start={start}&end={end}")
    shown.wait_until(f"document.querySelectorAll('#requests tr[data-id]').length === {requests}")
    assert shown.script("return document.querySelectorAll('#filters .chip').length") == 1
    shown.script("history.back()")
    shown.wait_until("document.querySelector('#kpi-requests').dataset.value === '3'")
    assert shown.script("return document.querySelector('#filters').hidden")


def test_finger_reads_a_bar_first_and_narrows_with_the_second_tap(page, site):
    fill(site)
    shown = page()
    x, y, _ = bar_place(shown)
    shown.tap("#chart", x, y)
    shown.wait_until("document.querySelector('#chart-readout').textContent.includes('–')")
    assert "start=" not in shown.script("return location.search")
    shown.tap("#chart", x, y)
    shown.wait_until("location.search.includes('start=')")


def test_models_accounts_and_chips_filter_everything(page, site):
    fill(site)
    shown = page()
    shown.click("#models li[data-model='gpt-5.5'] button")
    shown.wait_until("document.querySelector('#kpi-requests').dataset.value === '1'")
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 1")
    shown.click("#filters .chip")
    shown.wait_until("document.querySelector('#kpi-requests').dataset.value === '3'")
    shown.click("#accounts tr[data-account='b@example.com'] .link")
    shown.wait_until("document.querySelector('#kpi-requests').dataset.value === '2'")
    shown.wait_until("document.querySelectorAll('#accounts tbody tr').length === 1")
    page("?range=24h&account=b%40example.com", fresh=False)  # a bookmark
    assert value(shown, "requests") == 2 and "b@example.com" in shown.text("#filters")


def test_models_under_the_failed_filter_are_told_by_their_failures(page, site):
    fill(site)
    put(site.store, *[event(at=site.now - 60 - n, model="gpt-5.5", failed=1, input_tokens=0, cached_tokens=0, output_tokens=0,
                            reasoning_tokens=0, total_tokens=0) for n in range(3)])  # fmt: skip
    shown = page("?range=24h&status=failed")
    told = shown.script("""return [...document.querySelectorAll('#models li')].map((li) => {
      const [, n, share] = li.firstChild.children, bar = li.querySelector('.stack'), parts = [...bar.children].filter((i) => !i.hidden);
      return [li.dataset.model, n.textContent, share.textContent, bar.style.width, parts.map((i) => i.className)]; })""")
    assert shown.text("#models-title") == "Failures by model"
    assert sorted(told) == [
        ["gpt-5.4", "1", "25%", f"{100 / 3:.4f}%", ["k-failed"]],
        ["gpt-5.5", "3", "75%", "100%", ["k-failed"]],
    ]


# ---- the list of requests ---------------------------------------------------------------------------------------


def many(site, count):
    put(
        site.store,
        *[
            event(at=site.now - 30 - 10 * n, input_tokens=1000 + n, total_tokens=1020 + n, request_id=f"r{n}")
            for n in range(count)
        ],
    )


def first_cells(browser, column):
    return browser.script(
        "return [...document.querySelectorAll('#requests tr[data-id]')].map(r => r.cells[arguments[0]].textContent)",
        column,
    )


def test_rows_load_as_one_scrolls_until_there_are_no_more(page, site):
    many(site, 350)
    shown = page()
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length >= 100")
    for _ in range(6):
        count = shown.script(
            "const s = document.querySelector('#scroll'); s.scrollTop = s.scrollHeight; return document.querySelectorAll('#requests tr[data-id]').length"
        )
        if count == 350:
            break
        shown.wait_until(f"document.querySelectorAll('#requests tr[data-id]').length > {count}")
    ids = shown.script("return [...document.querySelectorAll('#requests tr[data-id]')].map(r => Number(r.dataset.id))")
    assert len(ids) == len(set(ids)) == 350
    assert "That is all" in shown.text("#more")


def test_older_rows_that_fail_after_a_refresh_are_asked_for_again(show, site, between):
    many(site, 350)
    held, waiting = threading.Event(), threading.Event()

    def hold(handler):
        if "before=" in handler.path and not held.is_set():
            waiting.set()
            held.wait(20)
            return handler.refuse(500, "internal_error")
        answer, body = site.ask(handler.path)
        handler.reply(answer.status, body)

    between.faults["/api/requests"] = hold
    shown = show(between)
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 100")
    shown.script("const s = document.querySelector('#scroll'); s.scrollTop = s.scrollHeight")
    assert waiting.wait(10)
    put(site.store, event(at=site.now - 5, request_id="new"))
    site.now += 1  # another answer than before
    shown.click("#refresh")
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 101")
    show.faults_expected = True
    held.set()
    shown.wait_until("!document.querySelector('#stale').hidden")
    shown.click("#refresh")
    for count in (201, 301, 351):
        shown.wait_until(f"document.querySelectorAll('#requests tr[data-id]').length >= {count}")
        shown.script("const s = document.querySelector('#scroll'); s.scrollTop = s.scrollHeight")
    assert "That is all" in shown.text("#more")


def test_rows_are_sorted_by_a_click_on_the_head_both_ways(page, site):
    many(site, 30)
    shown = page()
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 30")
    shown.click("#requests-head [data-sort=total]")
    down = [int(text.replace(",", "")) for text in first_cells(shown, 3)]
    assert down == sorted(down, reverse=True) and len(set(down)) == 30
    assert shown.script("return document.activeElement.dataset.sort") == "total"
    shown.click("#requests-head [data-sort=total]")
    assert [int(text.replace(",", "")) for text in first_cells(shown, 3)] == down[::-1]
    heights = shown.script(
        "return [...new Set([...document.querySelectorAll('#requests tr[data-id]')].map(r => r.offsetHeight))]"
    )
    assert all(24 <= height <= 28 for height in heights)


def test_row_opens_to_all_that_is_known_of_the_request(page, site):
    put(site.store, event(at=site.now - 60, latency_ms=5_000, ttft_ms=1_000, output_tokens=200, alias="an-alias", failed=1,
                          status_code=503, error="503 server_error: overloaded", service_tier="priority"))  # fmt: skip
    shown = page()
    shown.wait_until("document.querySelector('#requests tr[data-id]')")
    shown.script("document.querySelector('#requests tr[data-id] button').focus()")
    shown.press("Enter")
    shown.wait_until("document.querySelector('#requests .detail')")
    facts = shown.script(
        "return Object.fromEntries([...document.querySelectorAll('.detail dl > div')].map(d => [d.firstChild.textContent, d.lastChild.textContent]))"
    )
    assert facts["Alias"] == "an-alias" and facts["Endpoint"] == "POST /v1/responses" and facts["Effort"] == "high"
    assert facts["Tier"] == "priority" and facts["First token"] == "1.0s" and facts["Latency"] == "5.0s"
    assert facts["Output speed"] == "50 tokens/s"  # 200 tokens in the four seconds after the first
    assert facts["Reason"] == "503 server_error: overloaded" and facts["Status code"] == "503"
    assert facts["Written to cache"] == "—"
    shown.press("Enter")
    shown.wait_until("!document.querySelector('#requests .detail')")


def test_view_is_copied_as_csv_and_masked_with_the_page(page, site, browser):
    fill(site)
    put(site.store, event(at=site.now - 90, model='=cmd,"x"'))
    browser.cdp("Browser.setPermission", permission={"name": "clipboard-read"}, setting="granted")
    shown = page()
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 4")

    def copied(button):
        shown.click(button)
        shown.wait_until("/copied/.test(document.querySelector('#live').textContent)")
        shown.script("document.querySelector('#live').textContent = ''")
        return list(csv.reader(io.StringIO(shown.script("return navigator.clipboard.readText()"))))

    head, *rows = copied("#copy-csv")
    assert len(rows) == 4 and head[:4] == ["Time", "Account", "Model", "Tokens"]
    newest = dict(zip(head, rows[0]))
    assert newest["Model"] == '\'=cmd,"x"' and newest["Tokens"] == "120" and newest["Status"] == "OK"
    assert {"First token (ms)", "Latency (ms)"} <= set(head)
    assert app.parse_time(newest["Time"])[0] == pytest.approx(site.now - 90, abs=0.01)
    head, *rows = copied("#copy-accounts")
    an = next(dict(zip(head, row)) for row in rows if row[0] == "an@example.com")
    assert an["5h Remaining"] == "62" and an["7d Remaining"] == "5" and an["Plan"] == "plus"
    assert an["Status"] == "Active" and 59 <= int(an["Read (s)"]) <= 120
    shown.click("#privacy")
    for button in ("#copy-csv", "#copy-accounts"):
        assert "@example.com" not in str(copied(button))


# ---- keeping calm -----------------------------------------------------------------------------------------------


def test_refresh_keeps_rows_scroll_selection_and_open_details(page, site):
    many(site, 120)
    shown = page()
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length >= 100")
    shown.script("""
      const rows = [...document.querySelectorAll('#requests tr[data-id]')];
      rows.forEach((r) => { r.kept = true; });
      rows[40].querySelector('button').click();
      document.querySelector('#scroll').scrollTop = 700;
      getSelection().selectAllChildren(rows[42].cells[2]);""")
    put(site.store, event(at=site.now - 5, request_id="new"))
    site.now += 1  # another answer than before
    shown.click("#refresh")
    shown.wait_until("document.querySelector('#kpi-requests').dataset.value === '121'")
    shown.wait_until("document.querySelector('#requests tr[data-id]').kept === undefined")
    kept, scroll, selected, detail = shown.script("""
      const rows = [...document.querySelectorAll('#requests tr[data-id]')];
      return [rows.filter((r) => r.kept).length, document.querySelector('#scroll').scrollTop, String(getSelection()), rows[41].nextSibling.className];""")
    assert kept >= 100 and selected == "gpt-5.4" and detail == "detail"
    assert scroll >= 700


def test_thousands_of_rows_and_hundreds_of_accounts_are_neither_rebuilt_nor_drawn_unseen(show, site, between):
    fill(site)
    newest = [5000]

    def rows(body):
        row = body["requests"][0]
        body["requests"] = [
            {**row, "id": n, "ts_epoch": site.now - 5000 + n} for n in range(newest[0], newest[0] - 5000, -1)
        ]

    def accounts(body):
        row = body["accounts"][0]
        body["accounts"] = [
            {**row, "account": f"n{n}@example.com", "auth_index": f"i{n}", "total_tokens": 1000 - n} for n in range(300)
        ]

    between.changes.update({"/api/requests": rows, "/api/summary": accounts})
    shown = show(between)
    shown.wait_until(
        "document.querySelectorAll('#requests tr[data-id]').length === 5000 && document.querySelectorAll('#accounts-body tr').length >= 300"
    )
    for rows in ("#accounts-body tr", "#requests tr[data-id]"):
        shown.script("document.querySelector(arguments[0]).scrollIntoView()", rows)
        drawn = f"[...document.querySelectorAll('{rows}')].filter((r) => r.cells[0].checkVisibility({{contentVisibilityAuto: true}})).length"
        shown.wait_until(f"{drawn} > 10 && {drawn} < 200")
    shown.script("""
      window.moved = [];
      for (const id of ['requests-body', 'accounts-body'])
        new MutationObserver((list) => { for (const m of list) window.moved.push(...m.addedNodes, ...m.removedNodes); }).observe(document.getElementById(id), {childList: true});
      scrollTo(0, 0);""")
    newest[0] += 1
    shown.click("#refresh")
    shown.wait_until("document.querySelector('#requests tr[data-id]').dataset.id === '5001'")
    assert shown.script("return window.moved.map((row) => row.dataset.id)") == ["5001"]
    assert shown.script("return document.querySelectorAll('#requests tr[data-id]').length") == 5001


def test_masked_page_holds_no_name_and_no_search_anywhere(page, site):
    fill(site)
    shown = page("?range=24h&q=example")
    assert "an@example.com" in shown.script("return document.body.outerHTML")
    shown.click("#privacy")
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 3")
    assert "@example.com" not in shown.script("return document.body.outerHTML")
    assert shown.script("return [document.querySelector('#search').value, document.querySelectorAll('.chip').length]") == ["", 0]


def test_filter_taken_away_leaves_the_focus_on_the_next_one_then_on_the_chart(page, site):
    fill(site)
    shown = page("?range=24h&model=gpt-5.5&status=ok")
    focused = "const e = document.activeElement; return e.id || e.textContent"
    shown.script("document.querySelector('.chip').focus()")
    shown.press("Enter")
    assert shown.script(focused) == "Succeeded only ×"
    shown.press("Enter")
    assert shown.script(focused) == "chart"


def test_address_of_a_masked_page_holds_no_name(page, site):
    fill(site)
    shown = page("?range=24h&account=b%40example.com&q=b%40example.com")
    shown.click("#privacy")
    shown.wait_until("!decodeURIComponent(location.search).includes('@')")
    assert shown.script("return location.search") == "?range=24h"
    assert value(shown, "requests") == 2
    page("?range=24h&account=b%40example.com", fresh=False)  # an address from elsewhere
    assert value(shown, "requests") == 2 and shown.script("return location.search") == "?range=24h"
    assert "@" not in shown.script("return document.body.innerText")
    shown.click("#search")
    shown.press("gpt-5.5")
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 1")
    assert "q=" not in shown.script("return location.search")
    shown.click("#privacy")
    shown.wait_until("decodeURIComponent(location.search).includes('b@example.com')")


@pytest.mark.parametrize("width, height", [(1440, 2000), (1440, 500), (390, 500)])  # with and without a scroll bar
def test_first_load_moves_nothing(page, site, browser, width, height):
    fill(site)
    browser.resize(width, height)
    watch = browser.new_document_script("""
      window.moved = 0;
      new PerformanceObserver((list) => { for (const e of list.getEntries()) window.moved += e.value; }).observe({type: 'layout-shift', buffered: true});""")
    try:
        shown = page()
        shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 3")
        moved = shown.run_async(
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(window.moved)))"
        )
    finally:
        browser.remove_document_script(watch)
    assert moved == 0


def test_hidden_tab_asks_for_nothing_and_catches_up_when_it_is_seen(show, site, between, browser):
    fill(site)
    # The timer of 30 seconds is fired by hand.
    timers = browser.new_document_script("""
      const start = window.setTimeout.bind(window);
      window.setTimeout = (act, delay, ...rest) => delay === 30000 ? (window.fire = act, 0) : start(act, delay, ...rest);""")
    try:
        shown = show(between)
        shown.wait_until(
            "window.fire && document.querySelectorAll('#requests tr[data-id]').length === 3"
        )
        shown.script("""
          window.hidden_since = [];
          document.addEventListener('visibilitychange', () => { if (document.hidden) { window.fire(); window.hidden_since.push(performance.now()); } });""")
        asked = len(between.asked)
        with browser.other_tab():
            browser.goto("about:blank")
            assert len(between.asked) == asked
        shown.wait_until("!document.hidden && window.hidden_since.length === 1")
        shown.wait_until(
            "performance.getEntriesByType('resource').some(e => e.name.includes('/api/summary') && e.startTime > window.hidden_since[0])"
        )
        assert len(between.asked) > asked
    finally:
        browser.remove_document_script(timers)


# ---- for everyone -----------------------------------------------------------------------------------------------


def test_keyboard_alone_reaches_and_operates_everything(page, site):
    fill(site)
    shown = page()
    shown.script("document.activeElement.blur()")
    reached = []
    for _ in range(120):
        shown.press("Tab")
        at = shown.script("""const e = document.activeElement; if (e === document.body) return null;
          const s = getComputedStyle(e); return [e.id || e.dataset.kind || e.dataset.sort || e.className || e.tagName, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2];""")
        if at is None:
            break
        reached.append(at)
    names = [name for name, _ in reached]
    for wanted in ("skip", "range", "refresh-quota", "refresh", "lang-en", "lang-vi", "theme", "cached", "failed", "chart", "privacy",
                   "copy-accounts", "search", "failed-only", "copy-csv", "link", "total"):  # fmt: skip
        assert wanted in names, wanted
    assert all(seen for _, seen in reached), [name for name, seen in reached if not seen]
    shown.script("document.querySelector('#range').focus()")
    shown.press("1", "h")  # as a select is operated
    shown.script("document.querySelector('#theme').focus()")
    shown.press("Enter")
    shown.wait_until("document.documentElement.dataset.theme === 'dark'")
    shown.script("document.querySelector('#chart').focus()")
    shown.press("Home", "End", "ArrowLeft", "ArrowRight", "Enter")
    shown.wait_until("location.search.includes('start=')")
    shown.press("Escape")
    shown.wait_until("!location.search.includes('start=')")
    shown.script("document.querySelector('#models button').focus()")
    shown.press("Space")
    shown.wait_until("location.search.includes('model=')")


def test_table_behind_the_canvas_holds_the_same_numbers(page, site):
    fill(site)
    shown = page()
    rows = shown.script(
        "return [...document.querySelectorAll('#chart-body tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    buckets = shown.script("return window.__page.picture().buckets.map(b => [b.requests, b.total_tokens, b.failed])")
    assert [[int(row[i].replace(",", "")) for i in (1, 2, 8)] for row in rows] == buckets
    assert shown.script("return document.querySelector('#chart').getAttribute('aria-valuetext')").startswith(
        "Last 24 hours, 98.3k tokens"
    )


@pytest.mark.parametrize("width, told", [(1440, "1"), (390, "1 failed")])
def test_failures_of_an_account_are_told_on_every_width(page, site, browser, width, told):
    fill(site)
    browser.resize(width, 900)
    shown = page()
    failed = "return document.querySelector('#accounts tr[data-account=\"{}@example.com\"] .fl').innerText"
    assert shown.script(failed.format("b")) == told
    assert shown.script("return document.querySelector('#accounts tr[data-account=\"an@example.com\"] .fl').offsetParent === null") == (
        width == 390
    )


def test_status_of_an_account_is_not_cut_on_a_tablet(page, site, browser):
    fill(site)
    browser.resize(768, 900)
    shown = page()
    shown.click("#lang-vi")
    shown.wait_until("document.querySelector('#accounts').innerText.includes('Hoạt động · ')")
    cells = shown.script(
        "document.querySelectorAll('#accounts .aged').forEach((e) => { e.textContent = ' · ⇄ 35 phút'; });"
        "return [...document.querySelectorAll('#accounts td.st')].map((e) => [e.scrollWidth, e.clientWidth, e.innerText])"
    )
    assert len(cells) >= 4 and [text for wide, room, text in cells if wide > room] == []


@pytest.mark.parametrize("lang", ["en", "vi"])
def test_no_label_is_cut_on_the_narrowest_phone(show, site, between, browser, lang):
    fill(site)
    browser.resize(360, 800)
    between.changes["/api/quota"] = lambda body: body.update(cooldown_seconds=299)
    shown = show(between)
    shown.click(f"#lang-{lang}")
    shown.wait_until(
        f"document.documentElement.lang === '{lang}' && /\\d:\\d\\d/.test(document.querySelector('#refresh-quota').textContent)"
    )
    shown.script("document.querySelector('#requests tr[data-id] button').click()")
    cut = shown.script("""
      const words = 'h1, h2, button:not(.link, .chip, #models *), dt, dd, .note, .notice, .tag, .left, .st, .rst span, .more, .figure, .sub, #status, #chart-readout, footer span, option:checked';
      return [...document.querySelectorAll(words)].filter((e) => e.offsetParent && !e.closest('.vh'))
        .filter((e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline' || e.getBoundingClientRect().right > innerWidth + .5)
        .map((e) => `${e.className} ${e.textContent}`);""")
    assert cut == []
    wide = shown.script(
        "const s = document.querySelector('#range'), c = document.createElement('canvas').getContext('2d'); c.font = getComputedStyle(s).font; return [s.clientWidth, c.measureText(s.selectedOptions[0].textContent).width]"
    )
    assert wide[0] >= wide[1] + 30  # the arrow and the edges


def test_paper_is_white_whole_and_without_controls(page, site, browser):
    many(site, 60)
    browser.resize(725, 1000)  # A4 within its margins
    browser.emulate(dark=True)
    shown = page()
    shown.wait_until("document.querySelectorAll('#requests tr[data-id]').length === 60")
    browser.emulate(print=True)
    shown.wait_until("document.documentElement.dataset.theme === 'light'")
    assert (
        shown.script(
            """return ['.controls', '.tools', '#more'].map((css) => getComputedStyle(document.querySelector(css)).display)"""
        )
        == ["none"] * 3
    )
    assert shown.script("const s = document.querySelector('#scroll'); return s.scrollHeight <= s.clientHeight")
    page_width, paper = shown.script(
        "return [document.documentElement.scrollWidth - document.documentElement.clientWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert page_width <= 0 and paper == "rgb(255, 255, 255)"
    browser.emulate(print=False)
    shown.wait_until("document.documentElement.dataset.theme === 'dark'")


@pytest.mark.parametrize("feature, value", [("prefers-contrast", "more"), ("forced-colors", "active")])
def test_more_contrast_and_forced_colours_reach_text_and_canvas(page, site, browser, feature, value):
    fill(site)
    shown = page()
    axis = """
      const c = document.querySelector('#chart'), g = window.__page.picture();
      return [...c.getContext('2d').getImageData(g.plot.x + 5, g.base, 1, 1).data].slice(0, 3).join()"""
    before = shown.script(axis)
    browser.cdp("Emulation.setEmulatedMedia", media="", features=[{"name": feature, "value": value}])
    shown.wait_until(f"matchMedia('({feature}: {value})').matches")
    ink = shown.script("""const i = document.createElement('i'); i.style.cssText = 'forced-color-adjust: none; color: var(--ink)'; document.body.append(i);
      const c = getComputedStyle(i).color; i.remove(); return c.match(/\\d+/g).slice(0, 3).join()""")
    shown.wait_until(f"(() => {{ {axis} }})() === '{ink}'")
    assert before != ink
    faint = shown.script(
        "return getComputedStyle(document.querySelector('.kpi dt')).color.match(/\\d+/g).slice(0, 3).join()"
    )
    assert faint == ink
