from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from support import QUOTA, id_token

import usage_dashboard as app

NOW = QUOTA["now"]
GOOD = [sample for sample in QUOTA["samples"] if sample["http_status"] == 200 and isinstance(sample["body"], dict)]
BAD = [sample for sample in QUOTA["samples"] if sample not in GOOD]


def shown(window):
    if window is None:
        return None
    return {name: getattr(window, name) for name in ("used_percent", "remaining_percent", "reset_at")}


@pytest.mark.parametrize("sample", GOOD, ids=lambda sample: sample["name"])
def test_sample_reply_gives_the_expected_windows(sample):
    reading, expect = app.parse_quota(sample["body"], NOW), sample["expect"]
    assert reading.state == expect["state"]
    assert shown(app.fullest(reading.windows, "5h")) == expect["five_hour"]
    assert shown(app.fullest(reading.windows, "7d")) == expect["weekly"]
    monthly = [window for window in reading.windows if window.label == "30d"]
    assert shown(monthly[0] if monthly else None) == expect["monthly"]
    if isinstance(expect.get("credits"), dict):
        assert reading.credits_balance == expect["credits"]["balance"]
    names = [window.meter for window in reading.windows if window.meter not in (None, "Code review")]
    assert sorted(set(names)) == sorted(expect.get("additional_names", []))
    for other in expect.get("other", []):
        assert other in [{"seconds": one.seconds, "used_percent": one.used_percent} for one in reading.windows]


def window(used_percent, seconds=18000):
    return {"used_percent": used_percent, "limit_window_seconds": seconds}


def body(primary=None, secondary=None, **limits):
    return {"rate_limit": {"primary_window": primary, "secondary_window": secondary, **limits}}


def test_window_is_named_by_its_length():
    labels = {18000: "5h", 17100: "5h", 18900: "5h", 18901: "5.3h", 604800: "7d", 574560: "7d", 2592000: "30d",
              2628000: "30d", 86400: "1d", 32400: "9h", 90: "1.5min", 30: "30s", 31536000: "365d"}  # fmt: skip
    assert {seconds: app.window_label(seconds) for seconds in labels} == labels


@pytest.mark.parametrize(("sent", "five_hour", "weekly", "state"), [
    (body({"used_percent": 10}, window(20, 0)), 10, 20, "ok"),  # the slot decides only where no length is given
    (body(window(1, 604800), window(2)), 2, 1, "ok"),
    (body(window(1), window(9)), 9, None, "ok"),  # of two windows of one length the fuller counts
    (body(window(0), window(100, 604800), allowed=True, limit_reached=False), 0, 100, "limited"),
    (body(window(7), window(100, 2592000)), 7, None, "limited"),
])  # fmt: skip
def test_windows_of_a_reply_are_told_by_their_length_and_all_are_listed(sent, five_hour, weekly, state):
    reading = app.parse_quota(sent, NOW)
    used = [found and found.used_percent for found in (app.fullest(reading.windows, label) for label in ("5h", "7d"))]
    assert (used, reading.state, len(reading.windows)) == ([five_hour, weekly], state, 2)


NO_PERCENT = [True, None, "x", [], float("inf"), float("nan"), {"a": 1}, "1e400", 10**400]


@pytest.mark.parametrize(("sent", "used"), [
    (12.5, 12.5), ("42", 42), (" 7.5 ", 7.5), (-3, 0), (250, 100), *((sent, None) for sent in NO_PERCENT),
])  # fmt: skip
def test_used_percent_of_any_type_is_a_number_or_unknown(sent, used):
    five_hour = app.parse_quota(body(window(sent)), NOW).windows[0]
    assert five_hour.used_percent == used
    assert five_hour.remaining_percent == (None if used is None else 100 - used)


@pytest.mark.parametrize(("sent", "reset_at"), [
    ({"reset_at": 1800000100}, 1800000100), ({"reset_at": 1800000100000}, 1800000100),
    ({"reset_at": 0, "reset_after_seconds": 60}, NOW + 60), ({"reset_at": "soon"}, None),
    ({"reset_after_seconds": -1}, None), ({"reset_at": 10**30}, None), ({}, None),
    ({"reset_at": 1500000000}, None),  # before there was any such window
    ({"reset_at": 86400, "reset_after_seconds": 60}, NOW + 60), ({"reset_after_seconds": 1e300}, None),
])  # fmt: skip
def test_reset_time_is_taken_in_every_form_or_unknown(sent, reset_at):
    assert app.parse_quota(body({"limit_window_seconds": 18000, **sent}), NOW).windows[0].reset_at == reset_at


