"""Accounts and their quota: the table, its words, and the button that refreshes."""

from __future__ import annotations

import re

import pytest
from page_support import HOUR, LANGS, WORDS, save_quota
from support import reading, write_account

import usage_dashboard as app

AN, B, WEEKLY, OLD = "an@example.com", "b@example.com", "weekly@example.com", "old@example.com"


def cell(page, email, by, expression="e.innerText"):
    """Return the text of an account's cell, or another expression of it, `e`."""
    return page.account(email, f"((e) => {expression})(e.querySelector('[data-by={by}]'))")


def test_accounts_show_usage_and_quota_with_the_three_colours(page, site):
    page.open()
    page.wait_until("document.querySelectorAll('#accounts tbody tr').length >= 4")
    told = {AN: ("62%", "Active"), B: ("20%", "Limited"), OLD: ("Sign in again",),
            WEEKLY: ("not part of this plan", "88%")}  # fmt: skip
    for email, words in told.items():
        assert all(word in page.account(email) for word in words)
    assert "100%" not in page.account(WEEKLY)
    colours = page.script("""
      const probe = document.createElement('i'); document.body.append(probe);
      const wanted = ['ok', 'warn', 'bad'].map((token) => {
        probe.style.color = `var(--${token})`; return getComputedStyle(probe).color; });
      const used = new Set([...document.querySelectorAll('.meter i')].map((e) => getComputedStyle(e).backgroundColor));
      return wanted.map((colour) => used.has(colour));""")
    assert colours == [True, True, True]


@pytest.mark.parametrize("width", [320, 768, 1101, 1366, 2560])
def test_name_without_room_is_cut_in_its_middle_so_that_two_of_one_mail_are_told_apart(page, site, between, width):
    mail = "grace.brewster.murray.hopper@statistics." + "navy." * (width > 2000) * 9 + "example.org"
    names = [f"{mail} (#{tag})" for tag in ("ff5dd6", "eb3c6f")]

    def rename(body):
        row = {**body["accounts"][0], "plan": "self_serve_business_usage_based"}
        body["accounts"] = [{**row, "account": name, "auth_index": name} for name in names]

    between.changes["/api/summary"] = rename
    page.resize(width, 800)
    page.open(server=between)
    facts = "[e.innerText, e.title.includes(e.innerText), ...[...e.children].map((s) => s.scrollWidth - s.clientWidth)]"
    told = [page.account(name, f"((e) => {facts})(e.querySelector('.link'))") for name in names]
    assert [(name, whole, head > 9, tail) for name, whole, head, tail in told] == [(n, True, True, 0) for n in names]
    right = "e.getBoundingClientRect().right"
    assert page.one("#accounts .cut", f"{right} >= ((e) => {right})(e.lastChild)")
    assert "self_serve_business_usage_based" in page.account(names[0])


def test_quotas_of_one_mail_that_no_account_claims_are_told_apart(page, site, between):
    same = {"email": "pair@example.com", "account": None}
    between.change_quotas(weekly={**same, "account_id_tag": "#aa11bb"}, old={**same, "account_id_tag": "#cc22dd"})
    page.open(server=between)
    assert {"pair@example.com (#aa11bb)", "pair@example.com (#cc22dd)"} < set(page.all("#accounts .link"))


def order_of(page):
    """Return the accounts from the top, by the name before the @ of their address."""
    return [name.partition("@")[0] for name in page.all("#accounts .link")]


