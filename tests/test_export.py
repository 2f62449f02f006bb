"""Every request of a window as a file."""

from __future__ import annotations

import csv
import io
import json
import os
import socket
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from program import configure
from support import NOW, at, event, put

import usage_dashboard as app

BEGIN = (
    "id timestamp ts_epoch account source auth_index model input_tokens output_tokens reasoning_tokens cached_tokens "
    "total_tokens latency_ms ttft_ms failed status_code error request_id"
).split()
END = ["local_time", "cost_usd", "account_name", "key_name"]


def fill(site, count=1203):
    """Store requests of which many have one time; 1,203 are more than two pages."""
    put(site.store, *(at(1 + number // 7 / 60, request_id=f"r{number}", model=f"gpt-5.{number % 3}", failed=number % 2,
                         status_code=429 if number % 2 else None) for number in range(count)))  # fmt: skip


def table(body):
    return list(csv.DictReader(io.StringIO(body.decode(), newline="")))


def listed(site, question=""):
    """Return all rows of /api/requests, page by page, oldest first."""
    rows, cursor = [], ""
    while cursor is not None:
        answer = site.json(f"/api/requests?limit=500&range=24h{question}{cursor and '&before=' + cursor}")
        rows, cursor = rows + answer["requests"], answer["next"]
    return rows[::-1]


@pytest.mark.parametrize("question", ["", "&model=gpt-5.1", "&status=429&account=an@example.com", "&q=r11"])
def test_export_has_every_request_of_the_list_once_oldest_first_in_both_formats(make_site, question):
    site = make_site()
    fill(site)
    wanted = listed(site, question)
    reply, body = site.ask(f"/api/export?range=24h&format=jsonl&tz_offset=420{question}")
    rows = [json.loads(line) for line in body.decode().splitlines()]
    assert list(rows[0])[: len(BEGIN)] == BEGIN and list(rows[0])[-4:] == END
    local = timezone(timedelta(hours=7))
    for row in wanted:
        row["local_time"] = datetime.fromtimestamp(row["ts_epoch"], local).strftime("%Y-%m-%d %H:%M:%S")
    assert rows == wanted and len(rows) > 10
    assert reply.headers["Content-Disposition"] == 'attachment; filename="requests-2026-11-01.jsonl"'
    reply, body = site.ask(f"/api/export?range=24h&tz_offset=420{question}")
    assert table(body) == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert reply.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert body.count(b"\r\n") == len(rows) + 1 == body.count(b"\n")


def test_export_makes_no_formula_of_a_text_and_quotes_what_csv_needs(make_site):
    site = make_site()
    texts = ["=1+1", "+1", "-1", "@x", "\tx", "\n=1", "＝1", 'a,"b"\nc', "thường"]
    put(site.store, *(at(1 - number / 100, model=text) for number, text in enumerate(texts)))
    rows = table(site.ask("/api/export?range=24h")[1])
    assert [row["model"] for row in rows] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "'\n=1", "'＝1", 'a,"b"\nc', "thường"]
    assert float(rows[0]["ts_epoch"]) and rows[0]["cost_usd"] == ""


def test_export_of_nothing_is_a_header_and_wrong_questions_are_told(make_site):
    site = make_site()
    assert table(site.ask("/api/export")[1]) == [] and site.ask("/api/export")[1].startswith(b"id,timestamp,")
    assert site.ask("/api/export?format=jsonl")[1] == b""
    for question in ("limit=1", "before=1", "sort=time", "order=asc", "format=xml", "range=foo", "status=x"):
        told = site.error(f"/api/export?{question}", 400)
        assert question.split("=")[0] in told["error"]
    reply, body = site.ask("/api/export", method="HEAD")
    assert (reply.status, body, reply.headers["Transfer-Encoding"]) == (200, b"", "chunked")


def test_export_to_an_old_client_ends_with_the_connection_and_to_a_new_one_keeps_it(make_site):
    site = make_site()
    fill(site, 700)
    head, _, body = site.raw(b"GET /api/export?range=24h HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"chunked" not in head and len(table(body)) == 700
    question = b"GET /api/export?range=24h&format=jsonl HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert site.raw(question * 2).count(b"HTTP/1.1 200") == 2


def read_slowly(site, question, meanwhile):
    """Ask and take little of the answer, then do something, and return all that came."""
    fill(site, 20000)
    with closing(socket.create_connection(("127.0.0.1", site.port), timeout=20)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(question)
        received = client.recv(1000)
        meanwhile()
        while part := client.recv(1 << 20):
            received += part
    return received


def test_export_that_breaks_off_is_no_whole_one(make_site):
    site = make_site()
    question = b"GET /api/export?range=24h HTTP/1.1\r\nHost: localhost\r\n\r\n"
    received = read_slowly(site, question, site.store.close)
    assert received.startswith(b"HTTP/1.1 200") and not received.endswith(b"0\r\n\r\n")


def test_a_reader_that_stops_holds_up_neither_recording_nor_the_log_of_the_database(make_site):
    site = make_site()

    def record_on():
        for number in range(40):
            put(site.store, *(event(at=NOW + number, request_id=f"late{number}") for _ in range(500)))
        assert os.path.getsize(f"{site.store.path}-wal") < 16e6
        assert site.json("/api/health")["database"]["events"] == 40000

    received = read_slowly(site, b"GET /api/export?range=7d HTTP/1.0\r\n\r\n", record_on)
    assert len(table(received.partition(b"\r\n\r\n")[2])) == 20000  # those of its window


def test_export_command_prints_the_same(call, program, make_site):
    site = make_site()
    fill(site)
    configure(program, names={"an@example.com": "An"})
    arguments = ("--db", site.store.path, "2026-11-01", "--format", "jsonl", "--model", "gpt-5.1", "--account", "An")
    done = program.run("export", *arguments, env={"TZ": "UTC", "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    start, end = app.parse_time("2026-11-01T00:00:00Z")[0], app.parse_time("2026-11-02T00:00:00Z")[0]
    wanted = [row["request_id"] for row in listed(site, "&model=gpt-5.1") if start <= row["ts_epoch"] < end]
    assert [row["request_id"] for row in rows] == wanted != []
    assert {row["account_name"] for row in rows} == {"An"}
    for wrong in (("--format", "xml"), ("--status", "x"), ("2026-02-30",), ("soon",)):
        done = call("export", "--db", site.store.path, *wrong)
        assert (done.returncode, done.stdout) == (2, "") and wrong[0].strip("-") in done.stderr
