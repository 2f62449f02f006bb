from __future__ import annotations

import base64
import io
import json
import os
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from support import QUOTA_BY_NAME, Watched, rows, write_account

import usage_dashboard as app

GOOD_BODY = QUOTA_BY_NAME["plus_5h_7d"]["body"]
NOW = 1800000000.0
HOUR, DAY = 3600.0, 86400.0


# ---- the world -------------------------------------------------------------------------------------------


@pytest.fixture
def world(chatgpt_here):
    return chatgpt_here


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "accounts"
    path.mkdir()
    return path


class Bench(Watched):
    """A refresher with its log, its stop event and a clock that the test moves."""

    RECHECK_S = 0.01

    def __init__(self, folder: Path, store: app.Store, seconds: int = 300) -> None:
        super().__init__()
        self.stream = io.StringIO()
        self.stop = threading.Event()
        self.now = NOW
        self.config = app.Config(auth_dir=str(folder), quota_refresh_seconds=seconds)
        self.refresher = app.QuotaRefresher(
            self.config, store, app.Log(self.stream), self.stop, clock=lambda: self.now, gap_s=(0, 0)
        )

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def describe(self) -> str:
        return f"state {self.refresher.state()}, log {self.lines}"

    def round(self) -> list[str]:
        """Run one round to its end and give its lines."""
        before = len(self.lines)
        thread = self.refresher.start()
        thread.join(10)
        assert not thread.is_alive() and not self.refresher.refreshing
        return self.lines[before:]


@pytest.fixture
def bench(folder, store, world):
    made = Bench(folder, store)
    yield made
    made.stop.set()
    world.release()
    made.wait_for(lambda: not made.refresher.refreshing)


def by_mail(store) -> dict[str, dict]:
    return {row["email"]: row for row in store.quotas()}


def states(store) -> list[str]:
    return [row["state"] for row in store.quotas()]


def everything(store, bench) -> str:
    """All that a person could see: rows, log and state."""
    with closing(sqlite3.connect(str(store.path))) as db:
        return "\n".join(db.iterdump()) + "\n".join(bench.lines) + json.dumps(bench.refresher.state())


# ---- a round ---------------------------------------------------------------------------------------------


def test_round_of_eight_accounts_asks_one_after_the_other(bench, folder, store, world):
    for number in range(1, 9):
        write_account(folder, number)
        world.answer(f"tok-secret-{number}", body=GOOD_BODY)
    bench.round()
    assert [request["token"] for request in world.requests] == [f"tok-secret-{number}" for number in range(1, 9)]
    assert (world.most_at_once, world.foreign_targets) == (1, [])
    assert states(store) == ["ok"] * 8
    assert bench.refresher.state()["progress"] == {"done": 8, "total": 8}


def test_round_prints_the_original_lines_with_masked_mails(bench, folder, world):
    write_account(folder, 1)
    write_account(folder, 2)
    world.answer(None, body=GOOD_BODY)
    assert bench.round() == [
        "refresh_quota: found 2 auth files",
        "refresh_quota: fetching quota for user1***@example.com...",
        "refresh_quota: saved quota for user1***@example.com",
        "refresh_quota: fetching quota for user2***@example.com...",
        "refresh_quota: saved quota for user2***@example.com",
    ]


@pytest.mark.parametrize(
    ("mails", "masked"),
    [
        (["an.nguyen@x.com"], ["a***@x.com"]),
        (["ravi@x.com", "rosa@x.com", "an@x.com"], ["ra***@x.com", "ro***@x.com", "a***@x.com"]),
        (["ravi@x.com", "ravi@y.com"], ["r***@x.com", "r***@y.com"]),
        (["an@x.com", "anna@x.com", "an@x.com"], ["an***@x.com", "ann***@x.com", "an***@x.com"]),
        (["no mail", "a@x.com"], ["***", "a***@x.com"]),
    ],
)
def test_mails_are_masked_as_far_as_they_can_be_told_apart(mails, masked):
    assert [app.mask_mail(mail, mails) for mail in mails] == masked


