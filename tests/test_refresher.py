from __future__ import annotations

import io
import json
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest
from collecting import QuickStop
from sockets import PATIENCE_S, Watched
from support import QUOTA_BY_NAME, event, id_token, lock, put, rows, write_account

import usage_dashboard as app

GOOD_BODY = QUOTA_BY_NAME["plus_5h_7d"]["body"]
NOW = 1800000000.0
HOUR, DAY = 3600.0, 86400.0


# ---- the world -------------------------------------------------------------------------------------------


@pytest.fixture
def world(chatgpt_here):
    """ChatGPT, which answers every token well until it is told otherwise."""
    chatgpt_here.answer(None, body=GOOD_BODY)
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
        log, clock = app.Log(self.stream), lambda: self.now
        self.refresher = app.QuotaRefresher(self.config, store, log, self.stop, clock=clock, gap_s=(0, 0))

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def describe(self) -> str:
        return f"state {self.refresher.state()}, log {self.lines}"

    def round(self, *later_s: float) -> list[str]:
        """Return the lines of one round run to its end, or of one at each of these seconds after NOW."""
        before = len(self.lines)
        for seconds in later_s or [self.now - NOW]:
            self.now = NOW + seconds
            thread = self.refresher.start()
            thread.join(PATIENCE_S)
            assert not thread.is_alive() and not self.refresher.refreshing
        return self.lines[before:]


@pytest.fixture
def bench(folder, store, world):
    made = Bench(folder, store)
    yield made
    made.stop.set()
    world.release()
    made.wait_for(lambda: not made.refresher.refreshing)


@contextmanager
def held_round(bench, world, status=200):
    """Run one round to its end; its first answer is held back during the block."""
    world.answer("tok-secret-1", status, body=GOOD_BODY, hold=True)
    thread = bench.refresher.start()
    world.wait_for(lambda: world.requests)
    yield
    world.release()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def write_accounts(folder, count, **changes) -> list[Path]:
    return [write_account(folder, number, **changes) for number in range(1, count + 1)]


def save_reading(store, email, tag="", **changes):
    """Store a good reading of NOW."""
    store.save_reading({**app.reading_row(app.parse_quota(GOOD_BODY, NOW), (email, tag), "", NOW), **changes})


def by_mail(store) -> dict[str, dict]:
    return {row["email"]: row for row in store.quotas()}


def states(store) -> list[str]:
    return [row["state"] for row in store.quotas()]


def tokens(world) -> list[str]:
    return [request["token"] for request in world.requests]


# ---- a round ---------------------------------------------------------------------------------------------


def test_round_of_eight_accounts_asks_one_after_the_other(bench, folder, store, world):
    write_accounts(folder, 8)
    bench.round()
    assert tokens(world) == [f"tok-secret-{number}" for number in range(1, 9)]
    assert (world.most_at_once, world.foreign_targets) == (1, [])
    assert states(store) == ["ok"] * 8
    assert bench.refresher.state()["progress"] == {"done": 8, "total": 8}


@pytest.mark.parametrize(("mails", "masked"), [
    (["an.nguyen@x.com"], ["a***@x.com"]),
    (["ravi@x.com", "rosa@x.com", "an@x.com"], ["ra***@x.com", "ro***@x.com", "a***@x.com"]),
    (["ravi@x.com", "ravi@y.com"], ["r***@x.com", "r***@y.com"]),
    (["an@x.com", "anna@x.com", "an@x.com"], ["an***@x.com", "ann***@x.com", "an***@x.com"]),
    (["no mail", "a@x.com"], ["***", "a***@x.com"]),
])  # fmt: skip
def test_mails_are_masked_as_far_as_they_can_be_told_apart(mails, masked):
    assert [app.mask_mail(mail, mails) for mail in mails] == masked


