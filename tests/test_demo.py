"""The demo's made-up week: the proxy's own JSON, one pace from beginning to end, and an outage with nothing in it."""

from __future__ import annotations

import threading

import pytest

import usage_dashboard as app

NOW = 1800000000.0
DAY = 86400.0
ALL = app.Window(0, 4e9)


class Clock(threading.Event):
    """A stop event and a clock in one: a wait lasts no time and moves the clock on, until its end is reached."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self.now, self.end = NOW, end

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        return self.now >= self.end


@pytest.fixture
def clock():
    return Clock(NOW + DAY)


@pytest.fixture
def demo(tmp_path, clock):
    made = app.DemoWorld(tmp_path, lambda: clock.now)
    yield made
    made.store.close()


def requests_in(demo, start: float, end: float) -> int:
    buckets = demo.store.usage(app.Window(start, end), 3600, 0).buckets
    return sum(sums[0] for sums in buckets.values())


def test_week_is_taken_in_as_the_proxy_sends_it(demo):
    counts = demo.store.counts
    assert counts["stored"] > 3000 and (counts["rejected"], counts["ignored"]) == (0, 0)
    request = demo.store.requests(1, filters=app.Filters(status="ok"))[0]
    assert None not in [request[name] for name in ("auth_index", "input_tokens", "latency_ms", "ttft_ms", "api_key")]
    reasons = {request["error"] for request in demo.store.requests(500, filters=app.Filters(status="failed"))}
    assert "429 usage_limit_reached: The usage limit has been reached" in reasons and len(reasons) == 4


def test_outage_has_no_request_inside(demo):
    (outage,) = demo.store.outages(ALL, NOW)
    assert outage["to"] - outage["from"] > 1800
    assert demo.store.requests(1, app.Window(outage["from"], outage["to"])) == []
    assert requests_in(demo, outage["from"] - 3 * 3600, outage["from"]) > 0
    assert requests_in(demo, outage["to"], outage["to"] + 3 * 3600) > 0


def test_live_traffic_keeps_the_pace_of_the_week(demo, clock):
    demo.live(clock)
    a_week_before = requests_in(demo, NOW - 7 * DAY, NOW - 6 * DAY)
    assert requests_in(demo, NOW, NOW + DAY) == pytest.approx(a_week_before, rel=0.15)
    assert demo.status()["last_event"] == pytest.approx(NOW + DAY, abs=3 * 3600)


def test_accounts_are_in_the_states_that_the_page_is_to_show(demo):
    for file in app.find_account_files([demo.auth_dir])[1]:
        try:
            demo.store.save_reading(app.snapshot_of(file, demo.fetch(file), NOW))
        except app.QuotaFault as fault:
            demo.store.save_quota_state(file.email, file.tag, None, fault.state, str(fault), NOW)
    quotas = demo.store.quotas()
    assert len(quotas) == 8 and {"ok", "limited", "relogin"} == {row["state"] for row in quotas}
    left = [row["primary_remaining_percent"] for row in quotas if row["primary_remaining_percent"] is not None]
    assert min(left) < 10 < 30 < max(left) and any(10 <= percent <= 30 for percent in left)