def test_link_into_a_closed_folder_hides_none_of_the_other_accounts(bench, folder, tmp_path, world):
    write_account(folder, 1)
    world.answer(None, body=GOOD_BODY)
    (folder / "codex-loop.json").symlink_to(folder / "codex-loop.json")  # as closed as a folder is, also to root
    (folder / "codex-gone.json").symlink_to(tmp_path / "nowhere.json")
    (folder / "folder.json").mkdir()
    os.mkfifo(str(folder / "pipe.json"))
    assert "refresh_quota: found 1 auth files" in bench.round()
    assert any("codex-loop.json is skipped" in line for line in bench.lines)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_link_into_a_folder_that_is_closed_is_named(bench, folder, tmp_path, world):
    write_account(folder, 1)
    world.answer(None, body=GOOD_BODY)
    closed = tmp_path / "closed"
    write_account(closed, 2)
    (folder / "codex-2.json").symlink_to(closed / "codex-2.json")
    closed.chmod(0)
    try:
        lines = bench.round()
    finally:
        closed.chmod(0o700)
    assert "refresh_quota: found 1 auth files" in lines
    assert any("codex-2.json is skipped" in line for line in lines)


def test_round_stores_the_reading_of_the_reply(bench, folder, store, world):
    write_account(folder)
    world.answer("tok-secret-1", body=GOOD_BODY)
    bench.round()
    (row,) = store.quotas()
    assert (row["email"], row["plan"], row["state"]) == ("user1@example.com", "plus", "ok")
    assert row["source"] == "refresh"
    # 23 % and 41 % used, as the sample says
    assert (row["primary_used_percent"], row["primary_remaining_percent"]) == (23, 77)
    assert (row["secondary_used_percent"], row["secondary_remaining_percent"]) == (41, 59)
    assert (row["primary_reset_at"], row["state_at"]) == ("2027-01-15T10:31:40Z", NOW)


@pytest.mark.parametrize("status", [200, 401, 500])
def test_round_leaves_no_token_or_id_anywhere(bench, folder, store, world, status):
    write_account(folder)
    claims = base64.urlsafe_b64encode(b'{"email": "user1@example.com"}').decode().rstrip("=")
    write_account(folder, 2, id_token=f"e30.{claims}.sig-secret")
    echo = {"error": {"message": "tok-secret-1 refresh-secret-1"}}
    world.answer(None, status=status, body=GOOD_BODY if status == 200 else echo)
    bench.round()
    said = everything(store, bench)
    for secret in ("tok-secret", "refresh-secret", "sig-secret", "acc-1", "user-SAMPLE", "sample@example.invalid"):
        assert secret not in said
    assert "user1@" not in "\n".join(bench.lines) and "user2@" not in "\n".join(bench.lines)


def test_round_never_changes_an_account_file(bench, folder, world):
    path = write_account(folder)
    world.answer(None, status=401, body={"error": {"code": "token_expired"}})
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    bench.round()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before and os.listdir(str(folder)) == ["codex-1.json"]


def test_round_reads_the_token_anew_each_time(bench, folder, store, world):
    write_account(folder, access_token="tok-old")
    world.answer("tok-new", body=GOOD_BODY)
    bench.round()
    assert states(store) == ["expired"]
    write_account(folder, access_token="tok-new")
    bench.now += 301
    bench.round()
    assert [request["token"] for request in world.requests] == ["tok-old", "tok-new"] and states(store) == ["ok"]


FAILURES = {
    "expired": dict(status=401, body={"detail": "Unauthorized"}),
    "rate_limited": dict(status=429),
    "server_error": dict(status=500, body="oops"),
    "blocked": dict(status=403, body="<html>challenge</html>"),
    "bad_response": dict(body="not json"),
}
ODD_BODIES = [
    [], "null", "7", "{}", '{"plan_type": "\\ud800"}', '{"rate_limit": {"primary_window": {"used_percent": NaN}}}',
    '{"rate_limit": ' * 400 + "1" + "}" * 400, '{"additional_rate_limits": [{"limit_name": "\\ud800"}]}',
    '{"x\\udfff": "\\udfff"}', '{"rate_limit": {"primary_window": {"used_percent": 1' + "0" * 400 + "}}}",
]  # fmt: skip