def test_link_into_a_closed_folder_hides_none_of_the_other_accounts(bench, folder, tmp_path):
    write_account(folder, 1)
    (folder / "codex-loop.json").symlink_to(folder / "codex-loop.json")  # as closed as a folder is, also to root
    (folder / "codex-gone.json").symlink_to(tmp_path / "nowhere.json")
    (folder / "folder.json").mkdir()
    os.mkfifo(str(folder / "pipe.json"))
    (folder / "codex-an.nguyen@example.com-plus.json").write_text("{", encoding="utf-8")
    assert "refresh_quota: found 1 auth files" in bench.round()
    assert any("codex-loop.json is skipped" in line for line in bench.lines)
    assert sum("skipped" in line for line in bench.lines) > 1 and "an.nguyen@" not in "\n".join(bench.lines)


@pytest.mark.parametrize("status", [200, 401, 500])
def test_round_leaves_no_token_or_id_anywhere(bench, folder, store, world, status):
    write_account(folder)
    write_account(folder, 2, id_token=id_token({"email": "user1@example.com"}))
    echo = {"error": {"message": "tok-secret-1 refresh-secret-1"}}
    world.answer(None, status=status, body=GOOD_BODY if status == 200 else echo)
    bench.round()
    with closing(sqlite3.connect(str(store.path))) as db:
        said = "\n".join([*db.iterdump(), *bench.lines, json.dumps(bench.refresher.state())])
    for secret in ("tok-secret", "refresh-secret", "sig-secret", "acc-1", "user-SAMPLE", "sample@example.invalid"):
        assert secret not in said
    assert "user1@" not in "\n".join(bench.lines) and "user2@" not in "\n".join(bench.lines)


def test_round_never_changes_an_account_file(bench, folder, world):
    path = write_account(folder)
    path.chmod(0o400)
    world.answer(None, status=401, body={"error": {"code": "token_expired"}})
    before = (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode)
    bench.round()
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) == before
    assert os.listdir(str(folder)) == ["codex-1.json"]


ODD_ANSWERS = [
    ("expired", 401, '{"detail": "Unauthorized"}'), ("bad_response", 200, "not json"), ("bad_response", 200, "7"),
    ("no_windows", 200, "{}"),
    ("no_windows", 200, '{"plan_type": "\\ud800"}'), ("no_windows", 200, '{"x\\udfff": "\\udfff"}'),
    ("no_windows", 200, '{"additional_rate_limits": [{"limit_name": "\\ud800"}]}'),
    ("no_windows", 200, '{"rate_limit": ' * 400 + "1" + "}" * 400),
    ("ok", 200, '{"rate_limit": {"primary_window": {"used_percent": NaN}}}'),
    ("ok", 200, '{"rate_limit": {"primary_window": {"used_percent": 1' + "0" * 400 + "}}}"),
]  # fmt: skip
ODD_FILES = [
    ("ok", {"email": "u2\ud800@example.com"}), ("ok", {"email": "x" * 5000}), ("ok", {"email": "no mail at all"}),
    ("network", {"proxy_url": "http://[::1"}), ("network", {"proxy_url": "ftp://x"}),
    ("network", {"proxy_url": "http://127.0.0.1:99999"}), ("network", {"proxy_url": "http://127.0.0.1:9"}),
    ("proxy_unsupported", {"proxy_url": "socks5://127.0.0.1:1"}),
]  # fmt: skip
ODD_ACCOUNTS = [(state, {}, status, body) for state, status, body in ODD_ANSWERS]
ODD_ACCOUNTS += [(state, changes, 200, GOOD_BODY) for state, changes in ODD_FILES]


@pytest.mark.parametrize(("state", "changes", "status", "body"), ODD_ACCOUNTS, ids=range(len(ODD_ACCOUNTS)))
def test_round_with_one_odd_account_reads_the_others(bench, folder, store, world, state, changes, status, body):
    write_accounts(folder, 3)
    write_account(folder, 2, **changes)
    world.answer("tok-secret-2", status, body=body)
    lines = bench.round()
    known = by_mail(store)
    assert [known.pop(f"user{number}@example.com")["state"] for number in (1, 3)] == ["ok", "ok"]
    assert [row["state"] for row in known.values()] == [state]
    assert bench.refresher.state()["progress"] == {"done": 3, "total": 3}
    told = f"refresh_quota: no quota for user2***@example.com: {app.QUOTA_MESSAGES.get(state)}"
    assert lines.count(told) == (state in app.QUOTA_MESSAGES)