def test_accounts_that_need_a_person_stand_first_then_those_out_then_by_what_is_left(page, site):
    save_quota(site, "less@example.com", 9, 80)
    save_quota(site, "later@example.com", 3, 0, state="limited", limit_reached=1)
    save_quota(site, "b@example.com", 0, 71, state="limited", limit_reached=1)
    for state in ("disabled", "never"):
        site.store.save_quota_state(f"{state}@example.com", state, "plus", state, "said in English", site.now)
    needs_first = ["old", "b", "later", "an", "less", "weekly", "never", "disabled"]
    page.open("?range=30d")
    assert order_of(page) == needs_first and page.text("#needs") == "1 account needs you"
    assert page.text("#accounts-note") == "needs you first, then by what is left"
    ink = "getComputedStyle(e.querySelector('.wide .warn')).color"
    assert page.account(OLD, ink) == page.one("#needs", "getComputedStyle(e).color")
    assert re.search("back in [12]h", page.account(B))
    page.click("#accounts [data-sort=p5]")
    assert order_of(page)[:2] == ["an", "less"] and page.text("#accounts-note") == ""
    page.click("#need")
    assert order_of(page) == needs_first
    page.resize(390, 844)
    page.wait_until("innerWidth === 390")
    for order, first in (("p7 up", ["later", "an", "b"]), ("status up", needs_first[:3])):
        page.select("#accounts-sort", order)
        assert order_of(page)[:3] == first
    page.speak("vi")
    assert page.one("#accounts-sort", "e.selectedOptions[0].textContent").startswith("Cần bạn xử lý trước")


def test_providers_without_quota_windows_fill_no_columns(page, site, between):
    def foreign(body):
        for n, row in enumerate(body["accounts"]):
            row.update(provider="gemini", account=f"key {n}")

    between.changes["/api/summary"] = foreign
    page.open(server=between)
    assert "Gemini reports no quota" in page.account("key 0") and "—" not in page.account("key 0")
    between.changes["/api/quota"] = lambda body: body.update(quotas=[], pool=[])
    page.open(server=between)
    heads = page.all("#accounts-head :is(td, th)", "e.offsetParent && e.innerText")
    assert [head for head in heads if head][:2] == ["Account", "Requests"] and "Status" not in heads
    assert page.account("key 0").endswith("1,990") and page.one("#mark", "e.hidden")


def test_phone_shows_twenty_of_many_accounts_and_all_on_demand_and_scrolls_nothing_within(page, empty):
    for n in range(31):
        save_quota(empty, f"a{n:02}@example.com", 10 + n, 50)
    page.resize(390, 844)
    page.open()
    assert len(order_of(page)) == 20
    sizes = "#accounts tbody button, #all-accounts, #quota .tools :is(button, select)"
    small = "Math.min(e.offsetWidth, e.offsetHeight) < 40 && e.className"
    assert [name for name in page.all(sizes, small) if name] == []
    assert page.one("#accounts-scroll", "e.scrollHeight - e.clientHeight") == 0
    page.click("#all-accounts")
    assert len(order_of(page)) == 31 and page.one("#all-accounts", "e.hidden")


def test_countdown_pace_and_source_of_a_reading_are_told(page, site, between):
    between.change_quotas(an={"source": "traffic"})
    page.open(server=between)
    # 62 % are left two hours before a 5-hour reset: an even pace would have left 40 %.
    assert "62% left. An even pace would leave" in cell(page, AN, "p5", "e.firstChild.title")
    assert re.search(r"62%\nresets \d\d:\d\d, in (1h 5\dm|2h)$", cell(page, AN, "p5"))
    mark = cell(page, AN, "p5", "parseFloat(e.querySelector('.meter b').style.left)")
    assert mark == pytest.approx(40, abs=1) and page.text("#mark") == "an even pace would be here"
    assert re.search(r"^\d min ago\nfrom a request$", cell(page, AN, "age"))
    assert re.search(r"^\d min ago\nby Refresh Quota$", cell(page, B, "age"))
    page.resize(390, 800)
    page.wait_until("innerWidth === 390")
    told = r"5h quota left 62% resets .* 7d quota left 5% resets .*, in [34]d .* \d min ago ?from a request"
    assert re.search(told, page.account(AN))


def test_window_whose_reset_has_passed_is_due_in_words_and_without_a_percentage(page, site, between):

    def passed(row):
        row.update(state="reset_due", primary_remaining_percent=None, primary_used_percent=None)
        row["windows"][0].update(due=True, remaining_percent=None, used_percent=None, reset_at=None)

    between.change_quotas(an=passed)
    page.open(server=between)
    text = page.account(AN)
    assert "reset due" in text and "Reset due" in text and "62%" not in text and "5%" in text
    page.click("#lang-vi")
    page.wait_for_text("#accounts", "đã đến giờ reset")


