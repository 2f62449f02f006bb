"""What the tests share: events, readings, databases, and the API over a store."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.client
import json
import socket
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from sockets import PATIENCE_S

import usage_dashboard as app

DATA = Path(__file__).resolve().parent / "data"
SAMPLES = (DATA / "events.jsonl").read_bytes().splitlines()  # the eighth is a warm-up, which is ignored
# Derived by hand from the token rules: (UTC time, source, model, input, output, reasoning, cached, written, total).
EXPECTED_SAMPLES = [
    ("2026-05-03T01:14:22.048103Z", "dev.three@example.net", "gpt-5.3-codex", 15230, 812, 384, 14080, None, 16042),
    ("2026-08-22T13:07:45.902130Z", "writer@example.com", "claude-sonnet-4-6", 50266, 1840, 0, 48210, 2044, 52106),
    ("2026-05-28T18:03:04.000000Z", "dev.one@example.com", "gpt-5.4", 90122, 3021, 1990, 88000, 0, 93143),
    ("2026-07-25T07:10:00.120034Z", "dev.one@example.com", "gpt-5.4", 0, 0, 0, 0, 0, 0),
    ("2026-07-25T07:10:00.509117Z", "dev.two@example.org", "gpt-5.4", 4210, 950, 512, 2048, 0, 5160),
    ("2026-08-22T13:00:00.000000Z", "AIz…0001 #8d9271", "gemini-3-pro-preview", 1000, 420, 120, 400, 0, 1420),
    ("2026-08-22T12:15:02.731000Z", "", "gpt-5.5", 182044, 5120, 3344, 180224, 0, 187164),
]
QUOTA = json.loads((DATA / "quota.json").read_text(encoding="utf-8"))
QUOTA_BY_NAME = {sample["name"]: sample for sample in QUOTA["samples"]}
ALWAYS = app.Window(0.0, 4e9)
NOON = 1_780_000_200.0  # a multiple of 300 s, not of 900 s
NOW = 1_793_534_400.0  # 2026-11-01 12:00:00 UTC, the time of a Site
KEY = "secret-key"
WRONG = "wrong-key-of-the-owner"


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# ---- events and readings ---------------------------------------------------------------------------------


def record(**changes: Any) -> dict[str, Any]:
    """Return the smallest event that is good, as a proxy sends it; a change to None leaves the key out."""
    base = {"timestamp": "2026-08-22T13:00:00Z", "source": "an@example.com", "auth_index": "00000000000000ab",
            "model": "gpt-5.4", "provider": "codex", "failed": False, "latency_ms": 10}  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def payload(number: int = 0, **changes: Any) -> bytes:
    """Return the JSON of a record that is told apart by its request id."""
    return json.dumps(record(**{"request_id": f"r{number}", **changes})).encode()


def payloads(count: int, first: int = 0, **changes: Any) -> list[bytes]:
    return [payload(number, **changes) for number in range(first, first + count)]


def event(at: float = NOON, **changes: Any) -> app.Event:
    """Return a stored event that has everything but an error; `changes` are its columns."""
    told = {name: changes.pop(name) for name in app.Context._fields if name in changes}
    made = _whole_event()._replace(**{"timestamp": app.utc_text(at), "ts_epoch": at, **changes})
    return made._replace(context=made.context._replace(**told))


@functools.lru_cache(maxsize=None)
def _whole_event() -> app.Event:
    usage = {"input_tokens": 100, "output_tokens": 20, "reasoning_tokens": 5, "cached_tokens": 80, "total_tokens": 120}
    more = {"endpoint": "POST /v1/responses", "auth_type": "oauth", "alias": "gpt-5.4", "reasoning_effort": "high",
            "service_tier": "auto", "api_key": "sk-client-aaaa-1111", "fail": {"status_code": 200}}  # fmt: skip
    (made,) = app.parse_events([payload(tokens=usage, latency_ms=900, request_id="5d0c8e1f", **more)]).events
    return made._replace(plan="plus")


MALFORMED = [  # what came, and what is said of it
    (b"", "not JSON"), (b"{", "not JSON"), (b"1,0,2", "not JSON"), (b'{"timestamp": NaN}', "not JSON"),
    (b"\xff\xfe", "not JSON: UnicodeDecodeError"), (b"[" * 100_000, "not JSON: RecursionError"),
    (b"null", "not a JSON object"), (b"[]", "not a JSON object"), (b"7", "not a JSON object"),
    (b'"text"', "not a JSON object"), (payload(1) + payload(2), "not JSON"), (b"{}", "timestamp is missing"),
    (payload(timestamp=5), "timestamp is missing"),
    (payload(timestamp="2026-08-22 13:00"), "timestamp is not an RFC 3339 time"),
    (payload(timestamp="1999-01-01T00:00:00Z"), "timestamp is outside 2020 to 2100"),
    (payload(tokens=[1]), "tokens is not an object"),
    (payload(tokens={"input_tokens": "12"}), "tokens.input_tokens is not"),
    (payload(tokens={"input_tokens": 1.5}), "tokens.input_tokens is not"),
    (payload(tokens={"total_tokens": True}), "tokens.total_tokens is not"),
    (payload(tokens={"total_tokens": 10**12 + 1}), "tokens.total_tokens is larger"),
    (payload(latency_ms="12"), "latency_ms is not"), (payload(latency_ms=10**30), "latency_ms is larger"),
    (payload(model=["x"]), "model is not a text"), (payload(source=7), "source is not a text"),
    (payload(failed="no"), "failed is neither"), (payload(auth_index={"a": 1}), "auth_index is not a text"),
    (payload(fail=[1]), "fail is not an object"),
]  # fmt: skip
ODD_BUT_GOOD = [
    payload(100, model="\ud800"), payload(101, source="a\ud800@x.com"), payload(102, source="\x00"),
    payload(103, model="x" * 5000), payload(104, latency_ms=-5), payload(105, request_id="\u202e\x07"),
    payload(106, auth_index="1e999"), payload(107, provider="\ud83d"),
    payload(108, response_headers={"X-Codex-Plan-Type": ["\ud800"]}), payload(109, api_key="\udfff"),
    payload(110, failed=True, fail={"status_code": 429, "body": '{"error": {"message": "\ud800 \\ud801"}}'}),
]  # fmt: skip


def ids_of(payloads) -> list[str]:
    """Return the request ids of events as they were sent."""
    return [json.loads(payload)["request_id"] for payload in payloads]


def replies_of(payloads) -> list[bytes]:
    """Return events as a queue's replies to RPOP."""
    return [b"$%d\r\n%s\r\n" % (len(one), one) for one in payloads]


