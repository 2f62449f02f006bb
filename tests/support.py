"""What the stand-ins and the tests share: waiting, sockets, events, and the program's parts at work."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import json
import select
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator

import usage_dashboard as app

DATA = Path(__file__).resolve().parent / "data"
SAMPLES = (DATA / "events.jsonl").read_bytes().splitlines()  # the eighth is a warm-up, which is ignored
QUOTA = json.loads((DATA / "quota.json").read_text(encoding="utf-8"))
QUOTA_BY_NAME = {sample["name"]: sample for sample in QUOTA["samples"]}
ALWAYS = app.Window(0.0, 4e9)
NOON = 1_780_000_200.0  # a multiple of 300 s, not of 900 s
NOW = 1_793_534_400.0  # 2026-11-01 12:00:00 UTC, the time of a Site
KEY = "secret-key"
WRONG = "wrong-key-of-the-owner"


# ---- waiting ---------------------------------------------------------------------------------------------


class Watched:
    """An object whose changes a test can wait for.

    Changes are made inside `with self.change():`. A predicate is asked outside the lock, so it may look at
    anything, the program under test included.
    """

    RECHECK_S = 0.1  # for predicates that also look at something that cannot tell of its changes

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._changes = 0

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Take the lock, then wake whoever waits."""
        with self.lock:
            try:
                yield
            finally:
                self._changes += 1
                self._changed.notify_all()

    def describe(self) -> str:
        """Return what state this is in, for the message of a wait that failed."""
        return repr(self)

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 10) -> Any:
        """Return the predicate's first true value; raise AssertionError when there is none in time."""
        deadline = time.monotonic() + timeout
        while True:
            with self.lock:
                seen = self._changes
            value = predicate()
            if value:
                return value
            with self.lock:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise AssertionError(f"not true within {timeout:g} s; {self.describe()}")
                if self._changes == seen:
                    self._changed.wait(min(left_s, self.RECHECK_S))


# ---- reading ---------------------------------------------------------------------------------------------


class ProtocolError(Exception):
    """Input that is not what the protocol allows."""


class Hangup(Exception):
    """The connection is to be closed now."""


class UnexpectedEof(ProtocolError):
    """The peer went away in the middle of something."""