def test_round_with_a_failure_keeps_the_last_good_reading_beside_it(bench, folder, store, world):
    write_account(folder)
    bench.round()
    world.answer("tok-secret-1", status=500)
    bench.round(301)
    (row,) = store.quotas()
    assert (row["state"], row["state_at"], row["ts_epoch"]) == ("server_error", NOW + 301, NOW)
    assert (row["primary_remaining_percent"], row["secondary_used_percent"], row["source"]) == (77, 41, "refresh")
    assert json.loads(row["raw_json"])["plan_type"] == row["plan"] == "plus"


# ---- one at a time, and the cool-down --------------------------------------------------------------------


def test_start_from_many_threads_at_once_begins_one_round(bench, folder, world):
    write_account(folder)
    world.answer("tok-secret-1", body=GOOD_BODY, hold=True)

    def begin(_):
        try:
            return bench.refresher.start()
        except app.ApiError as refused:
            return refused.http_status

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(begin, range(8)))
    world.release()
    assert outcomes.count(409) == 7


@pytest.mark.parametrize(("later", "left"), [(0, 300), (0.5, 300), (1, 299), (299.5, 1)])
def test_start_inside_the_cool_down_is_refused_also_after_a_restart(bench, folder, store, world, later, left):
    write_account(folder)
    bench.round()
    again = Bench(folder, store)
    bench.now = again.now = NOW + later
    for refresher in (bench.refresher, again.refresher):
        with pytest.raises(app.ApiError) as refused:
            refresher.start()
        assert (refused.value.http_status, refused.value.code) == (429, "cooldown")
        assert refused.value.headers == {"Retry-After": str(left)}
        assert refresher.state()["cooldown_seconds"] == left and not refresher.refreshing
    assert len(world.requests) == 1


@pytest.mark.parametrize(("seconds", "back_s"), [(300, 1), (300, 1000), (300, 10 * DAY), (0, 0)])
def test_round_of_the_future_or_without_a_cool_down_refuses_nothing(folder, store, world, seconds, back_s):
    write_account(folder)
    bench = Bench(folder, store, seconds)
    bench.round(0, -back_s)
    assert len(world.requests) == 2 and bench.refresher.state()["last_refresh"] == NOW - back_s


def test_cool_down_counts_from_the_start_of_the_round_not_its_end(bench, folder, world):
    write_account(folder)
    with held_round(bench, world):
        bench.now += 100
    assert bench.refresher.cooldown_s() == 200


@pytest.mark.parametrize("changes", [None, {"disabled": True}, {"type": "claude"}])
def test_start_without_a_codex_file_to_ask_is_refused_and_starts_no_cool_down(bench, folder, world, changes):
    if changes:
        write_account(folder, **changes)
    for _ in range(2):
        with pytest.raises(app.ApiError) as refused:
            bench.refresher.start()
        assert (refused.value.http_status, refused.value.code) == (409, "no_account_files")
        assert bench.refresher.cooldown_s() == 0 and not bench.refresher.refreshing
    write_account(folder, 2)
    bench.round()
    assert len(world.requests) == 1


def test_round_of_accounts_without_a_token_starts_no_cool_down(bench, folder, store, world):
    write_account(folder, access_token="")
    bench.round(0, 0)
    assert (world.requests, states(store), bench.refresher.cooldown_s()) == ([], ["no_token"], 0)


def test_start_that_fails_leaves_the_way_free_for_the_next(bench, folder, store, world):
    write_account(folder)
    with closing(lock(store)):
        bench.round()
    assert "locked" in bench.lines[-1] and not bench.refresher.refreshing
    bench.round(301)
    assert len(world.requests) == 1


# ---- who is asked ----------------------------------------------------------------------------------------


