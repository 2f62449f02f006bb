from __future__ import annotations

import json
import re
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
    block = re.search(r'<script type="text/plain" id="i18n">\n(.*?)\n</script>', PAGE, re.S).group(1)
    return {key: texts for key, *texts in (line.split(" | ") for line in block.split("\n"))}


def test_every_word_is_there_in_both_languages_with_the_same_places():
    block = re.search(r'id="i18n">\n(.*?)\n</script>', PAGE, re.S).group(1)
    words = dictionary()
    assert len(words) == block.count("\n") + 1 > 200  # no key twice
    for key, texts in words.items():
        assert len(texts) == 2 and all(text.strip() for text in texts), key
        places = [sorted(set(re.findall(r"{\w+}", text))) for text in texts]
        assert places[0] == places[1], key


def test_every_word_is_used_and_every_used_word_is_there():
    script = re.search(r'<script type="module">(.*?)</script>', PAGE, re.S).group(1)
    markup = PAGE[PAGE.index("<body") : PAGE.index('<script type="text/plain"')]
    words = dictionary()
    plain = set(re.findall(r"\b(?:t|plural)\('([\w.]+)'", script)) | set(re.findall(r'data-(?:t|label)="([\w.]+)"', markup))
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

    assert len(gzip.compress(PAGE.encode(), 9)) <= 35 * 1024


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


@pytest.fixture
def page(browser, site):
    """Open the page as a first visitor with an English browser sees it."""
    browser.resize(1440, 900)
    browser.emulate(dark=False)

    def show(query="?range=24h", fresh=True):
        browser.goto(f"http://127.0.0.1:{site.port}/{query}")
        if fresh:
            browser.script("localStorage.clear(); sessionStorage.clear()")
            browser.console_errors()
            browser.requested_urls()
            browser.goto(f"http://127.0.0.1:{site.port}/{query}")
        browser.wait_until("document.querySelector('#kpi-requests').dataset.value !== undefined")
        return browser

    yield show
    browser.resize(1440, 900)
    browser.emulate(dark=False)


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
    assert shown.console_errors() == []
    assert all(url.startswith((f"http://127.0.0.1:{site.port}/", "data:")) for url in shown.requested_urls())


def test_bars_are_as_high_as_their_tokens_and_drawn_in_their_colours(page, site):
    fill(site)
    shown = page()
    shown.wait_until("window.__page.geometry().length > 0")
    bars = shown.script("return window.__page.geometry().map(b => ({...b}))")
    heights = {}
    for bar in bars:
        heights.setdefault(bar["kind"], []).append(bar["h"])
    assert {"cached", "input", "output", "reasoning"} <= set(heights)
    biggest = max(heights["cached"])
    assert max(heights["input"]) == pytest.approx(biggest * 2_122 / 88_000, abs=1.6)
    ratio = shown.script(
        "const c = document.querySelector('#chart'); return c.width / c.clientWidth / devicePixelRatio"
    )
    assert ratio == pytest.approx(1, abs=0.01)
    colours = shown.script("""
      const c = document.querySelector('#chart'), b = window.__page.geometry().filter(x => x.kind === 'cached').sort((p, q) => q.h - p.h)[0];
      const k = c.width / c.clientWidth, p = c.getContext('2d').getImageData((b.x + b.w / 2) * k, (b.y + b.h / 2) * k, 1, 1).data;
      const probe = document.createElement('i'); probe.style.color = 'var(--s-cached)'; document.body.append(probe);
      const want = getComputedStyle(probe).color; probe.remove();
      return [Array.from(p).slice(0, 3).join(), want.match(/\\d+/g).slice(0, 3).join()];""")
    drawn, token = ([int(part) for part in colour.split(",")] for colour in colours)
    assert drawn == token or max(abs(a - b) for a, b in zip(drawn, token)) < 60  # the running bucket is lighter


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
    assert shown.console_errors() == []


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


def test_empty_database_and_empty_filter_are_told_apart(page, site):
    shown = page()
    shown.wait_until("document.querySelector('#empty') && !document.querySelector('#empty').hidden")
    nothing_yet = shown.text("#empty")
    fill(site)
    shown = page("?range=24h&model=no-such-model")
    shown.wait_until("!document.querySelector('#empty').hidden")
    assert shown.text("#empty") != nothing_yet and nothing_yet and shown.text("#empty")


def test_wrong_password_state_is_told_with_its_remedy(page, site):
    site.status.update(state="wrong_password", publishing=None)
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
