"""Files that another program made: odd values, constraints that ours lack, and tables that are not ours."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from support import ALWAYS, DATA, NOON, ORIGINAL_ROWS, Site, event, make_original, put, record, rows, run_sql

import usage_dashboard as app

ODD_VALUES = [b"\xff\x00", b"gpt", float("inf"), float("-inf"), NOON * 1000, -5, 12.5, "text", "", 2**40, 2**63 - 1,
              "1e999", "\ud83d", None]  # fmt: skip
QUESTIONS = ("summary?range=all", "summary?range=7d", "requests?limit=500", "requests?q=x", "requests?range=7d",
             "quota", "health")  # fmt: skip


def put_odd_rows(path, table, column):
    """Add a row for each odd value to a file, as an import would, with ids up to the greatest there is."""
    with closing(sqlite3.connect(str(path))) as db:
        names = ", ".join(row[1] for row in db.execute(f"PRAGMA table_info({table})").fetchall()[1:])
        for number, value in enumerate(ODD_VALUES):
            odd = "CAST(x'ff80' AS TEXT)" if value == "\ud83d" else "?"  # text that is no UTF-8
            db.execute(f"UPDATE {table} SET {column} = {odd} WHERE id = 1", () if odd != "?" else (value,))
            db.execute(f"INSERT INTO {table} SELECT ?, {names} FROM {table} WHERE id = 1", (2**63 - 1 - number,))
        db.commit()


@pytest.mark.parametrize("before", ["original", "3.0.0"])
@pytest.mark.parametrize("table", ["events", "quota_snapshots"])
def test_adopted_file_with_odd_values_is_answered_from(tmp_path, table, before):
    make_original(tmp_path / "seen.db", ORIGINAL_ROWS)
    for _, column, *_ in rows(tmp_path / "seen.db", f"PRAGMA table_info({table})")[1:]:
        path = tmp_path / column / "usage.db"
        path.parent.mkdir()
        if before == "original":
            make_original(path, ORIGINAL_ROWS)
        else:
            run_sql(path, (DATA / "usage-3.0.0.sql").read_text(encoding="utf-8"))
            run_sql(path, f"UPDATE {table} SET id = 1 WHERE id = (SELECT MAX(id) FROM {table})")
        put_odd_rows(path, table, column)
        with closing(Site(path.parent)) as site:
            put(site.store, event(at=NOON - 86400), event(at=NOON + 60), sequence=99)
            put(site.store, event(at=NOON - 90), sequence=100)
            while site.store.delete_some(NOON - 3600):
                pass
            assert site.store.find_faults() == [], column
            for question in QUESTIONS:
                reply, body = site.ask(f"/api/{question}")
                assert reply.status == 200, (column, question, body)
                assert not re.search(rb"\b(NaN|Infinity)\b", body), (column, question)
            assert max(row["id"] for row in site.store.requests(500)) < 2**53


def test_odd_values_of_an_adopted_row_become_what_they_mean_or_unknown(tmp_path, open_store):
    make_original(tmp_path / "usage.db", ORIGINAL_ROWS)
    put_odd_rows(tmp_path / "usage.db", "events", "input_tokens")
    run_sql(tmp_path / "usage.db", f"""INSERT INTO events(ts_epoch, model, failed, total_tokens) VALUES
        ({NOON * 1000}, x'6770742d352e34', 7, 1000000000000), (9e999, 'm', 0, 1), ({NOON + 9}, 'm', 'true', 1e12 + 1)""")
    store = open_store()
    assert {row[0] for row in rows(store.path, "SELECT input_tokens FROM events WHERE id > 5")} == {None}
    found = "SELECT ts_epoch, model, failed, total_tokens FROM events WHERE source IS NULL AND id > 5"
    assert sorted(rows(store.path, found), key=str) == [
        (NOON, "gpt-5.4", 1, 10**12), (NOON + 9, "m", 1, None), (None, "m", 0, 1)]  # fmt: skip
    assert [row["ts_epoch"] for row in store.requests(1)] == [NOON + 9]
    assert store.event_count == 3 + len(ODD_VALUES) + 3 == len(store.requests(500)) + 1


NAMES = "timestamp ts_epoch auth_index source model input_tokens output_tokens reasoning_tokens total_tokens latency_ms"
OURS = ", ".join([f"{name} {'TEXT REAL INTEGER TEXT TEXT'.split()[n] if n < 5 else 'INTEGER'}"
                  for n, name in enumerate(NAMES.split())] + ["failed INTEGER"])  # fmt: skip
STRICT = OURS.replace("ts_epoch REAL", "ts_epoch REAL NOT NULL").replace("latency_ms INTEGER", "latency_ms NOT NULL")
DECLARED = {
    "not null": (STRICT, ""),
    "unique": (f"{OURS}, UNIQUE(source, model)", ""),
    "unique index": (OURS, "CREATE UNIQUE INDEX one ON events(source, model)"),
    "check": (f"{OURS}, CHECK(latency_ms < 100 OR failed IS NULL)", ""),
    "foreign key": (f"{OURS}, FOREIGN KEY(source) REFERENCES people(mail)", "CREATE TABLE people(mail PRIMARY KEY)"),
    "sequence": (OURS, f"INSERT INTO sqlite_sequence VALUES ('events', {2**63 - 1})"),
    "types": (OURS.replace("INTEGER", "TEXT").replace("REAL", ""), ""),
    "more columns": (f"{OURS}, \"my \"\"note\" VARCHAR(9) DEFAULT 'x'", ""),
    "trigger": (OURS, "CREATE TRIGGER \"no \"\"more\" BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'no'); END"),
    "view": (STRICT, "CREATE VIEW seen AS SELECT id FROM events"),
    "unique index of our name": (OURS, "CREATE UNIQUE INDEX events_by_time ON events(ts_epoch)"),
    "names of ours": (f"{OURS.replace('model', 'MODEL')}, reason_id NOT NULL DEFAULT 7", "CREATE TABLE rebuilt(a)"),
    "computed": (f"{OURS}, cached_tokens INTEGER AS (total_tokens / 2), CHECK(1)", ""),
}


@pytest.mark.parametrize("kind", DECLARED)
def test_adopted_table_keeps_rows_and_ids_without_what_ours_does_not_declare(tmp_path, open_store, kind):
    path, before = tmp_path / "usage.db", [*ORIGINAL_ROWS[:2], (2**40, "t", NOON + 2, *[None] * 7, 5, 0)]
    declared, more = DECLARED[kind]
    key = f"id INTEGER PRIMARY KEY{' AUTOINCREMENT' if kind == 'sequence' else ''}"
    run_sql(path, f"CREATE TABLE events({key}, {declared}); {more}")
    names, lines = f"id, {', '.join(NAMES.split())}, failed", []
    with closing(sqlite3.connect(str(path))) as db:
        db.executemany(f"INSERT INTO events({names}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", before)
        db.commit()
    store = open_store(announce=lines.append)
    assert rows(path, f"SELECT {names} FROM events") == before
    same = event(at=NOON, source="an@example.com", latency_ms=None)
    assert put(store, same, same._replace(latency_ms=500), sequence=1)
    assert (store.event_count, store.counts["rejected"], store.find_faults()) == (5, 0, [])
    assert any(line.startswith("events: ") and ("no \"more" in line or kind != "trigger") for line in lines)
    if kind == "view":
        assert len(rows(path, "SELECT * FROM seen")) == 5
    if kind == "more columns":
        assert rows(path, 'SELECT "my ""note" FROM events WHERE id < 3') == [("x",)] * 2


def test_adopted_tables_without_an_id_or_other_columns_are_given_them(tmp_path, open_store):
    run_sql(tmp_path / "usage.db", f"""
        CREATE TABLE events(timestamp TEXT, ts_epoch REAL, model TEXT); CREATE TABLE quota_snapshots(email, ts_epoch, windows);
        INSERT INTO events(ts_epoch, model) VALUES ({NOON}, 'm');
        INSERT INTO quota_snapshots VALUES ('a@x.com', 1.8e9, 'two')""")
    store = open_store()
    assert [(row["id"], row["ts_epoch"], row["model"]) for row in store.requests(5)] == [(1, NOON, "m")]
    assert app.add_sums(store.usage(ALWAYS, 3600, 0).cells.values())[0] == 1
    assert [(row["email"], row["id"], row["windows"]) for row in store.quotas()] == [("a@x.com", 1, None)]


def test_start_that_is_killed_while_a_table_is_rebuilt_can_be_run_again(tmp_path, open_store):
    path = tmp_path / "usage.db"
    run_sql(path, f"""CREATE TABLE events(id INTEGER PRIMARY KEY, {STRICT});
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
        INSERT INTO events SELECT i, 't', {NOON} + i, 1, 'a@x.com', 'm', 1, 1, 1, 3, 9, 0 FROM n""")  # fmt: skip
    code = f"import usage_dashboard as app, pathlib; app.Store(pathlib.Path({str(path)!r}), announce=print)"
    for _ in range(3):
        program = subprocess.Popen([sys.executable, "-uc", code], cwd=str(DATA.parent.parent), stdout=subprocess.PIPE)
        assert program.stdout.readline().startswith(b"adopting 60,000 rows")
        program.kill()
        program.communicate()
    assert (open_store().event_count, open_store().find_faults()) == (60000, [])
    assert rows(path, "SELECT MAX(id), SUM(total_tokens) FROM events") == [(60000, 180000)]
    assert rows(path, "SELECT name FROM sqlite_master WHERE name LIKE 'rebuilt%'") == []


def test_database_of_another_dashboard_opens_and_its_own_tables_stay(tmp_path, open_store):
    run_sql(tmp_path / "usage.db", (DATA / "other-dashboard.sql").read_text(encoding="utf-8"))
    others = rows(tmp_path / "usage.db", "SELECT * FROM usage_events")
    store = open_store()
    assert [(row["email"], row["primary_remaining_percent"]) for row in store.quotas()] == [("old@example.com", 70)]
    headers = {"Plan-Type": "plus", "Primary-Used-Percent": "55", "Primary-Window-Minutes": "300",
               "Primary-Reset-At": str(int(NOON) + 7200)}  # fmt: skip
    headers = {f"X-Codex-{name}": [value] for name, value in headers.items()}
    sent = record(source="old@example.com", timestamp=app.utc_text(NOON), response_headers=headers)
    parsed = app.parse_events([json.dumps(sent).encode()])
    traffic = app.TrafficReadings(app.AccountFiles([tmp_path]), store, lambda: NOON)
    assert store.store_batch(parsed, 1, NOON)
    traffic.note(parsed.events)
    traffic.save_due()
    readings = rows(store.path, "SELECT primary_used_percent, raw_json FROM quota_snapshots ORDER BY id")
    assert readings == [(30, "{}"), (55, None)]
    assert rows(store.path, "SELECT * FROM usage_events") == others
    assert app.add_sums(store.usage(ALWAYS, 3600, 0).cells.values())[0] == 1 and store.find_faults() == []