def test_forecasts_are_told_only_where_there_are_any(page, site, between):
    assert "pace" not in page.open(server=between).account(AN)
    reset = app.utc_text(site.now + 3 * HOUR)

    def pool(label, accounts, left, *out):
        row = {"label": label, "accounts": accounts, "remaining_percent": left, "next_reset_at": reset}
        row["forecast"] = {"runs_out_at": out[0] and app.utc_text(out[0]), "until": reset} if out else None
        return row

    def add(body):
        windows = next(row for row in body["quotas"] if row["email"] == AN)["windows"]
        windows[0]["forecast"] = {"used_per_hour": 50, "runs_out_at": app.utc_text(site.now + 2900)}
        windows[1]["forecast"] = {"used_per_hour": 0.1, "runs_out_at": None}
        week = next(row for row in body["quotas"] if row["email"] == WEEKLY)["windows"][0]
        week["forecast"] = {"used_per_hour": 90, "runs_out_at": app.utc_text(site.now + 200)}
        soon = site.now + HOUR
        body["pool"] = [pool("5h", 2, 41, soon), pool("7d", 3, 54.7), pool("30d", 1, 88), pool("9h", 2, 70, None)]

    between.changes["/api/quota"] = add
    page.open(server=between)
    assert "empty in about 48m" in page.account(AN) and "empty in" not in page.account(B)
    assert "At the pace of the last hour it is empty" in cell(page, AN, "p5", "e.firstChild.title")
    assert "lasts until the reset" in cell(page, AN, "p7", "e.firstChild.title")
    assert "nearly empty" in page.account(WEEKLY)
    clock = "new Intl.DateTimeFormat('en-GB', {hour: '2-digit', minute: '2-digit'}).format(arguments[0] * 1000)"
    dry, lasts = (page.js(clock, site.now + hours * HOUR) for hours in (1, 3))
    told = [" ".join(words.split()) for words in page.all("#pool .pool", "e.innerText")]
    assert len(told) == 3  # one account is no pool
    assert re.fullmatch(rf"5h quota 41% left runs dry (\w+ )?{dry}", told[0])
    assert told[1] == "7d quota 54% left"  # without a forecast nothing is said
    assert re.fullmatch(rf"9h quota 70% left lasts to (\w+ )?{lasts}", told[2])


def test_what_windows_are_worth_stands_beside_them_and_their_history_in_the_details(page, site, between):
    ended = {"ended_at": app.utc_text(site.now - 30 * HOUR), "peak_percent": 80, "tokens": 13_500_000}
    worth = {"tokens": 3_900_000, "tokens_per_percent": 169_565, "tokens_left": 13_056_505}

    def add(row):
        row["windows"][0].update(worth, history=[{**ended, "tokens_per_percent": 168_750}])
        row["windows"][1].update(worth, tokens_per_percent=0, history=[])

    def speeds(body):
        row = body["accounts"][0]
        row.update(cost_usd=3.5, unpriced_tokens=9)
        row["speed"] = {"latency_ms": {"p50": 8200, "p95": 29900}, "ttft_ms": {"p50": None, "p95": None},
                        "tokens_per_second": {"p50": 92}}  # fmt: skip

    between.change_quotas(an=add)
    between.changes["/api/summary"] = speeds
    page.open(server=between)
    assert page.account(AN).count("≈ 13M left") == 1 and "left" not in page.account(B)
    assert "1% was worth about 170k tokens here" in cell(page, AN, "p5", "e.firstChild.title")
    row = f"#accounts tr[data-email='{AN}']"
    page.script(f"document.querySelector(\"{row} .twist\").focus()")
    page.press("Enter")
    assert page.one(f"{row} .twist", "e.getAttribute('aria-expanded')") == "true"
    facts = page.all("#accounts .detail dd")
    assert facts[:11] == ["1", "93,143", "90,122", "3,021", "1,990", "0", "88,000", "8.2s / 29.9s", "—", "92 tokens/s",
                          "≥ $3.50"]  # fmt: skip
    assert re.match(r"62% left\..*Window until .*\d\d:\d\d: 80% used, 13.5M tokens, 169k per 1%$", facts[11])
    page.click("#lang-vi")
    page.wait_for_text("#accounts", "còn ≈ 13M")
    page.press("Enter")
    page.click(f"{row} [data-by=requests]")
    page.wait_until("!document.querySelector('#accounts .detail')")


