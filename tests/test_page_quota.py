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
    told = {AN: ("62%", "Active"), B: ("20%", "Limited"), WEEKLY: ("—", "88%"), OLD: ("Sign in again",)}
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


def test_name_without_room_is_cut_in_its_middle_so_that_two_of_one_mail_are_told_apart(page, site, between):
    names = [f"grace.brewster.murray.hopper@statistics.example.org (#{tag})" for tag in ("ff5dd6", "eb3c6f")]

    def rename(body):
        body["accounts"] = [{**body["accounts"][0], "account": name, "auth_index": name} for name in names]

    between.changes["/api/summary"] = rename
    page.open(server=between)
    for width in (320, 768, 1101, 1366):
        page.resize(width, 800)
        page.wait_until(f"innerWidth === {width}")
        told = page.all("#accounts .link", "[e.textContent, ...[...e.children].map((s) => s.scrollWidth - s.clientWidth)]")
        assert [name for name, *_ in told[:2]] == names
        assert [(cut > 20, whole) for _, cut, whole in told[:2]] == 2 * [(True, 0)]
        end = "e.getBoundingClientRect().right"
        assert page.one("#accounts .cut", f"{end} >= ((e) => {end})(e.lastChild)")


def test_countdown_pace_and_source_of_a_reading_are_told(page, site, between):
    between.change_quotas(an={"source": "traffic"})
    page.open(server=between)
    # 62 % are left two hours before a 5-hour reset: an even pace would have left 40 %.
    assert "62% left. An even pace would leave" in cell(page, AN, "p5", "e.firstChild.title")
    assert re.search(r"62%\s1h 5\dm|62%\s2h", cell(page, AN, "p5"))
    mark = cell(page, AN, "p5", "parseFloat(e.querySelector('.meter b').style.left)")
    assert mark == pytest.approx(40, abs=1)
    assert re.search(r"Read \dm ago, from a request", cell(page, AN, "age", "e.title"))
    assert re.search(r"^↻ \dmRead \dm ago, by a refresh$", cell(page, B, "age", "e.textContent"))
    page.resize(390, 800)
    page.wait_until("innerWidth === 390")
    assert re.search(r"Active · ⇄ \dm", page.account(AN))


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
        soon = site.now + HOUR
        body["pool"] = [pool("5h", 2, 41, soon), pool("7d", 3, 54.7), pool("30d", 1, 88), pool("9h", 2, 70, None)]

    between.changes["/api/quota"] = add
    page.open(server=between)
    assert "empty in 48m at this pace" in page.account(AN) and "empty in" not in page.account(B)
    assert "At the pace of the last hour it is empty" in cell(page, AN, "p5", "e.firstChild.title")
    assert "lasts until the reset" in cell(page, AN, "p7", "e.firstChild.title")
    clock = "new Intl.DateTimeFormat('en-GB', {hour: '2-digit', minute: '2-digit'}).format(arguments[0] * 1000)"
    dry, lasts = (page.js(clock, site.now + hours * HOUR) for hours in (1, 3))
    told = [" ".join(words.split()) for words in page.all("#pool .pool", "e.innerText")]
    assert len(told) == 3  # one account is no pool
    assert re.fullmatch(rf"5h 41% left runs dry (\w+ )?{dry}", told[0])
    assert told[1] == "7d 54% left"  # without a forecast nothing is said
    assert re.fullmatch(rf"9h 70% left lasts to (\w+ )?{lasts}", told[2])


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
    assert "here 1% was worth about 170k tokens" in page.account(AN, "e.querySelector('.w5h [title]').title")
    row = f"#accounts tr[data-email='{AN}']"
    page.script(f"document.querySelector(\"{row} .twist\").focus()")
    page.press("Enter")
    assert page.one(f"{row} .twist", "e.getAttribute('aria-expanded')") == "true"
    facts = page.all("#accounts .detail dd")
    assert facts == ["8.2s / 29.9s", "—", "92 tokens/s", "≥ $3.50"]
    lines = page.all("#accounts .hist [role=row]", "[...e.children].map((c) => c.textContent)")
    assert [line[1:4] for line in lines] == [["Used", "Tokens", "per 1%"], ["38%", "3.90M", "170k"],
                                             ["80%", "13.5M", "169k"]]  # fmt: skip
    page.click("#lang-vi")
    page.wait_for_text("#accounts", "còn ≈ 13M")
    page.press("Enter")
    page.click(f"{row} [data-by=requests]")
    page.wait_until("!document.querySelector('#accounts .detail')")