def account_file(**changes) -> app.AccountFile:
    base = dict(name="codex-a.json", email="an@example.com", account_id="acc-1", plan="plus",
                access_token="tok-secret-1", disabled=False, proxy_url="", freshness="")  # fmt: skip
    return app.AccountFile(**{**base, **changes})


def write(folder: Path, name: str, content) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


CODEX = {"type": "codex", "email": "an@example.com", "account_id": "acc-1", "access_token": "tok-1"}


def test_account_file_is_known_by_its_content_not_its_name(tmp_path):
    write(tmp_path, "whatever.JSON", {**CODEX, "type": " Codex "})
    write(tmp_path, "codex-claude.json", {"type": "claude", "email": "x@y.zz"})
    write(tmp_path, "notes.txt", CODEX)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "codex-b.json", CODEX)
    folder, files, problems = app.find_account_files([tmp_path])
    assert ([file.name for file in files], problems, folder) == (["whatever.JSON"], [], tmp_path)


BAD_TOKEN = json.dumps({**CODEX, "access_token": "a\nHost: evil"})


@pytest.mark.parametrize("content", ["", "{", '{"type": "codex"', "[]", "null", "\x00\x01", "[" * 5000, BAD_TOKEN])
def test_half_written_or_strange_file_is_named_and_skipped(tmp_path, content):
    write(tmp_path, "codex-a.json", CODEX)
    write(tmp_path, "codex-b.json", content)
    _, files, (problem,) = app.find_account_files([tmp_path])
    assert [file.name for file in files] == ["codex-a.json"]
    assert problem.startswith("codex-b.json is skipped") and "evil" not in problem
    assert ("cannot be sent" in problem) == (content == BAD_TOKEN)


@pytest.mark.parametrize(("files", "accounts"), [
    ([{"last_refresh": "2026-05-01T12:00:00+08:00", "access_token": "old"},
      {"last_refresh": "2026-06-01T12:00:00+08:00", "access_token": "new"}, {"account_id": "acc-2"}],
     [("acc-1", "new"), ("acc-2", "tok-1")]),
    ([{"last_refresh": "2026-05-01T00:00:00Z", "access_token": "old", "account_id": ""},
      {"last_refresh": "2026-05-02T00:00:00Z", "access_token": "new"}], [("acc-1", "new")]),
    ([{}, {"account_id": "acc-2"}, {"account_id": ""}], [("", "tok-1"), ("acc-1", "tok-1"), ("acc-2", "tok-1")]),
], ids=["two-files-of-a-login", "old-without-the-id", "id-less-beside-two-logins"])  # fmt: skip
def test_files_of_one_login_are_one_account_with_the_newest_token(tmp_path, files, accounts):
    for number, changes in enumerate(files):
        write(tmp_path, f"codex-{number}.json", {**CODEX, **changes})
    found = app.find_account_files([tmp_path])[1]
    assert sorted((file.account_id, file.access_token) for file in found) == accounts
    assert len({file.tag for file in found}) == len(accounts)


@pytest.mark.parametrize(("sent", "shown"), [
    ("2027-02-01T07:00:00+07:00", "2027-02-01T00:00:00Z"), (1800000000, "2027-01-15T08:00:00Z"), (None, None),
    ("soon", None), (-5, None), ([], None),
])  # fmt: skip
def test_end_of_the_subscription_is_read_in_any_form(tmp_path, sent, shown):
    about = {"https://api.openai.com/auth": {"chatgpt_subscription_active_until": sent}}
    write(tmp_path, "a.json", {**CODEX, "id_token": id_token(about)})
    assert app.find_account_files([tmp_path])[1][0].subscription_until == shown


def test_plan_account_id_and_mail_come_from_the_id_token_where_the_file_has_none(tmp_path):
    auth = {"chatgpt_account_id": "acc-9", "chatgpt_plan_type": "Team"}
    claims = {"email": "b@example.com", "https://api.openai.com/auth": auth}
    write(tmp_path, "x.json", {"type": "codex", "access_token": "t", "id_token": id_token(claims)})
    file = app.find_account_files([tmp_path])[1][0]
    assert (file.email, file.account_id, file.plan) == ("b@example.com", "acc-9", "team")


MALFORMED_TOKENS = ["a.b", "a.%%%.c", "a.e30", id_token([1]), id_token({"https://api.openai.com/auth": 5})]


