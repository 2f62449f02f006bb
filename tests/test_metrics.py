"""Metrics for Prometheus."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from support import NOW, at, put, reading, rows

import usage_dashboard as app

NOTHING = {"cached_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0}
SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (-?[0-9.e+]+)\Z')


def metrics_of(site):
    """Return what /metrics tells, by name and labels, as the text format is specified."""
    reply, body = site.ask("/metrics")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    told, kinds = {}, {}
    for line in body.decode().split("\n")[:-1]:
        if line.startswith("# "):
            _, word, name, rest = line.split(" ", 3)
            assert word == "HELP" or kinds.setdefault(name, rest) in ("counter", "gauge")
            continue
        name, labels, value = SAMPLE.match(line).groups()
        key = (name, *(re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), text)
                       for text in re.findall(r'="((?:[^"\\]|\\.)*)"', labels or "")))  # fmt: skip
        assert key not in told and kinds[name] == ("counter" if name.endswith("_total") else "gauge")
        told[key] = float(value)
    return told, body


def requests_in(told):
    return {key[1:]: value for key, value in told.items() if key[0] == "cliproxy_requests_total" and value}


def test_metrics_tell_what_was_counted_and_what_is_left(site):
    put(site.store,
        at(1, input_tokens=100, cached_tokens=40, output_tokens=20, reasoning_tokens=5, total_tokens=120),
        at(2, **NOTHING, input_tokens=7, failed=1, status_code=500),
        *(at(hours, **NOTHING, input_tokens=0, failed=1, status_code=429) for hours in (3, 4)), rejects=[app.Reject("odd", 1, None)])  # fmt: skip
    reply = {"rate_limit": {"primary_window": {"used_percent": 25, "limit_window_seconds": 18000, "reset_at": NOW + 60}},
             "additional_rate_limits": [{"limit_name": "Spark", "rate_limit": {"primary_window": {
                 "used_percent": 90, "limit_window_seconds": 18000, "reset_at": NOW + 60}}}]}  # fmt: skip
    file = app.AccountFile("a.json", "an@example.com", "id-1", "plus", "token", False, "", "")
    site.store.save_reading(app.snapshot_of(file, reply, NOW))
    site.status["last_event"] = 1.5e9
    told, body = metrics_of(site)
    account, model = next(iter(requests_in(told)))[:2]
    assert requests_in(told) == {(account, model, "ok"): 1, (account, model, "failed"): 1, (account, model, "rate_limited"): 2}
    tokens = {key[3]: value for key, value in told.items() if key[0] == "cliproxy_tokens_total"}
    assert tokens == {"input": 67, "cached": 40, "output": 15, "reasoning": 5}
    left = {key[1:]: value for key, value in told.items() if key[0] == "cliproxy_quota_remaining_percent"}
    quota = site.json("/api/quota")["quotas"][0]
    wanted = {(quota["account"], one["label"]): one["remaining_percent"] for one in quota["windows"]}
    assert [value for value in left.values()] == [75, 10]
    assert left == {key: value for key, value in wanted.items() if value is not None} != {}
    assert told["cliproxy_collector_up",] == 1 and told["cliproxy_events_rejected_total",] == 1
    assert told["cliproxy_collector_last_event_timestamp_seconds",] == 1.5e9
    promtool = shutil.which("promtool")
    if promtool is not None:
        done = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_metrics_escape_what_a_label_may_not_hold(site):
    name = 'a"b\\c'
    put(site.store, at(1, model=name))
    told, _ = metrics_of(site)
    assert [key[1] for key in requests_in(told)] == [name]


def test_counters_never_fall_by_retention_a_new_name_or_a_restart(site, open_store, tmp_path):
    put(site.store, *(at(hours, model=f"m{hours % 3}") for hours in range(1, 80)))
    before = requests_in(metrics_of(site)[0])
    site.store.delete_some(app.time.time() + 1e9, 1000)
    assert rows(site.store.path, "SELECT COUNT(*) FROM events")[0][0] < 5
    site.store.save_reading(reading(email="dev@example.com", account_id_tag="abcdef"))  # may name the account anew
    assert requests_in(metrics_of(site)[0]) == before
    site.store.close()
    again = open_store().series(200)
    assert {key: sums[0] for key, sums in again.items()} == {key[:2]: value for key, value in before.items()}


def test_pairs_beyond_the_most_are_counted_as_other_for_good(store):
    put(store, *(at(1, model=f"m{number}") for number in range(5)))
    first = store.series(3)
    assert sorted(model for _, model in first) == ["m0", "m1", "m2", "other"]
    put(store, *(at(1, model=f"m{number}") for number in range(7)))
    assert {key[1]: sums[0] for key, sums in store.series(100).items()} == {
        "m0": 2, "m1": 2, "m2": 2, "other": 4, "m5": 1, "m6": 1}  # fmt: skip


def test_series_stay_below_two_thousand_and_readable_by_who_knows_the_password_only(make_site):
    site = make_site(dashboard_password="secret")
    put(site.store, *(at(1, model=f"m{number}") for number in range(2500)))
    site.error("/metrics", 401)
    body = site.ask("/metrics", Authorization="Basic OnNlY3JldA==")[1]
    assert 1400 <= sum(not line.startswith(b"#") for line in body.splitlines()) <= 2000


@pytest.fixture
def site(make_site):
    return make_site()