@pytest.mark.parametrize("state", sorted(FAILURES))
def test_round_with_one_failing_account_reads_the_others(bench, folder, store, world, state):
    for number in (1, 2, 3):
        write_account(folder, number)
        world.answer(f"tok-secret-{number}", body=GOOD_BODY)
    world.answer("tok-secret-2", **FAILURES[state])
    lines = bench.round()
    assert states(store) == ["ok", state, "ok"]
    assert lines[4] == f"refresh_quota: no quota for user2***@example.com: {app.QUOTA_MESSAGES[state]}"


@pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
def test_round_with_one_odd_body_reads_the_others(bench, folder, store, world, body):
    for number in (1, 2, 3):
        write_account(folder, number)
        world.answer(f"tok-secret-{number}", body=GOOD_BODY)
    world.answer("tok-secret-2", body=body)
    bench.round()
    known = by_mail(store)
    assert [known[f"user{number}@example.com"]["state"] for number in (1, 3)] == ["ok", "ok"]
    assert len(known) == 3 and bench.refresher.state()["progress"] == {"done": 3, "total": 3}


@pytest.mark.parametrize(
    "changes",
    [{"email": "u2\ud800@example.com"}, {"email": "x" * 5000}, {"email": "no mail at all"}, {"proxy_url": "http://[::1"},
     {"proxy_url": "ftp://x"}, {"proxy_url": "http://127.0.0.1:99999"}, {"proxy_url": "socks5://127.0.0.1:1"},
     {"proxy_url": "http://127.0.0.1:9"}],
    ids=["surrogate", "long", "no-mail", "bad-url", "ftp", "bad-port", "socks", "nobody-there"],
)  # fmt: skip
def test_round_with_one_odd_account_file_reads_the_others(bench, folder, store, world, changes):
    write_account(folder, 1)
    write_account(folder, 2, **changes)
    write_account(folder, 3)
    world.answer(None, body=GOOD_BODY)
    bench.round()
    known = by_mail(store)
    assert [known[f"user{number}@example.com"]["state"] for number in (1, 3)] == ["ok", "ok"] and len(known) == 3


def test_round_with_a_failure_keeps_the_last_good_reading_beside_it(bench, folder, store, world):
    write_account(folder)
    world.answer("tok-secret-1", body=GOOD_BODY)
    bench.round()
    bench.now += 301
    world.answer("tok-secret-1", status=500)
    bench.round()
    (row,) = store.quotas()
    assert (row["state"], row["state_at"], row["ts_epoch"]) == ("server_error", NOW + 301, NOW)
    assert row["primary_remaining_percent"] == 77


def test_round_does_not_ask_for_disabled_or_token_less_accounts(bench, folder, store, world):
    write_account(folder, 1, disabled=True)
    write_account(folder, 2, access_token="")
    write_account(folder, 3)
    world.answer("tok-secret-3", body=GOOD_BODY)
    bench.round()
    assert states(store) == ["disabled", "no_token", "ok"]
    assert [request["token"] for request in world.requests] == ["tok-secret-3"]


def test_round_with_a_half_written_file_names_it_without_the_mail(bench, folder, world):
    (folder / "codex-an.nguyen@example.com-plus.json").write_text("{", encoding="utf-8")
    lines = bench.round()
    assert "refresh_quota: found 0 auth files" in lines
    (problem,) = [line for line in lines if "skipped" in line]
    assert "an.nguyen@example.com" not in problem


# ---- one at a time, and the cool-down --------------------------------------------------------------------


