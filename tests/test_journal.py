"""What was popped and is not in the database yet: odd rows, odd spools, late commits, and a file that goes away."""

from __future__ import annotations

import io
import os
import threading
from contextlib import closing

import pytest
from collecting import config_of, wait_a_while
from support import (
    NOON, event, lock, payload, payloads, put, rows, run_sql, spool_line, spool_path, stored_ids, write_account,
)  # fmt: skip

import usage_dashboard as app

REJECTS = "SELECT reason FROM rejected_events ORDER BY id"


@pytest.fixture
def picky(tmp_path):
    """A database with a constraint that ours lacks."""
    store = app.Store(tmp_path / "usage.db")
    refuse = "WHEN NEW.latency_ms = 666 BEGIN SELECT RAISE(ABORT, 'no'); END"
    run_sql(store.path, f"CREATE TRIGGER picky BEFORE INSERT ON events {refuse}")
    yield store
    store.close()


@pytest.mark.parametrize("bad", [{"latency_ms": 666}, {"model": "\ud800"}, {"input_tokens": 2**70}, {"model": ["x"]}])
def test_row_that_the_database_does_not_take_costs_itself_alone(picky, bad):
    batch = [event(at=NOON + number, request_id=f"r{number}") for number in range(200)]
    batch[77] = batch[77]._replace(**bad)
    assert put(picky, *batch, ignored=1)
    assert stored_ids(picky) == [f"r{number}" for number in range(200) if number != 77]
    ((reason,),) = rows(picky.path, REJECTS)
    assert reason.startswith("the database does not take it")
    assert [picky.counts[name] for name in ("stored", "rejected", "ignored")] == [199, 1, 1]
    assert picky.find_faults() == []


def batch_line(sequence, *events, **changes) -> bytes:
    """Return a line of the spool; `changes` are values of the first event's row."""
    table = [[*one._replace(**changes)] if number == 0 else [*one] for number, one in enumerate(events)]
    return spool_line([sequence, [app.Event._fields, app.Context._fields], table, [], 0])


@pytest.mark.parametrize("changes", [
    {"input_tokens": 2**62}, {"input_tokens": 10**30}, {"ts_epoch": "noon"}, {"ts_epoch": None}, {"ts_epoch": 1e300},
    {"model": {"a": 1}}, {"model": None}, {"timestamp": "\ud800"}, {"context": None}, {"context": [1] * 9},
    {"failed": 7}, {"latency_ms": -4}, {"error": ["x"]}, {"request_id": 5},
])  # fmt: skip
def test_odd_event_in_the_spool_costs_itself_alone(collect, proxy, store, changes):
    lines = [batch_line(1, event(request_id="bad"), event(request_id="good"), **changes)]
    lines.append(batch_line(2, event(request_id="next")))
    spool_path(store).write_bytes(b"".join(lines))
    proxy.push(payload(1))
    run = collect(proxy, stored=3)
    assert stored_ids(store) == ["good", "next", "r1"]
    assert [reason[:13] for (reason,) in rows(store.path, REJECTS)] == ["in the spool:"]
    assert store.find_faults() == [] and run.error is None