class Stream:
    """One accepted connection, with buffered reading; `sock` is another one after start_tls()."""

    def __init__(self, sock: socket.socket, peer: str, server: Any) -> None:
        self.sock = sock
        self.peer = peer
        self.server = server
        self.buffer = b""
        self.is_shut = False

    def start_tls(self, context: ssl.SSLContext) -> None:
        # The handshake comes second, so that this socket can be closed from outside meanwhile.
        self.sock = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self.sock.do_handshake()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def shut(self, how: int = socket.SHUT_RDWR) -> None:
        """Shut the connection down; whoever reads or writes it wakes up."""
        self.is_shut = True
        with contextlib.suppress(OSError):
            # Not the method of SSLSocket: that pulls its state away under the thread that reads.
            socket.socket.shutdown(self.sock, how)

    def close(self, linger_s: float = 5) -> None:
        """Close so that the peer reads every byte written: unread input would make it a reset."""
        self.shut(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            self.sock.settimeout(linger_s)
            while self.sock.recv(65536):
                pass
        self.sock.close()

    def fill(self) -> bool:
        """Read some more; False at the end of the stream."""
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def take(self, count: int) -> bytes:
        """Read exactly count bytes."""
        while len(self.buffer) < count:
            if not self.fill():
                raise UnexpectedEof
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def line(self) -> bytes:
        """Read a line, without its end."""
        while b"\n" not in self.buffer:
            if not self.fill():
                raise UnexpectedEof
        data, _, self.buffer = self.buffer.partition(b"\n")
        return data[:-1] if data.endswith(b"\r") else data


def read_http_head(stream: Stream) -> tuple[str, str, dict[str, str]]:
    """Read a request line and its headers; header names come in lower case."""
    words = stream.line().decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise ProtocolError
    headers: dict[str, str] = {}
    for line in iter(stream.line, b""):
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon:
            raise ProtocolError
        headers[name.strip().lower()] = value.strip()
    return words[0], words[1], headers


def bearer_token(headers: dict[str, str]) -> str:
    """Return the key that a request carries, or an empty string."""
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else ""


def http_reply(status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> bytes:
    """Return a whole HTTP/1.1 response."""
    fields = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


# ---- listening -------------------------------------------------------------------------------------------


class SocketServer(Watched):
    """Serve each connection in a thread, on a loopback port; a context manager."""

    stream_type = Stream

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        self.host = "127.0.0.1"
        self.port = port
        self.connections = 0
        self.closing = threading.Event()
        self._open: set[Stream] = set()
        self._threads: list[threading.Thread] = []
        self._accepting: threading.Thread | None = None

    def __enter__(self) -> Any:
        self.listen_again()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.stop_listening()
        self.disconnect_all()
        for thread in self._threads:
            thread.join(10)

    @property
    def open_connections(self) -> int:
        """How many connections are open now (`connections` counts all there ever were)."""
        return len(self._open)

    def disconnect_all(self) -> None:
        with self.change():
            for stream in self._open:
                stream.shut()

    def stop_listening(self) -> None:
        """Refuse new connections; open ones live on."""
        accepting, self._accepting = self._accepting, None
        if accepting is not None:
            self._stop_accepting.close()
            accepting.join(10)

    def listen_again(self) -> None:
        """Accept connections, on the same port as before."""
        listener = socket.create_server((self.host, self.port), backlog=128)
        self.port = listener.getsockname()[1]
        stopped, self._stop_accepting = socket.socketpair()
        self._accepting = threading.Thread(target=self._accept, args=(listener, stopped), daemon=True)
        self._accepting.start()

    def admit(self, sock: socket.socket, stopped: socket.socket) -> None:
        """Look at a new connection before the next one is accepted; `stopped` ends it when readable."""

    def serve(self, stream: Any) -> None:
        """Serve one connection; it is closed afterwards, also when the peer has left."""
        raise NotImplementedError

    def _accept(self, listener: socket.socket, stopped: socket.socket) -> None:
        with listener, stopped:
            while True:
                readable, _, _ = select.select([listener, stopped], [], [])
                if stopped in readable:
                    return
                sock, address = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                stream = self.stream_type(sock, address[0], self)
                with self.change():
                    self.connections += 1
                    self._open.add(stream)
                self.admit(sock, stopped)
                thread = threading.Thread(target=self._serve, args=(stream,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, stream: Stream) -> None:
        try:
            with contextlib.suppress(OSError, Hangup):
                self.serve(stream)
        finally:
            stream.close(0 if self.closing.is_set() else 5)
            with self.change():
                self._open.discard(stream)


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def comes_up(process: subprocess.Popen, answers: Callable[[], Any], seconds: float) -> bool:
    """Return whether a process that was just started answers in time; `answers` may raise OSError until then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, app.QueueFault):
            if answers():
                return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    return False


# ---- events and readings ---------------------------------------------------------------------------------


def record(**changes: Any) -> dict[str, Any]:
    """Return the smallest event that is good, as a proxy sends it; a change to None leaves the key out."""
    base = {"timestamp": "2026-08-22T13:00:00Z", "source": "an@example.com", "auth_index": "00000000000000ab",
            "model": "gpt-5.4", "provider": "codex", "failed": False, "latency_ms": 10}  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def payload(number: int = 0, **changes: Any) -> bytes:
    """Return the JSON of a record that is told apart by its request id."""
    return json.dumps(record(**{"request_id": f"r{number}", **changes})).encode()


def payloads(count: int, first: int = 0) -> list[bytes]:
    return [payload(number) for number in range(first, first + count)]


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
    (b"\xff\xfe", "not UTF-8"), (b"[" * 100_000, "too deeply"),
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
    (payload(failed="no"), "failed is neither"), (payload(auth_index={"a": 1}), "auth_index is neither"),
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


def write_account(folder: Path, number: int = 1, **changes: Any) -> Path:
    """Write the account file of `user<number>@example.com` with the token `tok-secret-<number>`."""
    content = {"type": "codex", "email": f"user{number}@example.com", "account_id": f"acc-{number}",
               "access_token": f"tok-secret-{number}", "refresh_token": f"refresh-secret-{number}"}  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / f"codex-{number}.json"
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return path


def reading(**changes) -> dict[str, Any]:
    """Return a row of quota_snapshots: a good one, of a refresh."""
    base = {"email": "an@example.com", "account_id_tag": "#3f9a2c", "timestamp": "t", "ts_epoch": NOON, "plan": "plus",
            "allowed": 1, "limit_reached": 0, "primary_used_percent": 23, "primary_remaining_percent": 77,
            "state": "ok", "source": "refresh", "windows": "[]"}  # fmt: skip
    return {**base, **changes}


# ---- databases -------------------------------------------------------------------------------------------


def rows(path, sql) -> list[tuple[Any, ...]]:
    """Read the database as another program would."""
    with contextlib.closing(sqlite3.connect(str(path), timeout=20)) as db:
        return db.execute(sql).fetchall()


def run_sql(path, script):
    """Change a database as another program would."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        db.executescript(script)


def stored_ids(store) -> list[str]:
    """Return the request ids of what is stored, in the order of storing."""
    return [row[0] for row in rows(store.path, "SELECT request_id FROM events ORDER BY id")]


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


# ---- the collector in a thread ---------------------------------------------------------------------------


class QuickStop(threading.Event):
    """A stop event that records how long it was asked to wait, and waits a few milliseconds instead."""

    def __init__(self, longest_s: float = 0.004) -> None:
        super().__init__()
        self.longest_s = longest_s
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return super().wait(min(timeout, self.longest_s))


class Run(Watched):
    """A collector in a thread of its own; a test sets its clock ahead, and lets its machine sleep."""

    RECHECK_S = 0.01

    def __init__(self, config, store, stop: threading.Event, ahead_s=0.0, commit_s=0.0, **options) -> None:
        super().__init__()
        self.ahead_s = ahead_s
        self.slept_s = 0.0
        self.woken = False  # whether it has looked at the time since it slept
        self.stream = io.StringIO()
        self.store = store
        self.stop = stop
        self.error: BaseException | None = None
        options.update(clock=self._clock, monotonic=self._monotonic)
        self.collector = app.Collector(config, store, app.Log(self.stream), stop, **options)
        self.collector.journal.longest_s = commit_s
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            self.collector.run()
        except BaseException as error:
            self.error = error

    def _clock(self) -> float:
        return time.time() + self.ahead_s + self.slept_s

    def _monotonic(self) -> float:
        self.woken = self.slept_s > 0
        return app.monotonic_s() + self.slept_s

    @property
    def status(self) -> dict:
        return self.collector.status()

    @property
    def state(self) -> str:
        return self.status["state"]

    @property
    def log(self) -> str:
        return self.stream.getvalue()

    @property
    def accounted(self) -> int:
        return sum(self.status[name] for name in ("events", "rejected", "ignored"))

    def describe(self) -> str:
        return f"status {self.status}, error {self.error!r}, log:\n{self.log[-2000:]}"

    def wait_for(self, predicate, timeout: float = 5):
        """Wait for something true; a collector that died in the meantime ends the wait."""
        value = super().wait_for(lambda: predicate() or self.error is not None, timeout)
        assert self.error is None, self.describe()
        return value

    def wait_for_state(self, *states: str) -> str:
        return self.wait_for(lambda: self.state in states and self.state)

    def wait_for_events(self, count: int) -> None:
        self.wait_for(lambda: self.status["events"] >= count)
        assert self.status["events"] == count

    def end(self) -> None:
        """Stop it, and make sure that its thread ended by itself and in peace."""
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive() and self.error is None, self.describe()


def config_of(where=None, **keys) -> app.Config:
    """Return the config for a proxy or a redis-server, with the right key unless told otherwise."""
    if where is not None:
        keys.setdefault("cliproxy_port", where.port)
    return app.Config(**{"management_password": KEY, "poll_interval_seconds": 0.1, **keys})


def wait_a_while(run, waits=12):
    """Let a refused collector have many chances to send its key again."""
    seen = len(run.stop.waits)
    run.wait_for(lambda: len(run.stop.waits) >= seen + waits)


# ---- servers with odd answers -----------------------------------------------------------------------------


CUT = (b"+O", b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{")


class Answering(SocketServer):
    """Count the logins that arrive, and answer everything that comes with the same bytes, or with none at all."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.logins = answer, 0

    def serve(self, stream):
        while stream.fill():
            with self.change():
                names = (b"Authorization",) if b"HTTP" in self.answer else (b"AUTH", b"Authorization")
                self.logins += sum(map(stream.buffer.count, names))
            stream.buffer = b""
            if not self.answer:
                return
            stream.send(self.answer)
            if self.answer in CUT:
                return


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
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
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

    def raw(self, data, timeout=5):
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


def at(hours_ago: float, **changes: Any) -> app.Event:
    """Return an event of so many hours before NOW."""
    return event(at=NOW - 3600 * hours_ago, **changes)