def test_start_from_many_threads_at_once_begins_one_round(bench, folder, world):
    write_account(folder)
    world.answer("tok-secret-1", body=GOOD_BODY, hold=True)
    outcomes = []

    def begin():
        try:
            outcomes.append(bench.refresher.start())
        except app.RefreshRefused as refused:
            outcomes.append(refused.http_status)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    world.release()
    assert sum(outcome == 409 for outcome in outcomes) == 7


@pytest.mark.parametrize(("later", "left"), [(0, 300), (0.5, 300), (1, 299), (299.5, 1)])
def test_start_inside_the_cool_down_is_refused_with_429_and_the_seconds(bench, folder, world, later, left):
    write_account(folder)
    bench.round()
    bench.now = NOW + later
    with pytest.raises(app.RefreshRefused) as refused:
        bench.refresher.start()
    assert (refused.value.http_status, refused.value.code, refused.value.retry_after_s) == (429, "cooldown", left)
    assert bench.refresher.state()["cooldown_seconds"] == left and not bench.refresher.refreshing
    assert len(world.requests) == 1


@pytest.mark.parametrize("back_s", [1, 1000, 10 * DAY])
def test_round_that_a_wrong_clock_put_into_the_future_refuses_nothing(bench, folder, world, back_s):
    world.answer(None, body=GOOD_BODY)
    write_account(folder)
    rounds(bench, 0, -back_s)
    assert len(world.requests) == 2 and bench.refresher.state()["last_refresh"] == NOW - back_s


def test_cool_down_counts_from_the_start_of_the_round_not_its_end(bench, folder, world):
    write_account(folder)
    world.answer("tok-secret-1", body=GOOD_BODY, hold=True)
    thread = bench.refresher.start()
    world.wait_for(lambda: world.requests)
    bench.now += 100
    world.release()
    thread.join(10)
    assert bench.refresher.cooldown_s() == 200


def test_cool_down_is_kept_over_a_restart(bench, folder, store, world):
    write_account(folder)
    bench.round()
    again = Bench(folder, store)
    again.now = NOW + 60
    with pytest.raises(app.RefreshRefused) as refused:
        again.refresher.start()
    assert (refused.value.http_status, refused.value.retry_after_s) == (429, 240)


@pytest.mark.parametrize("files", ["none", "disabled", "token-less", "claude"])
def test_round_without_an_account_to_ask_starts_no_cool_down(bench, folder, world, files):
    if files == "disabled":
        write_account(folder, disabled=True)
    elif files == "token-less":
        write_account(folder, access_token="")
    elif files == "claude":
        write_account(folder, type="claude")
    bench.round()
    assert bench.refresher.cooldown_s() == 0
    bench.round()  # is not refused
    assert world.requests == []


def test_cool_down_of_zero_seconds_never_refuses(folder, store, world):
    world.answer(None, body=GOOD_BODY)
    bench = Bench(folder, store, seconds=0)
    write_account(folder)
    bench.round()
    bench.round()
    assert len(world.requests) == 2


def test_start_that_fails_leaves_the_way_free_for_the_next(bench, folder, store, world):
    write_account(folder)
    db = sqlite3.connect(str(store.path), isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    try:
        bench.round()
    finally:
        db.close()
    assert "locked" in bench.lines[-1] and not bench.refresher.refreshing
    bench.now += 301
    bench.round()
    assert len(world.requests) == 1


# ---- who is asked ----------------------------------------------------------------------------------------


def rounds(bench, *later_s: float) -> None:
    """Run a round at each of these seconds after NOW."""
    for seconds in later_s:
        bench.now = NOW + seconds
        bench.round()


def test_login_that_the_proxy_renews_meanwhile_is_asked_once_more(bench, folder, store, world):
    write_account(folder)
    world.answer("tok-secret-1", 401, hold=True)
    world.answer("tok-secret-new", body=GOOD_BODY)
    thread = bench.refresher.start()
    world.wait_for(lambda: world.requests)
    write_account(folder, access_token="tok-secret-new")
    world.release()
    thread.join(10)
    assert [request["token"] for request in world.requests] == ["tok-secret-1", "tok-secret-new"]
    assert states(store) == ["ok"]


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (dict(status=429, headers={"Retry-After": "3600"}), "rate_limited"),
        (dict(status=403, body="<html>"), "blocked"),
        (dict(status=401), "expired"),
        (dict(status=402), "deactivated"),
        (dict(status=500), "server_error"),
    ],
)
def test_every_round_asks_every_account_whatever_it_was_told_before(bench, folder, store, world, answer, state):
    for number in range(1, 7):
        write_account(folder, number)
    world.answer(None, **answer)
    world.answer("tok-secret-6", body=GOOD_BODY)
    rounds(bench, 0, 300, 600)
    assert [request["token"][-1] for request in world.requests] == list("123456") * 3
    assert states(store) == [state] * 5 + ["ok"]