def put(store, *events, sequence=None, rejects=(), ignored=0) -> bool:
    """Store a batch of events, by default under the next number."""
    number = sequence if sequence is not None else store.counts["sequence"] + 1
    return store.store_batch(app.Parsed(list(events), list(rejects), ignored), number, NOON)


def sums_by(usage, part) -> dict[str, Any]:
    """Return the sums of each account (by its name), model or key."""
    return {getattr(value, "name", value): app.add_sums(map(usage.cells.get, cells))
            for value, cells in usage.by(part).items()}  # fmt: skip


def write_account(folder: Path, number: int = 1, **changes: Any) -> Path:
    """Write the account file of `user<number>@example.com` with the token `tok-secret-<number>`."""
    content = {"type": "codex", "email": f"user{number}@example.com", "account_id": f"acc-{number}",
               "access_token": f"tok-secret-{number}", "refresh_token": f"refresh-secret-{number}"}  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / f"codex-{number}.json"
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return path


def id_token(claims: Any) -> str:
    """Return a JWT as an account file has it, without a real signature."""
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.sig-secret"


def reading(**changes) -> dict[str, Any]:
    """Return a row of quota_snapshots: a good one, of a refresh."""
    base = {"email": "an@example.com", "account_id_tag": "#3f9a2c", "timestamp": "t", "ts_epoch": NOON, "plan": "plus",
            "allowed": 1, "limit_reached": 0, "primary_used_percent": 23, "primary_remaining_percent": 77,
            "state": "ok", "source": "refresh", "windows": "[]"}  # fmt: skip
    return {**base, **changes}


# ---- databases -------------------------------------------------------------------------------------------


def rows(path, sql) -> list[tuple[Any, ...]]:
    """Read the database as another program would."""
    with contextlib.closing(sqlite3.connect(str(path), timeout=PATIENCE_S)) as db:
        return db.execute(sql).fetchall()


