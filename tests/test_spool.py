"""What the collector keeps when it is stopped, killed, or cannot store."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from collecting import wait_a_while
from fake_proxy import FakeProxy
from sockets import Watched
from support import MALFORMED, ODD_BUT_GOOD, SAMPLES, ids_of, payload, payloads, spool_line, spool_path, stored_ids

import usage_dashboard as app

pytestmark = pytest.mark.slow
WAITED_S = 8  # a stop that waits for an answer or the end of a pause takes longer


def parsed(*numbers) -> app.Parsed:
    return app.parse_events([payload(number) for number in numbers])


# killed before the first commit, after it and before the spool was dropped, and after both
@pytest.mark.parametrize("committed", [0, 1, 2])
def test_spool_left_by_a_crash_is_stored_exactly_once(collect, open_store, store, proxy, committed):
    spool = app.Spool(spool_path(store))
    batches = [(1, app.parse_events([payload(1), b"{", b'{"refresh":true}', payload(2)])), (2, parsed(3))]
    for number, batch in batches:
        spool.append(number, batch)
    for number, batch in batches[:committed]:
        store.store_batch(batch, number, 1787000000.0)
    for _ in range(2):
        run = collect(proxy, on=open_store(), until="waiting")
        assert stored_ids(store) == ["r1", "r2", "r3"] and list(spool.read()) == []
        assert [run.status[name] for name in ("events", "rejected", "ignored")] == [3, 1, 1]
        run.end()
    assert store.find_faults() == []


def test_spool_read_back_equals_what_was_written(tmp_path):
    spool = app.Spool(tmp_path / "spool")
    bad = [raw for raw, _ in MALFORMED]
    batch = app.parse_events([*SAMPLES, *bad, *ODD_BUT_GOOD, payload(7, alias="tiếng Việt\u2028\x85")])
    spool.append(3, batch)
    assert list(spool.read()) == [(3, batch)]


def test_spool_with_a_torn_line_gives_the_whole_batches_and_takes_the_next_one(collect, proxy, store):
    path = spool_path(store)
    app.Spool(path).append(1, parsed(1))
    whole = path.read_bytes()
    app.Spool(path).append(2, parsed(2))
    both = path.read_bytes()
    for length in range(len(whole), len(both) - 1, 7):
        path.write_bytes(both[:length])
        assert [number for number, _ in app.Spool(path).read()] == [1]
        # as where a full disk tears a line, some room is made, and then the power goes
        app.Spool(path).append(3, parsed(3))
        assert list(app.Spool(path).read()) == [(1, parsed(1)), (3, parsed(3))]
    collect(proxy, until="waiting")
    assert stored_ids(store) == ["r1", "r3"]


TORN = [b"\n\n\n", b"\x00" * 500, b"garbage", b"0123456789abcdef []\n", b"\xff" * 99]
ODD = [*map(spool_line, (b'[1, {"layout": "new"}]', b"[1, [], [], 0]", b"{}", b"7", b'["odd"]'))]


@pytest.mark.parametrize("content", [*TORN, *ODD], ids=range(len(TORN + ODD)))
def test_spool_lines_that_are_torn_or_of_another_version_cost_no_sound_batch(collect, proxy, store, content):
    path = spool_path(store)
    for number in (1, 2):
        app.Spool(path).append(number, parsed(number))
    path.write_bytes(b"\n".join(part for line in path.read_bytes().splitlines() for part in (content, line)))
    proxy.push(payload(3))
    run = collect(proxy, stored=3)
    assert stored_ids(store) == ["r1", "r2", "r3"]
    aside = app.Spool(path).odd_path
    if content in ODD:
        assert content.strip() in aside.read_bytes() and aside.name in run.log
        assert aside.stat().st_mode & 0o777 == 0o600


def test_spool_is_private_and_dated_while_recording(collect, proxy, store):
    collect(proxy).wait_for_state("waiting")
    path = spool_path(store)
    Watched().wait_for(path.exists)
    assert path.stat().st_mode & 0o777 == 0o600
    assert abs(path.stat().st_mtime - time.time()) < 20


@pytest.mark.parametrize("mode", ["pop", "http", "subscribe"])
def test_stop_under_load_stores_all_that_was_handed_over(collect, open_store, mode):
    with FakeProxy() as proxy:
        run = collect(proxy, collect_mode=mode)
        run.wait_for_state("waiting", "recording")
        for first in range(0, 4000, 100):
            proxy.push(*payloads(100, first))
            proxy.wait_for(lambda: not any(len(one.outbox) > 100 for one in list(proxy._subscribers)))
            if first == 1500:
                run.stop.set()
        run.end()
        if mode != "subscribe":  # what a subscriber is sent while it leaves is in flight
            assert Counter(stored_ids(run.store)) == Counter(ids_of(proxy.handed_over))
        after = collect(proxy, on=open_store())
        after.wait_for(lambda: proxy.queued == 0)
        after.end()
        got = Counter(stored_ids(after.store))
        assert max(got.values()) == 1 and after.store.find_faults() == []


@pytest.mark.parametrize("mode", ["pop", "http", "subscribe"])
def test_stop_in_the_middle_of_an_answer_gives_up_when_hurried_and_keeps_what_came_whole(collect, proxy, mode):
    run = collect(proxy, collect_mode=mode, until="waiting")
    run.wait_for(lambda: ("GET", "/v0/management/api-key-usage") in proxy.http_requests and proxy.open_connections == 1)
    wait_a_while(run, 0 if mode == "subscribe" else 2)  # nothing is asked any more
    with proxy.change():
        proxy.push(*payloads(3))
        proxy.dribble(0.001)
    run.wait_for(lambda: len(proxy.handed_over) == 3)  # popped one by one, two are here whole
    proxy.dribble(60)
    run.stop.set()
    run.collector.interrupt()
    run.thread.join(WAITED_S)
    alive = run.thread.is_alive()
    proxy.dribble(0)
    run.end()
    assert not alive and "a fault of its own" not in run.log
    assert mode != "pop" or stored_ids(run.store)[:2] == ["r0", "r1"]


def test_stop_while_the_proxy_answers_a_question_gives_up_when_hurried(collect, proxy):
    run = collect(proxy, until="waiting")
    run.wait_for(lambda: ("GET", "/v0/management/api-key-usage") in proxy.http_requests)
    proxy.publishing = False
    proxy.answers["/v0/management/usage-statistics-enabled"] = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"
    asked = len(proxy.http_requests)
    run.ahead_s = 60.0
    run.wait_for(lambda: len(proxy.http_requests) > asked)
    run.stop.set()
    run.collector.interrupt()
    run.thread.join(WAITED_S)
    assert not run.thread.is_alive()


def test_stop_while_waiting_ends_at_once(collect, proxy):
    proxy.ban()
    run = collect(proxy, stop=threading.Event(), until="banned")
    before = time.monotonic()
    run.end()
    assert time.monotonic() - before < WAITED_S