def save_reply(site, email, **reply):
    """Store a reply of the quota endpoint, read a minute ago."""
    now = site.now - 60
    site.store.save_reading(app.reading_row(app.parse_quota(reply, now), (email, "#" + email), "pro", now, "{}"))


def slot(used, seconds, in_s=4 * HOUR):
    return {"used_percent": used, "limit_window_seconds": seconds, "reset_after_seconds": in_s}


@pytest.mark.parametrize("width", [1440, 768])
def test_meters_stand_beneath_with_their_names_once_and_their_windows_under_the_same_columns(page, empty, width):
    spark = {"limit_name": "GPT-5.3-Codex-Spark", "metered_feature": "codex_bengalfox", "rate_limit": {
        "primary_window": slot(17, 18000), "secondary_window": slot(8, 604800)}}  # fmt: skip
    limit = {"used_percent": 26, "used": "3831.746", "limit": "15000", "reset_after_seconds": 9 * 24 * HOUR}
    save_reply(empty, AN, rate_limit={"primary_window": slot(50, 604800)}, additional_rate_limits=[spark, spark],
               code_review_rate_limit={"secondary_window": slot(5, 604800)}, credits={"balance": "489.25"},
               rate_limit_reset_credits={"available_count": 2}, spend_control={"individual_limit": limit})  # fmt: skip
    save_reply(empty, B, spend_control={"individual_limit": limit})
    save_reply(empty, WEEKLY, rate_limit={"primary_window": slot(23, 30 * 24 * HOUR)})
    save_reply(empty, OLD, rate_limit={"primary_window": slot(23, 9 * HOUR), "secondary_window": slot(1, 604800)})
    page.resize(width, 900)
    page.open()
    text = page.account(AN)
    assert text.count("Spark") == text.count("Code review") == 1 and "pro · Credits 489.3" in text
    assert "2 resets of the limits can be used" in text
    left = "(css) => [...e.querySelectorAll(css)].map((n) => Math.round(n.getBoundingClientRect().left))"
    own, spark_week, review_week = page.account(AN, f"({left})('.l7 .meter, .w7d .meter')")
    assert own == spark_week == review_week
    head = page.one("#accounts-head .l5 button", "Math.round(e.getBoundingClientRect().left)")
    assert page.account(AN, f"({left})('.w5h .meter')") == [head]
    rows = "[...e.querySelectorAll('.row')].map((n) => [...n.querySelectorAll('.name, b')].map((b) => b.textContent))"
    rows = [[text for text in row if text] for row in page.account(AN, rows)]
    assert rows == [["Budget", "74%"], ["Code review", "95%"], ["GPT-5.3-Codex-Spark", "83%", "92%"]]
    assert min(page.all("#accounts tbody .meter", "e.offsetWidth")) >= 70
    assert re.search("Budget 74% resets .* 3,832 of 15,000 credits used 🟢 Active", page.account(B))
    assert re.search("30d quota left 77% resets", cell(page, WEEKLY, "p5").replace("\n", " "))
    assert page.account(OLD, "e.querySelector('.more').innerText").startswith("9h quota left\n77%")
    page.speak("vi")
    page.wait_for_text("#accounts", "đã dùng 3.832/15.000 credits")


