"""The demo's made-up week: the proxy's own JSON, one pace from beginning to end, and an outage with nothing in it."""

from __future__ import annotations

import threading

import pytest

import usage_dashboard as app

NOW = 1800000000.0
ALL = app.Window(0, 4e9)


@pytest.fixture
def demo(tmp_path):
    made = app.DemoWorld(tmp_path, lambda: NOW)
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


def test_page_finds_something_to_show_everywhere(demo):
    config, log, clock = app.Config(auth_dir=str(demo.auth_dir)), app.Log(), lambda: NOW
    refresher = app.QuotaRefresher(config, demo.store, log, threading.Event(), demo.fetch, clock, gap_s=(0, 0))
    refresher.start().join()
    site = app.App(config, demo.store, refresher, demo.status, log, clock, demo=True, names=app.Names(demo.names))
    quotas = {row["email"].partition("@")[0]: row for row in app.api_quota(site, app.Query())["quotas"]}
    assert len(quotas) == 9 and {"ok", "limited", "relogin"} == {row["state"] for row in quotas.values()}
    left = [row["remaining_percent"] for row in quotas.values()]
    assert min(left) < 10 < 30 < max(left) and any(10 <= percent <= 30 for percent in left)
    windows = {(name, window["label"]): window for name, row in quotas.items() for window in row["windows"]}
    assert {("team", "budget"), ("linh.pham", "GPT-5.3-Codex-Spark 7d"), ("mai.vo", "7d")} < set(windows)
    worths = [ended["tokens_per_percent"] for ended in windows["minh.tran", "5h"]["history"]]
    assert len(worths) == 5 and worths[0] < worths[-1] and windows["an.nguyen", "7d"]["tokens_left"] > 1e6
    day = app.api_summary(site, app.Query(range="24h"))
    assert sorted(row["name"] or "" for row in day["keys"]) == [""] * 4 + ["An's laptop", "CI"]
    assert len({row["status_code"] for row in day["failures"]} - {429}) >= 2
    speeds = {row["model"]: row["speed"]["tokens_per_second"]["p50"] for row in day["models"]}
    assert speeds["gpt-5.4-mini"] > 2 * speeds["gpt-5.5"]
    assert day["summary"]["unpriced_tokens"] > 0 < day["summary"]["cost_usd"] and day["previous"]["requests"] > 100
