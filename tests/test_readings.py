"""Quota readings from the requests' own headers, how they age, and what they let one say of the time to come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import SAMPLES, put, record, rows, run_sql, write_account

import usage_dashboard as app

NOW = 1800000000.0
HEADERS = {
    "x-codex-plan-type": "plus", "x-codex-primary-used-percent": "42", "x-codex-primary-window-minutes": "300",
    "x-codex-primary-reset-at": str(int(NOW) + 7200), "x-codex-secondary-used-percent": "17",
    "x-codex-secondary-window-minutes": "10080", "x-codex-secondary-reset-at": str(int(NOW) + 86400),
}  # fmt: skip


def read(**changes) -> app.Reading:
    headers = {**HEADERS, **{name.replace("_", "-"): text for name, text in changes.items()}}
    return app.parse_quota(app.payload_of_headers({k: v for k, v in headers.items() if v is not None}), NOW)


def test_headers_of_a_sample_give_plan_windows_and_resets():
    headers = app.parse_events([SAMPLES[2]]).events[0].quota_headers
    reading = app.parse_quota(app.payload_of_headers(headers), NOW)
    assert (reading.plan, reading.state) == ("plus", "ok")
    assert app.fullest(reading.windows, "5h") == app.QuotaWindow("5h", 18000, 42, 1785300000, None)
    assert app.fullest(reading.windows, "7d") == app.QuotaWindow("7d", 604800, 17, 1785700000, None)


@pytest.mark.parametrize(("name", "text"), [
    ("window_minutes", "0"), ("window_minutes", None), ("window_minutes", "1e17"), ("window_minutes", "-300"),
    ("used_percent", None), ("used_percent", "nan"), ("used_percent", ""), ("reset_at", ""), ("reset_at", "-1"),
    ("reset_at", "1234567890"), ("reset_at", "9e99"),  # the first of these two was in 2009
])  # fmt: skip
def test_header_window_without_a_sound_length_percentage_or_reset_is_absent(name, text):
    reading = read(**{f"x_codex_primary_{name}": text})
    assert (app.fullest(reading.windows, "5h"), app.fullest(reading.windows, "7d").used_percent) == (None, 17)


def test_header_reset_may_be_given_as_seconds_from_now():
    reading = read(x_codex_primary_reset_at=None, x_codex_primary_reset_after_seconds="60")
    assert app.fullest(reading.windows, "5h").reset_at == NOW + 60


@pytest.mark.parametrize(("sent", "shown"), [
    ({"unlimited": "True", "balance": "1"}, "unlimited"), ({"balance": "9.5"}, "9.5"), ({"balance": ""}, None),
    ({}, None),
])  # fmt: skip
def test_headers_tell_the_credits(sent, shown):
    assert read(**{f"x_codex_credits_{name}": text for name, text in sent.items()}).credits_balance == shown


class World:
    """A store with a folder of account files and readings from traffic, on clocks that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.accounts = folder / "accounts"
        self.accounts.mkdir()
        self.store = app.Store(folder / "usage.db")
        self.later_s = 0.0
        self.files = app.AccountFiles([self.accounts])
        clocks = (lambda: NOW + self.later_s, lambda: 1000.0 + self.later_s)
        self.traffic = app.TrafficReadings(self.files, self.store, *clocks)

    def file(self, mail: str, **changes) -> Path:
        return write_account(self.accounts, email=mail, **changes)

    def event(self, headers=None, *, at: float = 0.0, **changes) -> app.Event:
        sent = {"auth_index": "aa", "source": "an@example.com", "request_id": "", **changes}
        sent = record(timestamp=app.utc_text(NOW + at), model="m", **sent)
        self.files.look(0)
        (event,) = app.parse_events([json.dumps(sent).encode()], self.files.contexts).events
        return event._replace(quota_headers={**HEADERS, **(headers or {})}, plan=(headers or HEADERS).get(
            "x-codex-plan-type", "plus"))  # fmt: skip

    def take(self, *events: app.Event) -> None:
        """Store the events and save the readings that are due, as the collector does."""
        put(self.store, *events)
        self.traffic.note(events)
        self.traffic.save_due()

    def ask(self, percent: float, later_s: float = 0.0, *, at: float | None = None, **changes) -> None:
        """Take one request so many seconds after NOW, whose headers say so many percent."""
        self.later_s = later_s
        self.take(self.event(used(percent), at=later_s if at is None else at, **changes))

    def shown(self) -> list[tuple]:
        return [(row["email"], row["plan"], row["primary_used_percent"]) for row in self.store.quotas()]

    def count(self) -> int:
        return rows(self.store.path, "SELECT COUNT(*) FROM quota_snapshots")[0][0]


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.store.close()


