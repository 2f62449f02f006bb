"""Copies of the database."""

from __future__ import annotations

import resource
import sqlite3
import stat
from contextlib import closing

import pytest
from program import configure, get, start
from support import payload, payloads, rows, run_sql, spool_path, stored_ids

import usage_dashboard as app

TOTALS = "SELECT COUNT(*), SUM(total_tokens) FROM events"


@pytest.fixture
def filled(program, proxy):
    """A dashboard that has been told of 50 requests."""
    port = configure(program, proxy)
    proxy.push(*payloads(50, tokens={"input_tokens": 5, "output_tokens": 2}))
    running = start(program, port)
    running.wait_for(lambda: get(port, "/api/health")["database"]["events"] == 50)
    return running


def test_backup_beside_the_running_dashboard_has_all_that_was_popped_and_is_a_database(program, proxy, filled, tmp_path):
    proxy.push(payload(50))
    proxy.wait_for(lambda: proxy.queued == 0)
    done = program.run("backup", tmp_path / "copy.db")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path / 'copy.db'}: 51 requests with 350 tokens" in done.stdout and "checked" in done.stdout
    assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600
    assert rows(tmp_path / "copy.db", TOTALS) == rows(program.folder / "usage.db", TOTALS)
    assert rows(tmp_path / "copy.db", "PRAGMA integrity_check") == [("ok",)]
    with closing(app.Store(tmp_path / "copy.db")) as store:
        assert (len(stored_ids(store)), store.find_faults()) == (51, [])


def test_backup_is_restored_by_moving_it_where_the_database_was(program, proxy, filled, tmp_path):
    assert program.run("backup", tmp_path / "copy.db").returncode == 0
    assert filled.terminate() == 0
    for path in program.folder.glob("usage.db*"):
        path.unlink()
    (tmp_path / "copy.db").rename(program.folder / "usage.db")
    proxy.push(payload(50))
    port = configure(program, proxy)
    start(program, port).wait_for(lambda: get(port, "/api/health")["database"]["events"] == 51)


def test_backup_is_taken_of_a_database_that_nobody_has_open(program, store, tmp_path):
    run_sql(store.path, "INSERT INTO events(ts_epoch, total_tokens, failed) VALUES (1e9, 7, 0), (2e9, NULL, 0)")
    store.close()
    done = program.run("backup", "--db", store.path, "copy.db")
    assert (done.returncode, rows(program.folder / "copy.db", TOTALS)) == (0, [(2, 7)])
    assert f"{program.folder / 'copy.db'}: 2 requests with 7 tokens" in done.stdout


def test_backup_refuses_what_is_there_already_and_what_cannot_be(call, store, tmp_path):
    store.close()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "not-sqlite.db").write_text("no database at all" * 99)
    sqlite3.connect(str(tmp_path / "other.db")).close()
    before = sorted(tmp_path.rglob("*"))
    for source, target, said in [
        (store.path, tmp_path / "file", "exists already"),
        (store.path, tmp_path / "link", "exists already"),
        (store.path, tmp_path, "exists already"),
        (store.path, store.path, "exists already"),
        (store.path, tmp_path / "usage.db-wal", "database itself uses"),
        (store.path, tmp_path / "none" / "copy.db", "No such file or directory"),
        (store.path, tmp_path / "file" / "copy.db", "Not a directory"),
        (store.path, tmp_path / ("n" * 300), "too long"),
        (tmp_path / "absent.db", tmp_path / "copy.db", "there is no database"),
        (tmp_path / "not-sqlite.db", tmp_path / "copy.db", "not a database"),
        (tmp_path / "other.db", tmp_path / "copy.db", "no such table: events"),
    ]:
        done = call("backup", "--db", source, target)
        assert (done.returncode, done.stdout) == (1, "") and said in done.stderr, (target, done)
        assert str(target if target != store.path else source) in done.stderr or source.name in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


def test_backup_on_a_full_disk_leaves_nothing(program, store, tmp_path):
    store.close()
    run_sql(store.path, "CREATE TABLE large(x); INSERT INTO large VALUES (zeroblob(4000000))")
    before = sorted(tmp_path.rglob("*"))

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = program.run("backup", "--db", store.path, tmp_path / "copy.db", preexec_fn=fill)
    assert done.returncode == 1 and "no backup was made" in done.stderr and "nothing is left of it" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_backup_of_a_damaged_database_is_none(call, store, tmp_path):
    run_sql(store.path, "CREATE TABLE t(x); INSERT INTO t SELECT zeroblob(900) FROM sqlite_master; CREATE INDEX i ON t(x)")
    store.close()
    with open(store.path, "r+b") as file:
        file.seek(-2000, 2)
        file.write(b"\x55" * 1500)
    done = call("backup", "--db", store.path, tmp_path / "copy.db")
    assert done.returncode == 1 and "no backup was made" in done.stderr
    assert not (tmp_path / "copy.db").exists() and not spool_path(store).with_name("copy.db").exists()