def test_spool_with_one_number_twice_and_numbers_that_are_none_stores_each_batch_once(collect, proxy, store):
    lines = [
        batch_line(5, event(request_id="a")), batch_line(5, event(request_id="a")), batch_line(10**400, event()),
        batch_line(-1, event()), batch_line(True, event()), spool_line(b'{"deep": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        batch_line(6, event(request_id="b")),
    ]  # fmt: skip
    spool_path(store).write_bytes(b"\n".join(lines))
    proxy.push(payload(1))
    run = collect(proxy, stored=3)
    assert stored_ids(store) == ["a", "b", "r1"] and run.error is None
    assert "are no batches" in run.log


@pytest.mark.parametrize("mark", [0, 40])
def test_what_a_previous_run_left_goes_to_the_file_that_is_at_the_path_by_then(tmp_path, collect, proxy, store, mark):
    spool_path(store).write_bytes(batch_line(1, event(request_id="left")) + batch_line(2, event(request_id="behind")))
    locker = lock(store)
    run = collect(proxy)
    run.wait_for_state("storage_error")
    if mark:  # of another database, which has seen more batches
        with closing(app.Store(tmp_path / "other.db")) as other:
            put(other, event(request_id="older"), sequence=mark)
        os.replace(str(other.path), str(store.path))
    else:
        store.path.unlink()
    run.wait_for(lambda: "what is at its path now is used" in run.log)
    proxy.push(payload(1))
    run.wait_for(lambda: "r1" in stored_ids(store))
    locker.close()
    assert stored_ids(store) == ["older"] * bool(mark) + ["left", "behind", "r1"]


def test_what_is_popped_during_a_commit_that_waits_is_on_the_spool_at_once(tmp_path):
    with closing(app.Store(tmp_path / "usage.db", busy_timeout_s=20)) as store:
        journal = app.Journal(store, app.Log(io.StringIO()), lambda: NOON, app.monotonic_s)
        journal.flush()
        locker = lock(store)
        journal.hold(app.Parsed([event(request_id="first")], [], 0))
        commit = threading.Thread(target=journal.flush)
        commit.start()
        for number in range(200):
            journal.hold(app.Parsed([event(request_id=f"r{number}")], [], 0))
        assert commit.is_alive() and len(list(app.Spool(spool_path(store)).read())) == 201
        locker.close()
        commit.join(20)
        journal.flush()
        assert stored_ids(store) == ["first", *(f"r{number}" for number in range(200))]


@pytest.mark.parametrize("until", ["somebody reads", "half a minute is over", "the stop"])
def test_events_wait_on_the_spool_until(collect, proxy, store, until):
    run = collect(proxy, commit_s=30.0)
    proxy.push(*payloads(40))
    run.wait_for_state("recording")
    run.wait_for(lambda: run.collector.journal.rows == 40)
    assert stored_ids(store) == [] and list(app.Spool(spool_path(store)).read()) != []
    if until == "somebody reads":
        run.collector.journal.flush_for_reader()
    elif until == "half a minute is over":
        run.slept_s += 31
        run.wait_for(lambda: stored_ids(store))
    else:
        run.end()
    assert stored_ids(store) == [f"r{number}" for number in range(40)]
    run.wait_for(lambda: list(app.Spool(spool_path(store)).read()) == [])


def test_five_hundred_rows_are_committed_at_once(collect, proxy, store):
    run = collect(proxy, commit_s=30.0)
    proxy.push(*payloads(1000))
    run.wait_for(lambda: len(stored_ids(store)) >= 500)


@pytest.mark.parametrize(("waiting", "replaced"), [(0, False), (5, False), (5, True)])
def test_database_that_went_is_opened_again_and_takes_what_waits(collect, proxy, store, tmp_path, waiting, replaced):
    run = collect(proxy, commit_s=30.0)
    proxy.push(*payloads(20))
    run.wait_for(lambda: run.collector.journal.rows == 20)
    run.collector.journal.flush_for_reader()
    proxy.push(*payloads(waiting, first=100))
    run.wait_for(lambda: run.collector.journal.rows == waiting)
    if replaced:  # by one that has seen more batches
        with closing(app.Store(tmp_path / "other.db")) as other:
            put(other, event(request_id="theirs"), sequence=7_000)
        os.replace(str(other.path), str(store.path))
    else:
        for suffix in ("", "-wal", "-shm"):
            (tmp_path / f"usage.db{suffix}").unlink()
    run.wait_for(lambda: ("was replaced or moved" if replaced else "was deleted") in run.log and store.path.exists())
    proxy.push(*payloads(5, first=200))
    run.wait_for(lambda: run.collector.journal.rows == waiting + 5)
    run.collector.journal.flush_for_reader()
    ours = [f"r{number}" for number in (*range(100, 100 + waiting), *range(200, 205))]
    assert stored_ids(store) == ["theirs"] * replaced + ours
    assert store.find_faults() == [] and list(app.Spool(spool_path(store)).read()) == []


def test_database_that_takes_no_mark_when_it_is_opened_again_takes_it_and_what_waits_later(tmp_path, store):
    journal = app.Journal(store, app.Log(io.StringIO()), lambda: NOON, app.monotonic_s)
    journal.hold(app.Parsed([event(request_id="ours")], [], 0))
    with closing(app.Store(tmp_path / "other.db")) as other:
        put(other, event(request_id="theirs"), sequence=7_000)
    run_sql(other.path, "CREATE TRIGGER full BEFORE INSERT ON meta BEGIN SELECT RAISE(ABORT, 'full'); END")
    os.replace(str(other.path), str(store.path))
    for _ in range(2):
        with pytest.raises(app.StoreError):
            journal.flush()
    run_sql(store.path, "DROP TRIGGER full")
    journal.flush()
    assert stored_ids(store) == ["theirs", "ours"]


def test_what_is_popped_is_on_the_spool_before_account_files_are_looked_into(tmp_path):
    with closing(app.Store(tmp_path / "usage.db", busy_timeout_s=5)) as store:
        config = config_of(auth_dir=str(write_account(tmp_path / "accounts").parent))
        collector = app.Collector(config, store, app.Log(io.StringIO()), threading.Event())
        with closing(lock(store)):
            work = threading.Thread(target=collector._hold, args=(payloads(1),))
            work.start()
            while not list(app.Spool(spool_path(store)).read()):
                work.join(0.05)
            assert work.is_alive()  # it waits for the lock
        work.join(60)


def test_folder_that_is_renamed_stops_the_pops_and_what_is_back_goes_on(collect, proxy, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    store = app.Store(folder / "usage.db", 0.05)
    run = collect(proxy, on=store)
    proxy.push(*payloads(3))
    run.wait_for_events(3)
    folder.rename(tmp_path / "away")
    run.wait_for_state("storage_error")
    proxy.push(*payloads(400, first=3))
    wait_a_while(run, 4)
    assert len(proxy.handed_over) <= 3 + 16
    (tmp_path / "away").rename(folder)
    run.wait_for_events(403)
    assert stored_ids(store) == [f"r{number}" for number in range(403)]
    run.end()
    store.close()


@pytest.mark.parametrize("fault", [RecursionError, MemoryError, OverflowError, KeyError, app.ConfigError])
def test_collector_goes_on_after_anything_that_is_raised(collect, proxy, fault):
    said = "xxxxx" if fault is app.ConfigError else f"a fault of its own: {fault.__name__} at line"
    answers = []

    def load():
        answers.append(1)
        if len(answers) < 3:
            raise fault(["x" * 10])
        return config_of(proxy)

    run = collect(proxy, load=load, management_password="wrong")
    run.wait_for(lambda: said in run.log)
    run.wait_for_state("waiting")
    proxy.push(payload(1))
    run.wait_for_events(1)
    assert proxy.failures == 1