def test_dead_proxies_of_some_accounts_keep_none_of_the_others_from_being_asked(bench, folder, store, world):
    for number in range(1, 6):
        write_account(folder, number, **({"proxy_url": "http://127.0.0.1:9"} if number < 5 else {}))
    world.answer(None, body=GOOD_BODY)
    bench.round()
    assert states(store) == ["network"] * 4 + ["ok"]


def test_account_that_is_switched_off_and_on_again_says_so(bench, folder, store, world):
    write_account(folder)
    bench.refresher.register_accounts()
    write_account(folder, disabled=True)
    bench.refresher.register_accounts()
    assert states(store) == ["disabled"]
    write_account(folder)
    bench.refresher.register_accounts()
    assert states(store) == ["never"] and world.requests == []


def test_account_seen_in_the_traffic_alone_outlives_the_rounds_for_a_week(bench, folder, store, world):
    write_account(folder)
    world.answer(None, body=GOOD_BODY)
    elsewhere = app.reading_row(app.parse_quota(GOOD_BODY, NOW), ("else@example.com", "#abc"), "", NOW)
    store.save_reading(elsewhere)
    rounds(bench, 300, 6 * DAY)
    assert set(by_mail(store)) == {"user1@example.com", "else@example.com"}
    rounds(bench, 7 * DAY + 1)
    assert set(by_mail(store)) == {"user1@example.com"}


def test_end_of_a_subscription_is_shown_as_the_id_token_has_it(bench, folder, store):
    auth = {"https://api.openai.com/auth": {"chatgpt_subscription_active_until": "2027-02-01T00:00:00+00:00"}}
    claims = base64.urlsafe_b64encode(json.dumps(auth).encode()).decode()
    write_account(folder, 1, id_token=f"h.{claims}.s")
    write_account(folder, 2)
    bench.refresher.register_accounts()
    assert [row["subscription_until"] for row in store.quotas()] == ["2027-02-01T00:00:00Z", None]


def test_each_account_is_stored_as_it_arrives(bench, folder, store, world):
    for number in (1, 2):
        write_account(folder, number)
        world.answer(f"tok-secret-{number}", body=GOOD_BODY, hold=number == 2)
    bench.refresher.start()
    world.wait_for(lambda: len(world.requests) == 2)
    assert states(store) == ["ok", "never"]


def test_stop_abandons_the_round(bench, folder, world):
    for number in (1, 2, 3):
        write_account(folder, number)
        world.answer(f"tok-secret-{number}", body=GOOD_BODY, hold=True)
    thread = bench.refresher.start()
    world.wait_for(lambda: world.requests)
    bench.stop.set()
    world.release()
    thread.join(10)
    assert not thread.is_alive() and len(world.requests) == 1


def test_account_whose_file_is_gone_is_forgotten_and_its_readings_stay(bench, folder, store, world):
    world.answer(None, body=GOOD_BODY)
    write_account(folder, 1)
    gone = write_account(folder, 2)
    bench.round()
    gone.unlink()
    bench.now += 301
    bench.round()
    assert list(by_mail(store)) == ["user1@example.com"]
    assert rows(store.path, "SELECT COUNT(*) FROM quota_snapshots WHERE email = 'user2@example.com'") == [(1,)]