def test_failures_stand_in_words_beside_the_last_good_value_and_its_age(page, site, between):
    between.change_quotas(
        an={"state": "rate_limited", "message": "said in English", "ts_epoch": site.now - 3 * HOUR},
        weekly={"state": "disabled", "message": "said in English"},
    )
    page.open(server=between)
    failed = page.account(AN)
    assert all(word in failed for word in ("Backing off", "Said in English", "62%", "3 hr ago"))
    assert "Switched off" in page.account(WEEKLY)
    told = page.text("#pool")  # who is switched off does not count
    assert all(words in told for words in ("0 of 2 accounts usable", "1 could not be read", "1 account needs you"))
    page.click("#lang-vi")
    page.wait_for_text("#accounts", "3 giờ trước")
    assert "said in English" not in page.js("document.documentElement.outerHTML")


def test_every_quota_state_is_told_with_what_to_do_in_both_languages(page, empty):
    states = sorted(set(app.QUOTA_MESSAGES) - {"disabled"})
    for state in states:
        empty.store.save_quota_state(f"{state}@example.com", f"#{state}", "plus", state, f"{state} in English", empty.now)
    page.open()
    for n, lang in enumerate(LANGS):
        page.speak(lang)
        for state in states:
            row = page.account(f"{state}@example.com")
            fix = (f"{state.capitalize()} in English", WORDS.get(f"quota.fix.{state}", ["", ""])[1])[n]
            assert WORDS[f"quota.state.{state}"][n] in row and (fix in row or state == "never")
            assert ("in English" in row) is (lang == "en" and state != "never")


def test_account_without_a_window_or_a_reading_is_not_counted_and_one_on_credits_is_active(page, site):
    none = reading(email="none@example.com", account_id_tag="#none", state="no_windows", ts_epoch=site.now)
    site.store.save_reading(none)
    site.store.save_quota_state("new@example.com", "#new", "plus", "never", "not asked yet", site.now)
    save_quota(site, "credits@example.com", 50, 0, state="ok", limit_reached=1)
    page.open()
    text = page.account("none@example.com")
    assert "⚪ No quota window" in text and "Active" not in text
    assert "Active" in page.account("credits@example.com") and "0%" in page.account("credits@example.com")
    assert page.text("#pool h2") == "4 of 6 accounts usable"
    assert "1 account not read yet · Refresh Quota reads it" in page.text("#pool")
    assert cell(page, "none@example.com", "p5") == "ChatGPT reports no quota window here"
    page.click("#lang-vi")
    page.wait_for_text("#pool", "1 tài khoản chưa đọc")


def test_every_reason_is_told_in_both_languages(page, empty):
    told = {key[len("quota.reason.") :]: words for key, words in WORDS.items() if key.startswith("quota.reason.")}
    told.update(new_limit_reached=told["limit_reached"])
    for reason in told:
        save_reply(empty, f"{reason}@example.com", rate_limit_reached_type={"type": reason})
    page.open()
    for n, lang in enumerate(LANGS):
        page.speak(lang)
        assert [reason for reason in told if told[reason][n] not in page.account(f"{reason}@example.com")] == []


@pytest.mark.parametrize("width", [1440, 390])
def test_failures_of_an_account_are_told_on_every_width(page, site, width):
    page.resize(width, 900)
    page.open()
    assert re.search(r" 1 5,160" if width > 720 else " 2 requests · 1 failed · ", page.account(B))
    assert "failed" not in page.account(AN)


