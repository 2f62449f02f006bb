"""Files that another program made: odd values, constraints that ours lack, and tables that are not ours."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from support import (
    ALWAYS,
    DATA,
    NOON,
    ORIGINAL_ROWS,
    Site,
    event,
    make_original,
    put,
    record,
    rows,
    run_sql,
)

import usage_dashboard as app

OTHERS = (DATA / "other-dashboard.sql").read_text(encoding="utf-8")


# ---- odd values in an adopted file: what they mean, or unknown ---------------------------------------------


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
    columns = [row[1] for row in rows(tmp_path / "seen.db", f"PRAGMA table_info({table})")[1:]]
    for column in columns:
        folder = tmp_path / column
        folder.mkdir()
        if before == "original":
            make_original(folder / "usage.db", ORIGINAL_ROWS)
        else:
            run_sql(folder / "usage.db", (DATA / "usage-3.0.0.sql").read_text(encoding="utf-8"))
            run_sql(folder / "usage.db", f"UPDATE {table} SET id = 1 WHERE id = (SELECT MAX(id) FROM {table})")
        put_odd_rows(folder / "usage.db", table, column)
        site = Site(folder)
        try:
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
        finally:
            site.close()


def test_odd_values_of_an_adopted_row_become_what_they_mean_or_unknown(tmp_path, open_store):
    make_original(tmp_path / "usage.db", ORIGINAL_ROWS)
    put_odd_rows(tmp_path / "usage.db", "events", "input_tokens")
    with closing(sqlite3.connect(str(tmp_path / "usage.db"))) as db:
        odd = [(NOON * 1000, b"gpt-5.4", 7, 10**12), (float("inf"), "m", 0, 1), (NOON + 9, "m", "true", 10**12 + 1)]
        db.executemany("INSERT INTO events(ts_epoch, model, failed, total_tokens) VALUES (?, ?, ?, ?)", odd)
        db.commit()
    store = open_store()
    counts = {row[0] for row in rows(store.path, "SELECT input_tokens FROM events WHERE id > 5")}
    assert counts == {None}
    found = "SELECT ts_epoch, model, failed, total_tokens FROM events WHERE source IS NULL AND id > 5"
    assert sorted(rows(store.path, found), key=str) == [
        (NOON, "gpt-5.4", 1, 10**12), (NOON + 9, "m", 1, None), (None, "m", 0, 1)]  # fmt: skip
    assert [row["ts_epoch"] for row in store.requests(1)] == [NOON + 9]
    assert store.event_count == 3 + len(ODD_VALUES) + 3 == len(store.requests(500)) + 1


# ---- constraints and triggers that ours lack ---------------------------------------------------------------


COLUMNS = """timestamp TEXT, ts_epoch REAL, auth_index INTEGER, source TEXT, model TEXT, input_tokens INTEGER,
    output_tokens INTEGER, reasoning_tokens INTEGER, total_tokens INTEGER, latency_ms INTEGER, failed INTEGER"""
PLAIN = f"CREATE TABLE events(id INTEGER PRIMARY KEY, {COLUMNS});"
NOT_NULL = COLUMNS.replace("ts_epoch REAL", "ts_epoch REAL NOT NULL").replace("reasoning_tokens INTEGER", "reasoning_"
                                                                              "tokens INTEGER NOT NULL DEFAULT 3")
DECLARED = {
    "not null": f"CREATE TABLE events(id INTEGER PRIMARY KEY, {NOT_NULL});",
    "unique": f"CREATE TABLE events(id INTEGER PRIMARY KEY, {COLUMNS}, UNIQUE(source, model));",
    "unique index": f"{PLAIN} CREATE UNIQUE INDEX one ON events(source, model);",
    "check": f"CREATE TABLE events(id INTEGER PRIMARY KEY, {COLUMNS}, CHECK(latency_ms < 100 OR failed IS NULL));",
    "foreign key": "CREATE TABLE people(mail TEXT PRIMARY KEY); PRAGMA foreign_keys = ON; CREATE TABLE events("
                   f"id INTEGER PRIMARY KEY, {COLUMNS.replace('source TEXT', 'source TEXT REFERENCES people')});"
                   "PRAGMA foreign_keys = OFF;",
    "sequence": f"CREATE TABLE events(id INTEGER PRIMARY KEY AUTOINCREMENT, {COLUMNS});"
                "INSERT INTO sqlite_sequence VALUES ('events', 9223372036854775807);",
    "types": f"CREATE TABLE events(id INTEGER PRIMARY KEY, {COLUMNS.replace('INTEGER', 'TEXT').replace('REAL', '')});",
    "more columns": f"CREATE TABLE events(id INTEGER PRIMARY KEY, {COLUMNS}, \"my \"\"note\" VARCHAR(9) DEFAULT 'x');",
    "without rowid": f"CREATE TABLE events(id INTEGER PRIMARY KEY, {COLUMNS}) WITHOUT ROWID;",
    "trigger": f"{PLAIN} CREATE TRIGGER \"no \"\"more\" BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'no'); END;",
    "view": f"CREATE TABLE events(id INTEGER PRIMARY KEY, {NOT_NULL}); CREATE VIEW seen AS SELECT id FROM events;",
}


@pytest.mark.parametrize("kind", DECLARED)
def test_adopted_table_keeps_its_rows_and_ids_without_what_ours_does_not_declare(tmp_path, open_store, kind):
    path, before = tmp_path / "usage.db", [*ORIGINAL_ROWS[:2], (2**40, "t", NOON + 2, *[None] * 4, None, 0, *[None] * 3)]
    run_sql(path, DECLARED[kind].replace("BEFORE INSERT ON events BEGIN", "BEFORE INSERT ON events WHEN 0 BEGIN"))
    names = "id, timestamp, ts_epoch, auth_index, source, model, input_tokens, output_tokens, reasoning_tokens, " \
            "total_tokens, latency_ms, failed"  # fmt: skip
    with closing(sqlite3.connect(str(path))) as db:
        values = [[3 if value is None and number == 8 else value for number, value in enumerate(row)] for row in before]
        db.executemany(f"INSERT INTO events({names}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", values)
        db.commit()
    lines = []
    store = open_store(announce=lines.append)
    assert rows(path, f"SELECT {names} FROM events") == [(*row[:11], row[11] or 0) for row in map(tuple, values)]
    same = event(at=NOON, source="an@example.com", latency_ms=500, reasoning_tokens=None)
    assert put(store, same, same, sequence=1)
    assert (store.event_count, store.counts["rejected"], store.find_faults()) == (5, 0, [])
    assert any(line.startswith("events: ") for line in lines)
    if kind == "trigger":
        assert 'the trigger no "more of another program is dropped' in lines[1]
    if kind == "view":
        assert len(rows(path, "SELECT * FROM seen")) == 5
    if kind == "more columns":
        assert {row[0] for row in rows(path, 'SELECT "my ""note" FROM events WHERE id < 3')} == {"x"}
    store.close()
    again = []
    assert open_store(announce=again.append).find_faults() == [] and again == []


def test_start_that_is_killed_while_a_table_is_rebuilt_leaves_it_as_it_was(tmp_path, open_store):
    path = tmp_path / "usage.db"
    run_sql(path, f"""{DECLARED["not null"]} CREATE TRIGGER t AFTER DELETE ON events BEGIN SELECT 1; END;
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
        INSERT INTO events SELECT i, 't', {NOON} + i, 1, 'a@x.com', 'm', 1, 1, 1, 3, 9, 0 FROM n""")  # fmt: skip
    code = f"import usage_dashboard as app, pathlib, sys; app.Store(pathlib.Path({str(path)!r}), announce=print)"
    for _ in range(3):
        program = subprocess.Popen([sys.executable, "-uc", code], cwd=str(DATA.parent.parent), stdout=subprocess.PIPE)
        assert program.stdout.readline().startswith(b"adopting 60,000 rows")
        program.kill()
        program.communicate()
    store = open_store()
    assert (store.event_count, store.find_faults()) == (60000, [])
    assert rows(path, "SELECT MAX(id), SUM(total_tokens) FROM events") == [(60000, 180000)]
    assert rows(path, "SELECT name FROM sqlite_master WHERE name = 'rebuilt' OR type = 'trigger'") == []


def test_database_of_another_dashboard_opens_and_its_own_tables_stay(tmp_path, open_store):
    run_sql(tmp_path / "usage.db", OTHERS)
    others = rows(tmp_path / "usage.db", "SELECT * FROM usage_events")
    store = open_store()
    assert [(row["email"], row["primary_remaining_percent"]) for row in store.quotas()] == [("old@example.com", 70)]
    headers = {f"X-Codex-Primary-{name}": [value] for name, value in
               (("Used-Percent", "55"), ("Window-Minutes", "300"), ("Reset-At", str(int(NOON) + 7200)))}  # fmt: skip
    sent = record(source="old@example.com", timestamp=app.utc_text(NOON),
                  response_headers={"X-Codex-Plan-Type": ["plus"], **headers})  # fmt: skip
    parsed = app.parse_events([json.dumps(sent).encode()])
    assert store.store_batch(parsed, 1, NOON)
    traffic = app.TrafficReadings([tmp_path], store, lambda: NOON)
    traffic.note(parsed.events)
    traffic.save_due()
    assert rows(store.path, "SELECT primary_used_percent, raw_json FROM quota_snapshots ORDER BY id") == [
        (30, "{}"), (55, None)]  # fmt: skip
    assert [row["email"] for row in store.quotas()] == ["old@example.com"] * len(store.quotas())
    assert rows(store.path, "SELECT * FROM usage_events") == others
    assert sum(sums[0] for _, sums in store.usage(ALWAYS, 3600, 0).models) == 1 and store.find_faults() == []
