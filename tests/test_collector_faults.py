"""The collector among breaking connections and odd events, and with a database that cannot be written."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter

import pytest
from collecting import QuickStop, wait_a_while
from redis_server import OldRedis, Scripted
from support import ALWAYS, MALFORMED, ODD_BUT_GOOD, ids_of, lock, payload, payloads, room, rows, spool_path, stored_ids

import usage_dashboard as app

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["pop", "http", "subscribe"])
def test_collector_whose_connection_breaks_connects_again_without_loss_or_outage(collect, proxy, store, mode):
    run = collect(proxy, collect_mode=mode)
    for number in range(3):
        proxy.push(payload(number))
        run.wait_for_events(number + 1)
        before = proxy.connections
        proxy.disconnect_all()
        run.wait_for(lambda before=before: proxy.connections > before)
        run.wait_for(lambda: mode != "subscribe" or proxy.subscribers == 1)
    assert proxy.failures == 0 and stored_ids(store) == ["r0", "r1", "r2"]
    run.wait_for(lambda: store.outages(ALWAYS, time.time()) == [])


def small(number) -> bytes:
    return b'{"timestamp":"2026-08-22T13:00:00Z","request_id":"r%d"}' % number


@pytest.mark.parametrize(("mode", "step"), [("pop", 1), ("http", 5)])
def test_queue_cut_at_every_byte_of_a_reply_loses_only_what_was_cut(collect, proxy, mode, step):
    run = collect(proxy, stop=QuickStop(0.002), collect_mode=mode, until="waiting")
    proxy.wait_for(lambda: ("GET", "/v0/management/api-key-usage") in proxy.http_requests)  # which is not to be cut
    pair = 2 * len(b"$%d\r\n%s\r\n" % (len(small(0)), small(0)))
    head = 0 if mode == "pop" else 250
    number = 0
    for position in range(1, pair + head, step):
        with proxy.change():
            proxy.cut_replies_after(position)
            proxy.push(small(number), small(number + 1))
        number += 2
        run.wait_for(lambda: not proxy.queued and run.accounted == len(proxy.handed_over) - len(proxy.lost))
    whole = Counter(ids_of(proxy.handed_over)) - Counter(ids_of(proxy.lost))
    assert Counter(stored_ids(run.store)) == whole
    assert number == len(proxy.handed_over) and 0 < len(proxy.lost) < number
    assert "state=not_resp" not in run.log  # which would tell people to look for a web server
    assert run.store.find_faults() == [] and proxy.failures == 0


def test_queue_reset_behind_a_full_batch_costs_none_of_it(collect):
    script = [reply for first in range(0, 320, 16) for reply in [*payloads(16, first), None]]
    with Scripted(script) as server:
        run = collect(server, collect_mode="pop", stored=320)
        assert stored_ids(run.store) == [f"r{number}" for number in range(320)]


@pytest.mark.parametrize("position", [0, 7, 15])
def test_queue_with_an_error_between_its_replies_keeps_the_others(collect, position):
    script = payloads(15)
    script.insert(position, b"-LOADING Redis is loading the dataset in memory\r\n")
    with Scripted(script) as server:
        run = collect(server, collect_mode="pop", stored=15)
        assert stored_ids(run.store) == [f"r{number}" for number in range(15)]
        run.wait_for(lambda: "LOADING" in run.log and "state=unreachable" in run.log)


ODD_REPLIES = [b":7\r\n", b"+text\r\n", b"*0\r\n", b"*2\r\n:1\r\n$1\r\nx\r\n", b"*1\r\n" * 60 + b"$-1\r\n"]


def test_reply_to_a_pop_that_is_no_value_costs_itself_alone(collect):
    good = payloads(len(ODD_REPLIES) + 1)
    with Scripted([*itertools.chain.from_iterable(zip(good, ODD_REPLIES)), good[-1]]) as server:
        run = collect(server, collect_mode="pop")
        run.wait_for(lambda: run.accounted == len(good) + len(ODD_REPLIES))
        assert stored_ids(run.store) == [f"r{number}" for number in range(len(good))]
        assert run.status["rejected"] == len(ODD_REPLIES) and run.error is None


def test_collector_given_malformed_events_parks_them_and_keeps_their_neighbours(collect, proxy):
    secrets = {"api_key": "sk-client-aaaa-1111", "source": "AIzaSyFAKE-0001", "client_ip": "10.1.2.3"}
    fail = {"status_code": 500, "body": "the prompt of somebody"}
    bad = [*(raw for raw, _ in MALFORMED), payload(1, timestamp="never", fail=fail, **secrets)]
    good = payloads(len(bad), first=200)
    mixed = [one for pair in zip(bad, good) for one in pair]
    proxy.push(*mixed, *ODD_BUT_GOOD, b'{"refresh":true}', payload(99, generate=False))
    run = collect(proxy)
    run.wait_for(lambda: run.accounted >= len(proxy.handed_over) > 0 and proxy.queued == 0)
    counted = [run.status[name] for name in ("events", "rejected", "ignored")]
    assert counted == [len(good) + len(ODD_BUT_GOOD), len(bad), 2]
    kept = rows(run.store.path, "SELECT reason, length, event FROM rejected_events ORDER BY id")
    assert [row[1] for row in kept] == [len(raw) for raw in bad]
    assert all(reason for reason, _, _ in kept) and run.store.find_faults() == []
    assert json.loads(kept[-1][2])["model"] == "gpt-5.4"
    assert not any(secret in str(kept) + run.log for secret in ("sk-client", "AIzaSy", "10.1.2.3", "prompt"))


@pytest.mark.parametrize(("fault", "said"), [("locked", "locked"), ("full", "no room on the disk")])
def test_collector_that_cannot_store_stops_popping_and_recovers_without_loss(collect, proxy, store, fault, said):
    run = collect(proxy, until="waiting")
    if fault == "full":
        room(store, 45)
    locker = lock(store) if fault == "locked" else None
    proxy.push(*[payload(number, alias="x" * 150 + str(number)) for number in range(3000)])
    run.wait_for_state("storage_error")
    wait_a_while(run, 3)
    popped = len(proxy.handed_over)
    wait_a_while(run, 5)
    assert len(proxy.handed_over) == popped < (17 if locker else 3000)  # the batch in hand
    spooled = [one.request_id for _, parsed in app.Spool(spool_path(store)).read() for one in parsed.events]
    assert spooled and stored_ids(store) + spooled == ids_of(proxy.handed_over)
    assert said in run.status["message"] and run.log.count("state=storage_error") == 1
    assert str(store.path) in run.log and str(store.path.parent) not in run.status["message"]
    run.ahead_s = 600.0
    if locker:
        locker.close()
    room(store, 1_000_000)
    run.wait_for_events(3000)
    run.wait_for_state("recording")
    assert stored_ids(store) == ids_of(proxy.handed_over) and store.find_faults() == []
    assert [outage["reason"] for outage in store.outages(ALWAYS, time.time())] == ["storage_error"]


@pytest.mark.parametrize(("fault", "spooled"), [("locked", 0), ("locked", 1), ("full", 3000)])
def test_collector_does_not_pop_before_it_can_store(collect, proxy, store, fault, spooled):
    if spooled:
        left = [payload(number, alias="x" * 150 + str(number)) for number in range(spooled)]
        app.Spool(spool_path(store)).append(1, app.parse_events(left))
    locker = lock(store) if fault == "locked" else None
    if fault == "full":
        room(store, 45)
    proxy.push(*payloads(40, first=5000))
    run = collect(proxy, until="storage_error")
    wait_a_while(run, 10)
    assert proxy.handed_over == []
    if locker:
        locker.close()
    room(store, 1_000_000)
    run.wait_for_events(spooled + 40)


@pytest.mark.parametrize("moment", ["before the start", "at the first pop"])
def test_collector_without_a_key_keeps_what_it_popped_to_log_in_while_the_database_is_locked(collect, store, moment):
    locks = [lock(store)] if moment == "before the start" else []

    def lock_once():
        if not locks:
            locks.append(lock(store))

    with OldRedis(payloads(20), before_a_pop=lock_once) as server:
        run = collect(server, management_password="", until="storage_error")
        wait_a_while(run, 6)
        locks[0].close()
        run.wait_for_events(20)
        assert stored_ids(store) == [f"r{number}" for number in range(20)]


@pytest.mark.parametrize("damage", ["overwritten", "truncated"])
def test_collector_whose_database_is_damaged_leaves_it_so_and_goes_on_once_it_is_mended(collect, proxy, store, damage):
    run = collect(proxy)
    proxy.push(*payloads(100))
    run.wait_for_events(100)
    rows(store.path, "PRAGMA wal_checkpoint(TRUNCATE)")
    whole = store.path.read_bytes()
    damaged = b"\x5a" * len(whole) if damage == "overwritten" else whole[: len(whole) // 2]
    replace_content(store.path, damaged)
    proxy.push(*payloads(200, first=100))
    run.wait_for_state("storage_error")
    wait_a_while(run, 3)
    assert "is damaged" in run.status["message"] and store.path.read_bytes() == damaged
    assert len(proxy.handed_over) <= 100 + 16
    replace_content(store.path, whole)
    run.wait_for_events(300)
    assert stored_ids(store) == [f"r{number}" for number in range(300)] and store.find_faults() == []


def replace_content(path, content) -> None:
    """Overwrite a file in place, without another inode, as cp does."""
    with path.open("r+b") as file:
        file.truncate()
        file.write(content)


def test_full_disk_that_still_takes_an_outage_leaves_none_open_once_it_is_mended(collect, proxy, store):
    run = collect(proxy, until="waiting")
    room(store, rows(store.path, "PRAGMA page_count")[0][0] + 2)
    proxy.push(*[payload(number, alias="x" * 150 + str(number)) for number in range(300)])
    run.wait_for_state("storage_error")
    run.wait_for(lambda: [one["reason"] for one in store.outages(ALWAYS, time.time())] == ["storage_error"])
    room(store, 1_000_000)
    run.wait_for_events(300)
    run.wait_for_state("recording")
    assert [outage for outage in store.outages(ALWAYS, time.time()) if outage["to"] is None] == []


def test_odd_element_of_an_http_answer_costs_itself_alone(collect, proxy, store):
    proxy.push(payload(1), b"[" * 900 + b"]" * 900, b'"\xff"', b"7", payload(2))
    run = collect(proxy, collect_mode="http")
    run.wait_for(lambda: run.accounted == 5)
    assert stored_ids(store) == ["r1", "r2"] and run.status["rejected"] == 3