@pytest.mark.parametrize("width", [320, 768, 1024, 1280, 1440])
@pytest.mark.parametrize("lang", LANGS)
def test_nothing_of_an_account_is_cut_but_its_name(page, site, between, lang, width):
    def add(row):
        worth = {"tokens_per_percent": 7e6, "tokens_left": 434e6}
        for window in row["windows"]:
            window.update(worth, forecast={"used_per_hour": 50, "runs_out_at": app.utc_text(site.now + 2900)})

    between.change_quotas(an=add)
    page.resize(width, 900)
    page.open(server=between)
    page.speak(lang)
    texts = "#accounts :is(th, th button, td, .tag, .win b, .est, .when span, .say, .beneath, .plan, .sums, .st span)"
    is_cut = "e.offsetParent && !e.closest('.vh') && e.scrollWidth > e.clientWidth + 1"
    is_cut = f"getComputedStyle(e).display !== 'inline' && {is_cut} && `${{e.className}}: ${{e.textContent}}`"
    assert [text for text in page.all(texts, is_cut) if text] == []
    bars = page.all("#accounts tbody .meter", "e.offsetWidth")
    assert len(bars) >= 5 and min(bars) >= 70
    if width >= 1280:
        heights = page.all("#accounts tbody tr:not(:has(.more:not([hidden])))", "[e.offsetHeight, e.innerText]")
        assert {height for height, text in heights if "49" not in text and "48" not in text} <= {50, 51, 52}


def test_refresh_quota_locks_with_a_countdown_that_a_reload_keeps(page, site, tmp_path, chatgpt_here):
    write_account(tmp_path / "accounts", email=AN)
    window = {"used_percent": 58, "limit_window_seconds": 18000, "reset_after_seconds": 3600}
    limits = {"allowed": True, "limit_reached": False, "primary_window": window}
    chatgpt_here.answer("tok-secret-1", body={"plan_type": "plus", "rate_limit": limits})
    page.open()
    page.click("#refresh-quota")
    page.wait_for_text("#accounts", "42%")
    locked = "/\\d:\\d\\d/.test(e.textContent) && e.disabled"
    page.wait_for("#refresh-quota", locked)
    assert len(chatgpt_here.requests) == 1
    page.open(fresh=False)
    page.wait_for("#refresh-quota", locked)


def test_refresh_of_quota_that_runs_elsewhere_is_followed(page, site, between):
    # The two seconds between two looks pass at once.
    quick = """
      const start = window.setTimeout.bind(window);
      window.setTimeout = (act, delay, ...rest) => start(act, delay === 2000 ? 50 : delay, ...rest);"""
    running = {"refreshing": False, "progress": {"done": 2, "total": 5}}
    between.changes["/api/quota"] = lambda body: body.update(running)
    with page.before_load(quick):
        page.open(server=between)
    page.faults_expected = True
    running["refreshing"] = True
    between.faults["/api/quota?force=1"] = lambda handler: handler.refuse(409, "refresh_running")
    page.click("#refresh-quota")
    page.wait_for("#refresh-quota", "e.textContent === 'Reading 2 of 5' && e.disabled")
    assert page.one("#error", "e.hidden")
    running.update(refreshing=False, cooldown_seconds=120)
    page.wait_for("#refresh-quota", "/^Refresh Quota · [12]:\\d\\d$/.test(e.textContent)")


@pytest.mark.parametrize("status, code, headers, english, vietnamese, button", [
    (429, "cooldown", {"Retry_After": "200"}, r"button opens at \d\d:\d\d", "nút sẽ mở lại lúc", r"· 3:[0-2]\d$"),
    (409, "no_account_files", {}, "no Codex account file to ask", "không có tệp tài khoản Codex nào", "quota$"),
    (403, "foreign_site", {}, "Quota was not refreshed: it takes", "Chưa làm mới được quota: lệnh này", "quota$"),
])  # fmt: skip
def test_refresh_of_quota_that_is_refused_says_why_and_keeps_what_was_read(
    page, site, between, status, code, headers, english, vietnamese, button
):
    page.open(server=between)
    page.faults_expected = True
    between.faults["/api/quota?force=1"] = lambda handler: handler.refuse(status, code, **headers)
    page.click("#refresh-quota")
    page.wait_for("#error", "!e.hidden")
    assert re.search(english, page.text("#error"))
    page.click("#lang-vi")
    page.wait_for_text("#error", vietnamese)
    assert re.search(button, page.text("#refresh-quota"))
    assert page.one("#refresh-quota", "e.disabled") is (code == "cooldown")
    assert "62%" in page.account(AN)