@pytest.mark.parametrize("fault", ["half-written", "folder-gone"])
def test_account_whose_file_cannot_be_read_now_is_kept(bench, folder, store, world, fault):
    world.answer(None, body=GOOD_BODY)
    write_account(folder, 1)
    second = write_account(folder, 2)
    bench.round()
    if fault == "half-written":
        second.write_text("", encoding="utf-8")
    else:
        folder.rename(folder.parent / "elsewhere")
    bench.now += 301
    bench.round()
    assert len(by_mail(store)) == 2


def test_registered_accounts_are_listed_before_they_were_ever_asked(bench, folder, store, world):
    write_account(folder, 1)
    write_account(folder, 2, disabled=True)
    bench.refresher.register_accounts()
    assert states(store) == ["never", "disabled"] and world.requests == []
    assert bench.refresher.cooldown_s() == 0 and bench.refresher.known_files == 2


def test_registering_never_overwrites_what_was_stored_meanwhile(bench, folder, store):
    write_account(folder)
    (file,) = app.find_account_files([folder])[1]
    reading = app.reading_row(app.parse_quota(GOOD_BODY, NOW), (file.email, file.tag), "", NOW)
    store.save_reading(reading)
    bench.now += 60
    bench.refresher.register_accounts()
    (row,) = store.quotas()
    assert (row["state"], row["state_at"], row["primary_used_percent"]) == ("ok", NOW, 23)


def test_account_adopted_by_its_mail_keeps_its_reading_when_its_file_is_first_listed(bench, folder, store):
    adopted = app.reading_row(app.parse_quota(GOOD_BODY, NOW), ("user1@example.com", ""), "", NOW)
    store.save_reading({**adopted, "state": "limited"})
    write_account(folder)
    bench.refresher.register_accounts()
    (file,) = app.find_account_files([folder])[1]
    (row,) = store.quotas()
    assert (row["account_id_tag"], row["state"], row["primary_used_percent"]) == (file.tag, "limited", 23)


def test_account_adopted_by_a_mail_of_two_files_is_given_to_neither(bench, folder, store):
    adopted = app.reading_row(app.parse_quota(GOOD_BODY, NOW), ("same@example.com", ""), "", NOW)
    store.save_reading(adopted)
    write_account(folder, 1, email="same@example.com")
    write_account(folder, 2, email="same@example.com")
    bench.refresher.register_accounts()
    assert sorted((row["account_id_tag"] == "", row["state"]) for row in store.quotas()) == [
        (False, "never"), (False, "never"), (True, "ok")]  # fmt: skip


# ---- housekeeping ----------------------------------------------------------------------------------------


class OneTurn(threading.Event):
    """A stop event that notes the waits; the n-th long one ends the work, none takes time."""

    def __init__(self, turns: int = 1) -> None:
        super().__init__()
        self.turns = turns
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        if timeout > 60:
            self.turns -= 1
        return self.turns <= 0


def keep_house(bench, store, stop=None, **keys) -> list[str]:
    config = app.Config(auth_dir=bench.config.auth_dir, **keys)
    stop = stop or OneTurn()
    app.Housekeeper(config, store, bench.refresher, app.Log(bench.stream), stop, clock=lambda: bench.now).run()
    return bench.lines


def store_events(store, *times):
    made = [
        {"timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)), "model": "gpt-5.4",
         "tokens": {"input_tokens": 10, "output_tokens": 1, "total_tokens": 11}}
        for at in times
    ]  # fmt: skip
    parsed = app.parse_events([json.dumps(one).encode() for one in made])
    assert len(parsed.events) == len(times)
    store.store_batch(parsed, store.counts["sequence"] + 1, NOW)


def total_of(store) -> int:
    return rows(store.path, "SELECT SUM(total_tokens) FROM usage_by_day")[0][0]