def test_windows_of_other_lengths_and_meters_stand_beneath_under_their_own_names(page, site, between):
    window = {"seconds": None, "used_percent": 23, "remaining_percent": 77, "meter": None,
              "reset_at": app.utc_text(site.now + 50 * HOUR)}  # fmt: skip
    spark = {**window, "label": "5h", "remaining_percent": 33, "meter": "spark"}
    between.change_quotas(
        weekly={"windows": [{**window, "label": "30d", "seconds": 30 * 24 * HOUR}]},
        an=lambda row: row["windows"].extend([{**window, "label": "9h"}, spark]),
    )
    page.open(server=between)
    assert cell(page, WEEKLY, "p5") == cell(page, WEEKLY, "p7") == "—"
    more = "e.querySelector('.more').innerText"
    assert re.search(r"^30d window\s+77%\s+2d\s+\w+ \d\d:\d\d$", page.account(WEEKLY, more))
    css = [".more .tag", ".more .meter", "[data-by=status]", ".more .at", "[data-by=reset]"]
    sides = f"{css}.map((c) => e.querySelector(c).getBoundingClientRect()).map((b) => [b.left, b.right])"
    (_, name_end), (bar, bar_end), (status, _), (reset, _), (resets, _) = page.account(WEEKLY, sides)
    assert name_end <= bar < bar_end < status and reset == pytest.approx(resets, abs=1)
    assert re.search(r"9h window\s+77%.*spark\s+33%", page.account(AN, more), re.S)
    assert "62%" in cell(page, AN, "p5")


def test_failures_stand_in_words_beside_the_last_good_value_and_its_age(page, site, between):
    between.change_quotas(
        an={"state": "rate_limited", "message": "said in English", "ts_epoch": site.now - 3 * HOUR},
        weekly={"state": "disabled", "message": "said in English"},
    )
    page.open(server=between)
    failed = page.account(AN)
    assert all(word in failed for word in ("Backing off", "62%", "last good reading 3h ago"))
    assert "Switched off" in page.account(WEEKLY)
    assert "0 of 2 accounts usable" in page.text("#pool")  # who is switched off does not count
    assert "1 could not be read" in page.text("#pool") and page.text("#need") == "1 account needs you"
    page.click("#lang-vi")
    page.wait_for_text("#accounts", "số liệu tốt gần nhất 3 giờ trước")
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
            fix = (f"{state.capitalize()} in English", WORDS[f"quota.fix.{state}"][1])[n]
            assert WORDS[f"quota.state.{state}"][n] in row and fix in row
            assert ("in English" in row) is (lang == "en")


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
    assert "1 not read yet · Refresh Quota reads them" in page.text("#pool")
    assert cell(page, WEEKLY, "reset", "e.firstChild.textContent") == "—"
    page.click("#lang-vi")
    page.wait_for_text("#pool", "1 chưa đọc")


def save_reply(site, email, **reply):
    """Store a reply of the quota endpoint, read a minute ago."""
    now = site.now - 60
    site.store.save_reading(app.reading_row(app.parse_quota(reply, now), (email, "#" + email), "pro", now, "{}"))


def slot(used, seconds, in_s=4 * HOUR):
    return {"used_percent": used, "limit_window_seconds": seconds, "reset_after_seconds": in_s}


def test_every_reason_is_told_in_both_languages(page, empty):
    told = {key[len("quota.reason.") :]: words for key, words in WORDS.items() if key.startswith("quota.reason.")}
    told.update(new_limit_reached=told["limit_reached"])
    for reason in told:
        save_reply(empty, f"{reason}@example.com", rate_limit_reached_type={"type": reason})
    page.open()
    for n, lang in enumerate(LANGS):
        page.speak(lang)
        assert [reason for reason in told if told[reason][n] not in page.account(f"{reason}@example.com")] == []


def test_budget_meters_credits_and_resets_stand_in_the_accounts_row(page, empty):
    spark = {"limit_name": "GPT-5.3-Codex-Spark", "metered_feature": "codex_bengalfox", "rate_limit": {
        "primary_window": slot(17, 18000), "secondary_window": slot(8, 604800)}}  # fmt: skip
    limit = {"used_percent": 26, "used": "3831.746", "limit": "15000", "reset_after_seconds": 9 * 24 * HOUR}
    save_reply(empty, AN, rate_limit={"primary_window": slot(50, 604800)}, additional_rate_limits=[spark, spark],
               credits={"balance": "489.25"}, rate_limit_reset_credits={"available_count": 2})  # fmt: skip
    save_reply(empty, B, spend_control={"individual_limit": limit})
    page.open()
    more = "e.querySelector('.more').innerText.replace(/\\s+/g, ' ')"
    assert page.account(AN, more).count("Spark") == 1 and "83%" in page.account(AN, more)
    assert "pro · Credits 489.3" in page.account(AN) and "2 resets of the limits can be used" in page.account(AN, more)
    assert re.search("^3,832 of 15,000 credits used Budget 74%", page.account(B, more)) and "Active" in page.account(B)
    page.click("#lang-vi")
    page.wait_for_text("#accounts", "đã dùng 3.832/15.000 credits")


@pytest.mark.parametrize("width, told", [(1440, "1"), (390, "1 failed")])
def test_failures_of_an_account_are_told_on_every_width(page, site, width, told):
    page.resize(width, 900)
    page.open()
    assert cell(page, B, "failed") == told
    assert cell(page, AN, "failed", "e.offsetParent === null") is (width == 390)


def test_status_of_an_account_is_not_cut_on_a_tablet(page, site):
    page.resize(768, 900)
    page.open()
    page.speak("vi")
    page.script("document.querySelectorAll('#accounts .aged').forEach((e) => { e.textContent = ' · ⇄ 35 phút'; })")
    cells = page.all("#accounts td[data-by=status]", "[e.scrollWidth <= e.clientWidth, e.innerText]")
    assert len(cells) >= 4 and [text for whole, text in cells if not whole] == []


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