def test_token_that_the_proxy_renews_during_the_round_is_the_one_to_ask_with(bench, folder, store, world):
    write_account(folder)
    write_account(folder, 2)
    with held_round(bench, world):
        write_account(folder, 2, access_token="tok-secret-new")
    assert tokens(world) == ["tok-secret-1", "tok-secret-new"]
    assert states(store) == ["ok", "ok"]


@pytest.mark.parametrize(("state", "answer", "changes", "asked"), [
    ("rate_limited", dict(status=429, headers={"Retry-After": "3600"}), {}, "123456"),
    ("blocked", dict(status=403, body="<html>"), {}, "123456"), ("expired", dict(status=401), {}, "123456"),
    ("deactivated", dict(status=402), {}, "123456"), ("server_error", dict(status=500), {}, "123456"),
    ("network", {}, {"proxy_url": "http://127.0.0.1:9"}, "6"),
])  # fmt: skip
def test_every_round_asks_every_account_again(bench, folder, store, world, state, answer, changes, asked):
    write_accounts(folder, 5, **changes)
    write_account(folder, 6)
    world.answer(None, **answer)
    world.answer("tok-secret-6", body=GOOD_BODY)
    bench.round(0, 300, 600)
    assert [token[-1] for token in tokens(world)] == list(asked) * 3
    assert states(store) == [state] * 5 + ["ok"]


def test_account_is_listed_before_it_was_ever_asked_also_when_switched_off_and_on_again(bench, folder, store, world):
    for disabled, state in ((False, "never"), (True, "disabled"), (False, "never")):
        write_account(folder, disabled=disabled)
        bench.refresher.register_accounts()
        assert (states(store), bench.refresher.known_files) == ([state], 1)
    assert world.requests == [] and bench.refresher.cooldown_s() == 0
    bench.round()
    for disabled, state in ((True, "disabled"), (False, "ok")):  # as it was read before
        write_account(folder, disabled=disabled)
        bench.refresher.register_accounts()
        assert states(store) == [state]


def test_account_seen_in_the_traffic_alone_outlives_the_rounds_for_a_week(bench, folder, store):
    write_account(folder)
    save_reading(store, "else@example.com", "#abc")
    bench.round(300, 6 * DAY)
    assert set(by_mail(store)) == {"user1@example.com", "else@example.com"}
    bench.round(7 * DAY + 1)
    assert set(by_mail(store)) == {"user1@example.com"}


def test_end_of_a_subscription_is_shown_as_the_id_token_has_it(bench, folder, store):
    auth = {"https://api.openai.com/auth": {"chatgpt_subscription_active_until": "2027-02-01T00:00:00+00:00"}}
    write_account(folder, 1, id_token=id_token(auth))
    write_account(folder, 2)
    bench.refresher.register_accounts()
    assert [row["subscription_until"] for row in store.quotas()] == ["2027-02-01T00:00:00Z", None]


def test_stop_abandons_the_round(bench, folder, world):
    write_accounts(folder, 3)
    with held_round(bench, world):
        bench.stop.set()
    assert len(world.requests) == 1


@pytest.mark.parametrize(("fault", "kept"), [("gone", 1), ("half-written", 2), ("folder-gone", 2)])
def test_account_whose_file_is_gone_is_forgotten_but_for_its_readings(bench, folder, store, fault, kept):
    _, second = write_accounts(folder, 2)
    bench.round()
    if fault == "gone":
        second.unlink()
    elif fault == "half-written":
        second.write_text("", encoding="utf-8")
    else:
        folder.rename(folder.parent / "elsewhere")
    bench.now += 301
    with pytest.raises(app.ApiError) if fault == "folder-gone" else nullcontext():
        bench.round()
    assert list(by_mail(store)) == ["user1@example.com", "user2@example.com"][:kept]
    assert rows(store.path, "SELECT COUNT(*) FROM quota_snapshots WHERE email = 'user2@example.com'") == [(1,)]