def test_housekeeper_deletes_events_past_their_days_and_keeps_the_totals(bench, store):
    old = [NOW - 31 * DAY - number for number in range(2500)]  # more than one step deletes
    store_events(store, *old, NOW - 29 * DAY, NOW)
    keep_house(bench, store, retention_days=30)
    assert (store.event_count, total_of(store), store.find_faults()) == (2, 2502 * 11, [])


@pytest.mark.parametrize("ahead_s", [1.1 * DAY, 365 * DAY, -DAY, -365 * DAY])
def test_housekeeper_whose_clock_is_wrong_deletes_nothing(bench, store, ahead_s):
    store_events(store, NOW - 29 * DAY, NOW - HOUR, NOW)
    for day in range(60):
        reading = {"email": "an@example.com", "account_id_tag": "#1", "state": "ok"}
        store.save_reading({**reading, "ts_epoch": NOW - day * 60})
    bench.now = NOW + ahead_s
    keep_house(bench, store, retention_days=30)
    assert store.event_count == 3 and (store.get_meta("events_floor") or 0) * 900 <= NOW
    assert rows(store.path, "SELECT COUNT(*) FROM quota_snapshots") == [(60,)]
    bench.now = NOW + 2 * DAY  # the clock is right again, and a new event comes
    store_events(store, NOW + 2 * DAY)
    keep_house(bench, store, retention_days=30)
    assert store.event_count == 3 and store.find_faults() == []


def test_housekeeper_without_retention_deletes_nothing(bench, store):
    store_events(store, NOW - 2000 * DAY, NOW)
    keep_house(bench, store)
    assert store.event_count == 2


def test_housekeeper_downsamples_readings_older_than_two_weeks_to_one_an_hour(bench, folder, store, world):
    write_account(folder)
    world.answer("tok-secret-1", body=GOOD_BODY)
    hour = NOW - 15 * DAY - (NOW - 15 * DAY) % HOUR
    times = [hour, hour + 400, hour + 800, hour + HOUR, NOW - 13 * DAY, NOW - 13 * DAY + 400, NOW]
    for at in times:
        bench.now = at
        bench.round()
    keep_house(bench, store)
    assert rows(store.path, "SELECT ts_epoch FROM quota_snapshots ORDER BY id") == [(at,) for at in times[2:]]


def test_housekeeper_stopped_in_the_middle_goes_on_the_next_time(bench, store):
    store_events(store, *[NOW - 31 * DAY - number for number in range(4500)], NOW)
    keep_house(bench, store, stop=OneTurn(turns=0), retention_days=30)
    assert store.event_count == 2501  # one step of 2,000
    keep_house(bench, store, retention_days=30)
    assert store.event_count == 1


def test_housekeeper_with_a_locked_database_says_so_and_works_the_next_hour(bench, store):
    store_events(store, NOW - 31 * DAY, NOW)
    db = sqlite3.connect(str(store.path), isolation_level=None)
    db.execute("BEGIN IMMEDIATE")

    class Unlocking(OneTurn):
        def wait(self, timeout=None):
            db.close()
            return super().wait(timeout)

    stop = Unlocking(turns=2)
    lines = keep_house(bench, store, stop=stop, retention_days=30)
    assert [line for line in lines if "housekeeping" in line and "locked" in line] != []
    assert store.event_count == 1 and stop.waits.count(3600) == 2


@pytest.mark.parametrize("email", ["u2\ud800@example.com", "x" * 5000])
def test_housekeeper_with_an_odd_account_file_does_its_other_chores(bench, folder, store, email):
    write_account(folder, 2, email=email)
    store_events(store, NOW - 31 * DAY, NOW)
    keep_house(bench, store, retention_days=30)
    assert store.event_count == 1


def test_housekeeper_names_a_half_written_file_once_a_round_without_its_mail(bench, folder, store):
    (folder / "codex-an.nguyen@example.com-plus.json").write_text("{", encoding="utf-8")
    lines = keep_house(bench, store)
    assert "an.nguyen@example.com" not in "\n".join(lines)