def run_sql(path, script):
    """Change a database as another program would."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.executescript(script)


def stored_ids(store) -> list[str]:
    """Return the request ids of what is stored in a store, or a file, in the order of storing."""
    return [row[0] for row in rows(getattr(store, "path", store), "SELECT request_id FROM events ORDER BY id")]


def lock(store):
    """Lock the database for writing, as a backup tool or an editor would; close() or rollback() ends it."""
    db = sqlite3.connect(str(store.path), isolation_level=None, check_same_thread=False)
    db.execute("BEGIN IMMEDIATE")
    return db


def room(store, pages) -> None:
    """Limit the database to so many pages, as a full disk would."""
    with store._write_lock:
        store._writer.execute(f"PRAGMA max_page_count = {pages}")


def spool_path(store) -> Path:
    """Return where the events lie that could not be stored yet."""
    return Path(f"{store.path}.spool")


def spool_line(content: Any) -> bytes:
    """Return a line of a spool as this version sums it, whatever it says: bytes, or what becomes JSON."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


ORIGINAL_TABLES = """
CREATE TABLE events(id INTEGER PRIMARY KEY, timestamp TEXT, ts_epoch REAL, auth_index INTEGER, source TEXT,
  model TEXT, input_tokens INTEGER, output_tokens INTEGER, reasoning_tokens INTEGER, total_tokens INTEGER,
  latency_ms INTEGER, failed INTEGER);
CREATE TABLE quota_snapshots(id INTEGER PRIMARY KEY, timestamp TEXT, ts_epoch REAL, email TEXT, plan TEXT,
  allowed INTEGER, limit_reached INTEGER, primary_used_percent INTEGER, primary_remaining_percent INTEGER,
  primary_reset_at TEXT, secondary_used_percent INTEGER, secondary_remaining_percent INTEGER,
  secondary_reset_at TEXT, credits_balance TEXT, raw_json TEXT);
INSERT INTO quota_snapshots VALUES
  (1, '2026-05-28', '1780000000', 'an@example.com', 'plus', 1, 0, 40, 60, 'x', 10, 90, 'y', '0', '{}');
"""
ORIGINAL_ROWS = [
    (1, "t", NOON, 3, "an@example.com", "gpt-5.4", 100, 20, 5, 125, 10, 0),
    (2, "t", NOON + 1, "9c1d0be2f4a76633", "b@example.com", "gpt-5.5", 7, 3, 0, 10, 10, 1),
    (5, "t", NOON + 2, None, None, None, None, None, None, None, None, None),
]


def make_original(path, rows=ORIGINAL_ROWS) -> None:
    """Write a database as the original dashboard made it."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.executescript(ORIGINAL_TABLES)
        db.executemany("INSERT INTO events VALUES (?,?,?,?,?,?,?,?,?,?,?,?)", rows)
        db.commit()


# ---- the API over a store --------------------------------------------------------------------------------


class Site:
    """Serve a real store on a free port; `status` is what the collector would say."""

    PAGE = "<!doctype html><style>a{}</style><script>1</script>"

    def __init__(self, folder, page_text=PAGE, head_s=10.0, **settings):
        self.config = replace(app.Config(), dashboard_host="127.0.0.1", auth_dir=str(folder / "accounts"), **settings)
        self.now = NOW
        self.store = app.Store(folder / "usage.db")
        self.stop = threading.Event()
        self.status = {"state": "waiting", "message": "Connected."}
        (folder / "page.html").write_text(page_text, encoding="utf-8")
        log = app.Log((folder / "log").open("w"))
        clock = {"clock": lambda: self.now}
        self.refresher = app.QuotaRefresher(self.config, self.store, log, self.stop, gap_s=(0, 0), **clock)
        made = app.App(self.config, self.store, self.refresher, lambda: dict(self.status), log, **clock)
        made.names = app.Names(self.config.names, folder / "config.json", log)
        self.server = app.make_server("127.0.0.1", 0, head_s)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve, args=(made, app.load_page(folder / "page.html"), 0.01))
        self.thread.start()
        self.log = folder / "log"

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        self.refresher._log._stream.close()
        self.store.close()

    def ask(self, path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
            reply = connection.getresponse()
            return reply, reply.read()
        finally:
            connection.close()

    def json(self, path, **headers):
        reply, body = self.ask(path, **headers)
        assert reply.status == 200, body
        return json.loads(body)

    def error(self, path, status, method="GET", **headers):
        reply, body = self.ask(path, method, **headers)
        assert reply.status == status, body
        content = json.loads(body)
        assert set(content) == {"error", "code"}
        return content

    def raw(self, data):
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


def at(hours_ago: float, **changes: Any) -> app.Event:
    """Return an event of so many hours before NOW."""
    return event(at=NOW - 3600 * hours_ago, **changes)