def used(percent: float) -> dict[str, str]:
    return {"x-codex-primary-used-percent": str(percent)}


def test_reading_counts_from_the_first_token_and_never_from_the_future(world):
    world.file("an@example.com")
    world.ask(42, at=-100, ttft_ms=30_000)
    assert world.store.quotas()[0]["ts_epoch"] == NOW - 70
    world.ask(43, 60, at=3000)
    assert world.store.quotas()[0]["ts_epoch"] == NOW + 60
    world.ask(40, 121, at=30)  # an older one never replaces a newer one
    assert (world.count(), world.shown()[0][2]) == (2, 43)


@pytest.mark.parametrize(("disabled", "source", "shown"), [
    (True, "an@example.com", []), (False, "b@example.com", [("b@example.com", "plus", 42)]),
])  # fmt: skip
def test_reading_of_an_account_without_a_file_has_a_row_and_of_a_disabled_one_none(world, disabled, source, shown):
    world.file("an@example.com", disabled=disabled)
    world.take(world.event(source=source, auth_index="bb"))
    assert world.shown() == shown


def test_reading_with_a_key_as_its_source_is_told_by_the_mail_last_seen_with_the_index(world):
    world.ask(42)
    world.ask(50, 61, source="sk-client-secret-0001")
    assert world.shown() == [("an@example.com", "plus", 50)]
    world.ask(60, 200, source="sk-client-secret-0001", auth_index="zz")
    assert world.shown() == [("an@example.com", "plus", 50)]


USED_UP = {"failed": True, "fail": {"status_code": 429, "body": ""}}


@pytest.mark.parametrize(("request_id", "attempts", "shown"), [
    ("r1", [("a", 91, {"failed": True}), ("b", 91, {}), ("c", 12, {})], ("c@example.com", "plus", 12)),
    ("", [("a", 100, USED_UP), ("b", 100, USED_UP)], ("a@example.com", "plus", 100)),
])  # fmt: skip
def test_headers_of_another_accounts_earlier_attempt_are_not_booked(world, request_id, attempts, shown):
    """The second attempt, by another account, ends before any reply and shows the first one's headers."""
    world.take(*(
        world.event(used(percent), auth_index=2 * name, source=f"{name}@example.com", request_id=request_id, **more)
        for name, percent, more in attempts
    ))  # fmt: skip
    assert world.shown() == [shown]


def test_account_without_a_file_stays_one_row_over_a_new_login(world):
    world.ask(42)
    world.ask(50, 3600, auth_index="new")
    assert world.shown() == [("an@example.com", "plus", 50)]


@pytest.mark.parametrize(
    ("status", "percent", "booked"), [(429, 100, True), (429, 60, False), (401, 100, False), (500, 100, False)]
)
def test_failure_is_believed_only_where_it_and_its_headers_say_used_up(world, status, percent, booked):
    fail = {"status_code": status, "body": ""}
    world.ask(percent, failed=True, fail=fail, request_id="r1")
    assert [row["state"] for row in world.store.quotas()] == (["limited"] if booked else [])


def test_readings_are_saved_once_a_minute_at_most_and_the_newest_of_it(world):
    world.ask(1)
    for second in range(1, 60):
        world.ask(second, second)
    assert world.shown()[0][2] == 1
    world.later_s = 60
    world.traffic.save_due()
    assert world.shown()[0][2] == 59