@pytest.mark.parametrize("token", MALFORMED_TOKENS)
def test_malformed_id_token_is_no_fault(tmp_path, token):
    write(tmp_path, "x.json", {**CODEX, "id_token": token})
    assert app.find_account_files([tmp_path])[1][0].email == "an@example.com"


def test_second_folder_is_used_only_while_the_first_has_no_account(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert app.find_account_files([first]) == (first, [], [])  # no folder at all is no fault
    second.mkdir()
    write(second, "x.json", CODEX)
    assert app.find_account_files([first, second])[0] == second
    first.mkdir()
    write(first, "y.json", {**CODEX, "email": "c@example.com"})
    folder, files, _ = app.find_account_files([first, second])
    assert (folder, files[0].email) == (first, "c@example.com")


def test_fetch_sends_the_token_the_account_id_and_a_plain_agent(chatgpt_here):
    chatgpt_here.answer("tok-secret-1", body={"plan_type": "plus"})
    assert app.fetch_usage(account_file()) == {"plan_type": "plus"}
    request = chatgpt_here.requests[0]
    assert (request["token"], request["path"]) == ("tok-secret-1", "/backend-api/wham/usage")
    assert request["headers"]["chatgpt-account-id"] == "acc-1" and request["headers"]["user-agent"] == "codex-cli"
    assert "tok-secret-1" not in json.dumps(request["proxy_headers"]) + repr(account_file())


@pytest.mark.parametrize("sample", BAD, ids=lambda sample: sample["name"])
def test_failed_sample_becomes_its_state_and_goes_nowhere_else(chatgpt_here, sample):
    chatgpt_here.answer("tok-secret-1", status=sample["http_status"], headers=sample["headers"], body=sample["body"])
    with pytest.raises(app.QuotaFault) as raised:
        app.parse_quota(app.fetch_usage(account_file()), NOW)
    assert raised.value.state in sample["expect"]["state"].split("_or_")
    assert chatgpt_here.foreign_targets == [] and len(chatgpt_here.requests) == 1
    assert "tok-secret" not in str(raised.value)


@pytest.mark.parametrize(("status", "reply", "state"), [
    (401, {"error": {"code": "token_invalidated"}}, "relogin"), (404, {}, "bad_response"),
    (403, {"error": {"code": "account_deactivated"}}, "deactivated"), (500, "oops", "server_error"),
    (403, {"error": {"code": "unsupported_country_region_territory"}}, "region_blocked"),
    (503, {}, "server_error"), (402, {"detail": "payment_required"}, "deactivated"),
])  # fmt: skip
def test_other_failures_have_their_state(status, reply, state):
    raw = reply if isinstance(reply, str) else json.dumps(reply)
    assert app.classify_failure(status, raw.encode()) == state


def fault_of(file=None, **options) -> str:
    """Return the state that a call which fails ends with."""
    with pytest.raises(app.QuotaFault) as raised:
        app.fetch_usage(file or account_file(), **options)
    return raised.value.state


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize("answer", [{"drip": 0.05}, {"endless": True}, {"hold": True}])
def test_reply_that_does_not_end_is_given_up_as_a_whole(chatgpt_here, answer, status):
    chatgpt_here.answer("tok-secret-1", status, body={"plan_type": "plus" * 20}, **answer)
    assert fault_of(deadline_s=0.4) == "timeout"
    if answer.get("endless"):
        chatgpt_here.wait_for(lambda: "ask_url" not in {thread.name for thread in threading.enumerate()}, 2)


def test_reply_that_is_too_large_or_cut_is_no_reading(chatgpt_here):
    chatgpt_here.answer("tok-secret-1", body={"plan_type": "plus"}, size=1024 * 1024 + 1)
    assert fault_of() == "bad_response"
    chatgpt_here.answer("tok-secret-1", body={"plan_type": "plus"}, cut_after=5)
    assert fault_of() in ("network", "bad_response")


def test_untrusted_certificate_and_socks_proxy_are_refused(chatgpt, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", chatgpt.proxy_url)
    assert fault_of() == "network" and chatgpt.requests == []
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")
    assert fault_of() == "proxy_unsupported"


@pytest.mark.parametrize(("proxy_url", "used"), [
    ("", "http://env:1"), ("http://own:2", "http://own:2"), ("direct", None), ("None", None),
])  # fmt: skip
def test_way_to_chatgpt_is_the_accounts_own_then_the_environments(monkeypatch, proxy_url, used):
    monkeypatch.setenv("https_proxy", "http://env:1")
    assert app.proxies_of(account_file(proxy_url=proxy_url)).get("https") == used