@pytest.mark.parametrize("adopted", [False, True])
def test_first_listing_of_a_file_overwrites_nothing_that_is_known(bench, folder, store, adopted):
    write_account(folder)
    (file,) = app.find_account_files([folder])[1]
    save_reading(store, file.email, "" if adopted else file.tag, state="limited")
    bench.now += 60
    bench.refresher.register_accounts()
    (row,) = store.quotas()
    assert (row["account_id_tag"], row["state"], row["state_at"]) == (file.tag, "limited", NOW)
    assert row["primary_used_percent"] == 23


def test_account_adopted_by_a_mail_of_two_files_is_given_to_neither(bench, folder, store):
    save_reading(store, "same@example.com")
    write_accounts(folder, 2, email="same@example.com")
    bench.refresher.register_accounts()
    assert sorted((row["account_id_tag"] == "", row["state"]) for row in store.quotas()) == [
        (False, "never"), (False, "never"), (True, "ok")]  # fmt: skip


# ---- housekeeping ----------------------------------------------------------------------------------------


class OneTurn(QuickStop):
    """A stop event of which the n-th long wait ends the work; none takes time."""

    def __init__(self, turns: int = 1) -> None:
        super().__init__()
        self.turns = turns

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        self.turns -= timeout > 60
        return self.turns <= 0


def keep_house(bench, store, stop=None, retention_days=0) -> list[str]:
    log, stop = app.Log(bench.stream), stop or OneTurn()
    app.keep_house(store, bench.refresher, retention_days, log, stop, clock=lambda: bench.now)
    return bench.lines


def store_events(store, *times):
    put(store, *(event(at=at, total_tokens=11) for at in times))


@pytest.mark.parametrize(("days", "left"), [(30, 2), (0, 2503)])
def test_housekeeper_deletes_events_past_their_days_and_keeps_the_totals(bench, store, days, left):
    old = [NOW - 31 * DAY - number for number in range(2500)]  # more than one step deletes
    store_events(store, *old, NOW - 2000 * DAY, NOW - 29 * DAY, NOW)
    keep_house(bench, store, retention_days=days)
    assert (store.event_count, store.find_faults()) == (left, [])
    assert rows(store.path, "SELECT SUM(total_tokens) FROM usage_by_day") == [(2503 * 11,)]


@pytest.mark.parametrize("ahead_s", [1.1 * DAY, 365 * DAY, -DAY, -365 * DAY])
def test_housekeeper_whose_clock_is_wrong_deletes_nothing(bench, store, ahead_s):
    store_events(store, NOW - 29 * DAY, NOW - HOUR, NOW)
    for day in range(60):
        reading = {"email": "an@example.com", "account_id_tag": "#1", "ts_epoch": NOW - day * 60, "state": "ok"}
        store.save_reading(reading)
    bench.now = NOW + ahead_s
    keep_house(bench, store, retention_days=30)
    assert store.event_count == 3 and (store.get_meta("events_floor") or 0) * 900 <= NOW
    assert rows(store.path, "SELECT COUNT(*) FROM quota_snapshots") == [(60,)]
    bench.now = NOW + 2 * DAY  # the clock is right again, and a new event comes
    store_events(store, NOW + 2 * DAY)
    keep_house(bench, store, retention_days=30)
    assert store.event_count == 3 and store.find_faults() == []


def test_housekeeper_downsamples_readings_older_than_two_weeks_to_one_an_hour(bench, folder, store):
    write_account(folder)
    hour = NOW - 15 * DAY - (NOW - 15 * DAY) % HOUR
    times = [hour, hour + 400, hour + 800, hour + HOUR, NOW - 13 * DAY, NOW - 13 * DAY + 400, NOW]
    bench.round(*(at - NOW for at in times))
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
    db = lock(store)

    class Unlocking(OneTurn):
        def wait(self, timeout=None):
            db.close()
            return super().wait(timeout)

    stop = Unlocking(turns=2)
    lines = keep_house(bench, store, stop=stop, retention_days=30)
    assert [line for line in lines if "housekeeping" in line and "locked" in line] != []
    assert store.event_count == 1 and stop.waits.count(3600) == 2
