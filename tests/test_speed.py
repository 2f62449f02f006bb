"""How fast: percentiles of any window and filter, against those of the requests themselves."""

from __future__ import annotations

import random
from urllib.parse import urlencode

import pytest
from support import ALWAYS, DATA, NOON, event, put, rows, run_sql

import usage_dashboard as app

STATUSES = ("ok", "failed")
KEYS = ("sk-…1111 #4bdca8", "AIz…0001 #3f9a2c", "")
PARTS = {"model": lambda one: one.model, "account": lambda one: one.context.source,
         "key": lambda one: one.context.api_key or None, "status": lambda one: STATUSES[one.failed]}  # fmt: skip
NOTHING = {"latency_ms": {"p50": None, "p95": None}, "ttft_ms": {"p50": None, "p95": None},
           "tokens_per_second": {"p50": None}, "sample": 0}  # fmt: skip


def random_events(dice, count, days):
    """Yield requests from a millisecond to hours, of which many tell nothing and some failed."""
    for _ in range(count):
        usual, odd = dice.randrange(300, 60_000), int(10 ** dice.uniform(0, 7))
        latency = dice.choice([None, 0, 1, usual, usual, usual, odd])
        yield event(
            at=round(NOON + dice.uniform(0, 86400 * days), 3), failed=int(dice.random() < 0.2), latency_ms=latency,
            ttft_ms=dice.choice([None, 0, dice.randrange(1, 4000), (latency or 0) + 5]), model=dice.choice("aaaab"),
            output_tokens=dice.choice([None, 0, dice.randrange(200, 9000)]), api_key=dice.choice(KEYS),
            source=dice.choice(["an@x.com", "bo@x.com"]), auth_index="",
        )  # fmt: skip


def prove(shown, requests):
    """Compare with the percentiles by nearest rank of (latency, first token, output) of successes, within 6 %."""
    whole = [row for row in requests if row[2] and None not in row[:2] and row[1] < row[0]]
    values = {
        "latency_ms": [latency for latency, _, _ in requests if latency is not None],
        "ttft_ms": [ttft for _, ttft, _ in requests if ttft is not None],
        "tokens_per_second": [output * 1000 / (latency - ttft) for latency, ttft, output in whole],
    }
    expected = {"sample": len(requests)}
    for name, known in values.items():
        ranks = {percentile: -(-len(known) * int(percentile[1:]) // 100) - 1 for percentile in NOTHING[name]}
        expected[name] = {
            percentile: pytest.approx(sorted(known)[rank], rel=0.06) if len(known) >= 5 else None
            for percentile, rank in ranks.items()
        }
    assert shown == expected


def successes(events):
    return [(one.latency_ms, one.ttft_ms, one.output_tokens) for one in events if not one.failed]


@pytest.mark.parametrize(("seed", "days"), [(1, 4), (2, 0.3), (3, 40)])
def test_percentiles_of_random_windows_filters_and_zones_are_within_6_percent_of_the_exact_ones(make_site, seed, days):
    site, dice = make_site(), random.Random(seed)
    events = list(random_events(dice, 6000, days))
    for start in range(0, len(events), 700):
        put(site.store, *events[start : start + 700])
    assert site.store.find_faults() == []
    for _ in range(12):
        values = {"model": dice.choice("ab"), "key": KEYS[0], "account": "bo@x.com", "status": dice.choice(STATUSES)}
        filters = {name: value for name, value in values.items() if dice.random() < 0.3}
        start = NOON + 86400 * days * dice.uniform(-0.1, 0.7)
        end = start + 86400 * days * dice.choice([0.001, 0.1, 0.5, 2])
        query = {"start": start, "end": end, "tz_offset": 15 * dice.randrange(-48, 57), "bucket": "auto", **filters}
        answer = site.json(f"/api/summary?{urlencode(query)}")
        inside = [one for one in events if start <= one.ts_epoch < end
                  and all(PARTS[name](one) == value for name, value in filters.items())]  # fmt: skip
        prove(answer["speed"], successes(inside))
        for part in ("model", "account", "key"):
            for row in answer[f"{part}s"]:
                prove(row["speed"], successes(one for one in inside if PARTS[part](one) == row[part]))


def speed_of(store, window=ALWAYS):
    return app.speed_json(app.count_speeds(b"".join(store.usage(window, 86400, 0).speeds.values())))


def test_count_of_one_value_grows_without_an_end(store):
    told = [(900, None, 1)] * 15_000 + [(9, 1, 1)] * 5000 + [(10**12, None, 1)] * 1005
    for start in range(0, len(told), 5000):
        put(store, *[event(latency_ms=latency, ttft_ms=ttft, output_tokens=output)
                     for latency, ttft, output in told[start : start + 5000]])  # fmt: skip
    prove(speed_of(store), told)
    assert store.find_faults() == []


def test_speeds_of_3_0_0_are_of_the_rows_there_are_and_stay_when_rows_are_deleted(tmp_path, open_store):
    run_sql(tmp_path / "usage.db", (DATA / "usage-3.0.0.sql").read_text(encoding="utf-8"))
    store = open_store()
    put(store, *random_events(random.Random(7), 900, 2), event(at=NOON - 20 * 86400), sequence=9)  # one below the floor
    query = "SELECT latency_ms, ttft_ms, output_tokens FROM events WHERE NOT failed AND ts_epoch >= ?"
    told = rows(store.path, query.replace("?", str(store.get_meta("events_floor") * 900)))
    prove(speed_of(store), told + successes([event()]))
    whole = speed_of(store)
    while store.delete_some(NOON + 86400 + 5000):
        pass
    assert (speed_of(store), store.find_faults()) == (whole, [])
    hour = (NOON + 5000) // 3600 * 3600  # where hours are all that is known
    assert speed_of(store, app.Window(hour + 60, hour + 90)) == speed_of(store, app.Window(hour, hour + 3600))
