"""Many clients at once, in this process: who waits for whom."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from support import at, put


@pytest.fixture
def site(make_site):
    return make_site()


def put_long(store, count):
    """Store requests whose reasons are long to look through."""
    sample = [at(number / 100, failed=1, status_code=500, error="a" * 2000) for number in range(1000)]
    for _ in range(0, count, 1000):
        put(store, *sample)


@contextmanager
def searching(site, needle, clients):
    """Let so many clients search meanwhile, each for something of its own."""
    with ThreadPoolExecutor(clients) as pool:
        yield [pool.submit(site.ask, f"/api/requests?q={needle}{number}") for number in range(clients)]


def seconds_of(site, path):
    began = time.monotonic()
    site.json(path)
    return time.monotonic() - began


def test_search_that_finds_nothing_holds_up_no_summary(site):
    put_long(site.store, 4000)
    began = time.monotonic()
    with searching(site, "a" * 20, clients=6) as searches:
        beside_s = [seconds_of(site, f"/api/summary?range=24h&tz_offset={-15 * number}") for number in range(1, 4)]
    searches_s = time.monotonic() - began
    assert max(beside_s) < searches_s / 3 and {one.result()[0].status for one in searches} == {200}


def test_store_is_closed_at_once_also_under_searches(site):
    put_long(site.store, 10_000)
    needle = "a" * 30 + "b"
    took_s = seconds_of(site, f"/api/requests?q={needle}")
    with searching(site, needle, clients=24):
        site.json("/api/health")
        began = time.monotonic()
        site.store.close()
        assert time.monotonic() - began < took_s * 6