def test_readings_of_five_minutes_are_one_row_and_it_is_the_newest(world):
    assert NOW % 300 == 0
    for minute in range(11):
        world.ask(minute, 60 * minute)
    kept = rows(world.store.path, "SELECT ts_epoch, timestamp, primary_used_percent, raw_json FROM quota_snapshots")
    assert kept == [(NOW + at, app.utc_text(NOW + at), at / 60, None) for at in (240, 540, 600)]
    assert world.store.quotas()[0]["ts_epoch"] == NOW + 600


def test_reading_by_a_clock_that_was_ahead_gives_way_to_the_next(world):
    world.ask(42)
    run_sql(world.store.path, f"UPDATE quota_snapshots SET ts_epoch = {NOW + 864000}")
    world.ask(90, 61)
    assert (world.shown()[0][2], world.store.quotas()[0]["ts_epoch"]) == (90, NOW + 61)


def test_reading_of_a_request_is_not_merged_into_that_of_a_refresh(world):
    world.file("an@example.com")
    (file,) = app.find_account_files([world.accounts])[1]
    five_hour = {"used_percent": 42, "limit_window_seconds": 18000, "reset_at": int(NOW) + 7200}
    weekly = {"used_percent": 17, "limit_window_seconds": 604800, "reset_at": int(NOW) + 86400}
    limit = {"allowed": False, "limit_reached": True, "primary_window": five_hour, "secondary_window": weekly}
    reply = {"plan_type": "plus", "rate_limit": limit}
    world.store.save_reading(app.snapshot_of(file, reply, NOW))
    world.take(world.event())
    (row,) = world.store.quotas()
    assert world.count() == 2
    assert (row["source"], row["state"], row["allowed"], row["limit_reached"]) == ("traffic", "ok", None, None)


def test_reading_from_traffic_ends_a_failure_of_the_refresh(world):
    world.file("an@example.com")
    (file,) = app.find_account_files([world.accounts])[1]
    world.store.save_quota_state(file.email, file.tag, None, "expired", "token expired", NOW - 60)
    world.take(world.event())
    (row,) = world.store.quotas()
    assert (row["state"], row["message"]) == ("ok", None)


def test_windows_of_a_row_of_the_original_are_in_its_columns():
    places = {"primary_used_percent": 10, "primary_reset_at": "2027-01-15T10:00:00Z",
              "secondary_used_percent": 20, "secondary_reset_at": "01/15 17:00"}  # fmt: skip
    five_hour, weekly = app.windows_of({"windows": None, **places})
    assert five_hour == app.QuotaWindow("5h", 18000, 10, NOW + 7200, None)
    assert weekly == app.QuotaWindow("7d", 604800, 20, None, None)
    assert app.windows_of({"windows": None, **places, "secondary_used_percent": None}) == [five_hour]


@pytest.mark.parametrize(("state", "five_hour_reset", "weekly_used", "shown"), [
    ("limited", NOW - 1, 20, "reset_due"), ("limited", NOW + 1, 20, "limited"), ("limited", NOW - 1, 100, "limited"),
    ("ok", NOW - 1, 20, "ok"), ("expired", NOW - 1, 20, "expired"),
])  # fmt: skip
def test_limit_whose_reset_has_passed_is_no_longer_called_limited(state, five_hour_reset, weekly_used, shown):
    five_hour = app.QuotaWindow("5h", 18000, 100, five_hour_reset, None)
    weekly = app.QuotaWindow("7d", 604800, weekly_used, NOW + 999, None)
    assert app.state_at(state, [five_hour, weekly], NOW) == shown


def line(*used_percents: float, every_s: float = 300.0, until: float = NOW, reset_at: float = NOW + 7200):
    first = until - (len(used_percents) - 1) * every_s
    times = [first + number * every_s for number in range(len(used_percents))]
    return [(at, used, reset_at) for at, used in zip(times, used_percents)]


WEEK = {"reset_at": NOW + 6 * 86400}


