"""Many clients at once, in this process: who is served, who goes, and who waits for whom."""

from __future__ import annotations

import itertools
import select
import socket
import threading
import time
from contextlib import suppress

import pytest
from support import NOW, Site, at, put

import usage_dashboard as app


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def ended(connections):
    return [number for number, one in enumerate(connections) if select.select([one], [], [], 0)[0]]


def seconds_of(site, path):
    began = time.monotonic()
    site.json(path)
    return time.monotonic() - began


def test_answers_that_nobody_takes_are_given_up_beyond_the_limit_longest_without_progress_first():
    connections, pairs = app.Connections(most_bytes=100), [socket.socketpair() for _ in range(5)]
    for here, _ in pairs:
        assert connections.add(here)
    for number, size in ((0, 40), (1, 40), (2, 0)):
        assert connections.wait(pairs[number][0], 60, size)
    assert connections.wait(pairs[0][0], None, 30)  # has taken some
    assert connections.wait(pairs[3][0], 60, 60) and ended([there for _, there in pairs]) == [1]
    assert connections.wait(pairs[4][0], 60, 1000) and ended([there for _, there in pairs]) == [0, 1, 3]
    assert not connections.wait(pairs[1][0], 60) and connections.wait(pairs[2][0], 60)
    for end in itertools.chain(*pairs):
        end.close()


def test_clients_that_never_read_lock_nobody_out_and_take_little_memory(site):
    put(site.store, at(1))
    wide = f"GET /api/summary?start={NOW - 2900 * 3600}&account=%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
    deaf = []
    try:
        for number in range(140):
            deaf.append(socket.socket())
            deaf[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf[-1].settimeout(10)
            deaf[-1].connect(("127.0.0.1", site.port))
            with suppress(OSError):  # it was ended meanwhile
                deaf[-1].sendall((wide % number).encode())
        assert site.json("/api/summary?range=24h")["summary"]["requests"] == 1
        assert len(ended(deaf)) >= 13
    finally:
        for one in deaf:
            one.close()


def test_search_that_finds_nothing_holds_up_no_summary(site):
    sample = [at(number / 100, failed=1, status_code=500, error="a" * 2000) for number in range(1000)]
    for _ in range(4):
        put(site.store, *sample)
    searching = [threading.Thread(target=site.json, args=(f"/api/requests?q={'a' * 20}{n}",)) for n in range(6)]
    began = time.monotonic()
    for thread in searching:
        thread.start()
    beside_s = [seconds_of(site, f"/api/summary?range=24h&tz_offset={-15 * number}") for number in range(1, 4)]
    for thread in searching:
        thread.join()
    searches_s = time.monotonic() - began
    assert max(beside_s) < searches_s / 3


def test_store_is_closed_at_once_also_under_searches(site):
    sample = [at(number / 100, failed=1, status_code=500, error="a" * 2000) for number in range(2000)]
    for _ in range(5):
        put(site.store, *sample)
    needle, ask = "a" * 30 + "b", site.ask
    took_s = seconds_of(site, f"/api/requests?q={needle}")
    searching = [threading.Thread(target=ask, args=(f"/api/requests?q={needle}{number}",)) for number in range(8)]
    for thread in searching:
        thread.start()
    site.json("/api/health")
    began = time.monotonic()
    site.store.close()
    assert time.monotonic() - began < took_s * 2
    for thread in searching:
        thread.join()