@pytest.mark.parametrize(("points", "used_per_hour", "runs_out_in_s"), [
    # 10 % in 20 minutes are 30 an hour; the 40 % that are left take 80 minutes, and the reset is in two hours.
    (line(50, 52, 55, 58, 60), 30, 4800), (line(20, 21, 22), 12, None), (line(20, 20, 20), 0, None),
    (line(0, 50, every_s=3000, until=NOW - 1000) + line(50, 51, 52), 7.2, None),  # one hour back and no more
    (line(10, 30, 60, **WEEK), 300, 480),
])  # fmt: skip
def test_forecast_says_at_the_pace_of_the_last_hour_when_it_runs_out(points, used_per_hour, runs_out_in_s):
    told = app.forecast(points, NOW)
    assert told["used_per_hour"] == pytest.approx(used_per_hour, abs=0.01)
    assert told["runs_out_at"] == (runs_out_in_s and app.utc_text(NOW + runs_out_in_s))


@pytest.mark.parametrize("points", [
    [], line(10, 20), line(10, 15, 20, every_s=299), line(10, 15, 20, until=NOW - 901), line(80, 90, 100),
    line(10, 15, 20, reset_at=NOW - 1),
    line(70, 80, 5, 6),  # it was reset in between
    line(5, 8)[:2] + line(10, 15, reset_at=NOW + 90000),  # its reset moved
    line(10, 15, 20, every_s=1801)[:1] + line(18, 20),  # an hour ago is another pace
    # 1 % in ten minutes, where 89 % are left for six days: it may as well have been a tenth of that.
    line(10, 10, 11, **WEEK),
])  # fmt: skip
def test_forecast_says_nothing_where_it_cannot_know(points):
    assert app.forecast(points, NOW) is None


def member(left: float, pace: float | None, *, plan: str = "plus", state: str = "ok", reset_in: float = 7200) -> dict:
    window = {"label": "5h", "seconds": 18000, "meter": None, "remaining_percent": left,
              "reset_at": app.utc_text(NOW + reset_in),
              "forecast": None if pace is None else {"used_per_hour": pace, "runs_out_at": None}}  # fmt: skip
    return {"plan": plan, "state": state, "windows": [window]}


def until(reset_in_s: float, runs_out_in_s: float | None) -> dict:
    return {"runs_out_at": runs_out_in_s and app.utc_text(NOW + runs_out_in_s), "until": app.utc_text(NOW + reset_in_s)}


DEAD = [member(100, None, state=state) for state in ("disabled", "deactivated", "relogin", "no_token")]


@pytest.mark.parametrize(("members", "accounts", "remaining_percent", "reset_in_s", "forecast"), [
    ([member(80, None), member(40, None, reset_in=600)], 2, 60, 600, None),
    # 30 + 30 % are left and 60 % an hour are used: an hour, and the first reset is in two.
    ([member(30, 20), member(30, 40)], 2, 30, 7200, until(7200, 3600)),
    ([member(30, 20), member(30, 40, reset_in=3599)], 2, 30, 3599, until(3599, None)),
    # A limited account is empty whatever its bar says, and some accounts are of no use.
    ([member(30, 60), member(90, None, state="limited")], 2, 15, 7200, until(7200, 1800)),
    ([member(10, 30), *DEAD], 1, 10, 7200, until(7200, 1200)),
    # A window that came back, a pace that is unknown, plans that differ, nothing left.
    ([member(10, 30), member(None, None)], 1, 10, 7200, None),
    ([member(30, 20), member(50, None)], 2, 40, 7200, None),
    ([member(30, 20), member(30, 20, plan="pro")], 2, 30, 7200, None),
    ([member(0, None)], 1, 0, 7200, None),
])  # fmt: skip
def test_pool_sums_what_is_left_and_whether_it_lasts(members, accounts, remaining_percent, reset_in_s, forecast):
    (pool,) = app.pool_of(members, NOW)
    assert (pool["label"], pool["accounts"], pool["remaining_percent"]) == ("5h", accounts, remaining_percent)
    assert (pool["next_reset_at"], pool["forecast"]) == (app.utc_text(NOW + reset_in_s), forecast)


def test_pool_leaves_out_extra_meters_and_unknown_windows():
    odd = member(None, None)
    extra = member(10, 5)
    extra["windows"][0]["meter"] = "Spark"
    assert app.pool_of([odd, extra], NOW) == []
