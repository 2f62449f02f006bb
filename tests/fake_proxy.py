"""A stand-in for CLIProxyAPI's usage queue: RESP and HTTP on one real socket, as each of its versions speaks.

    with FakeProxy(key="secret-key") as proxy:
        proxy.push('{"timestamp": "2026-05-03T09:14:22Z", ...}')
        ...                                     # point the program at proxy.host, proxy.port
        proxy.wait_for(lambda: proxy.queued == 0)

    FakeProxy(version="v8.0.47")                # a release by its tag, or a fork by its name in FORKS,
    FakeProxy(routes_of_v0=False)               # and single differences of one's own, see Dialect

    proxy.add_account("00000000000000ab", email="an@example.com")     # an account file; its events are counted
    proxy.count("00000000000000ab", failed=1)   # an attempt that makes no event (count_tokens)
    proxy.restart()                             # everything in memory is gone: queue, bans, counters, connections
    proxy.answers["/v0/management/config"] = http_reply(302, b"", "text/html", {"Location": "/x"})  # sockets.http_reply
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import ssl
import time
from collections import deque
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sockets import Hangup, ProtocolError, SocketServer, Stream, bearer_token, http_reply, read_http_head

RESP_FIRST_BYTES = b"*$+-:"
TLS_HANDSHAKE_BYTE = b"\x16"
SUBSCRIBER_BUFFER = 256
LOCAL_ADDRESSES = ("127.0.0.1", "::1")
CHANNEL = "usage"
THE_QUEUE = object()

# Forks by what is odd about them: the release that they began with, and what differs from it.
FORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "v8-alone": ("v8.0.47", {"routes_of_v0": False}),
    "newest-first": ("v7.2.140", {"rpop_takes_newest": True, "most_at_once": 1000}),
    "keeps-published": ("v7.2.140", {"keeps_published": True}),
    "http-only": ("v7.2.140", {"resp": False}),
    "behind-http": ("v7.2.140", {"sniffs_resp": False}),
    "resp-only": ("v7.2.140", {"http_queue": False}),
    "no-queue": ("v7.2.140", {"sniffs_resp": False, "http_queue": False}),
}


class Dialect:
    """The differences between versions, each by the first tag that has it, and those of a fork."""

    def __init__(self, version: str, changes: dict[str, Any]) -> None:
        tag = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        self.sniffs_resp = True  # without: RESP meets the HTTP server
        self.resp = tag != (7, 1, 17)
        self.subscribe = tag >= (7, 0, 7)
        self.control_messages = tag >= (7, 1, 39)
        self.http_queue = tag >= (6, 10, 8)
        self.retention_setting = tag >= (6, 10, 1)
        self.home_mode_text = tag >= (7, 1, 18)
        self.sniffs_in_accept_loop = tag <= (7, 0, 2)
        self.request_totals = tag >= (6, 9, 49)
        self.routes_of_v0 = True
        self.routes_of_v8 = tag >= (8, 0, 0)
        self.rpop_takes_newest = self.keeps_published = False
        self.most_at_once: int | None = None
        assert changes.keys() <= vars(self).keys(), changes
        vars(self).update(changes)


def go_duration(seconds: float) -> str:
    """Write a duration of less than an hour as Go does after rounding to a second: 30m0s, 45s."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    return f"{minutes}m{second}s" if minutes else f"{second}s"


# ---- RESP and HTTP as bytes ------------------------------------------------------------------------------


class CutOff(Hangup):
    """A fault ended the reply in hand; `whole`: at its very end."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole


def bulk(data: bytes | str | None) -> bytes:
    """Return a RESP bulk string; None is the null bulk."""
    if data is None:
        return b"$-1\r\n"
    raw = data.encode() if isinstance(data, str) else data
    return b"$%d\r\n%s\r\n" % (len(raw), raw)


def array(*items: bytes) -> bytes:
    """Return a RESP array of replies that are written already."""
    return b"*%d\r\n" % len(items) + b"".join(items)


def error(text: str, code: str = "ERR") -> bytes:
    """Return a RESP error line."""
    return f"-{code} {text}\r\n".encode()


def as_json_element(payload: bytes) -> bytes:
    """Return a queued payload as an element of a JSON array; what is no JSON becomes a string."""
    try:
        json.loads(payload.decode("utf-8", "replace"))
        return payload
    except ValueError:
        return json.dumps(payload.decode("utf-8", "replace")).encode()


class Wire(Stream):
    """A connection whose replies go through the proxy's faults."""

    def send(self, data: bytes, carries_events: bool = False) -> None:
        """Write a reply; raises CutOff where a fault ends it early."""
        allowed = self.server.allowance(len(data)) if carries_events else None
        chunk = data if allowed is None else data[:allowed]
        sent = 0
        while self.server.seconds_per_byte and sent < len(chunk):
            self.sock.sendall(chunk[sent : sent + 1])
            sent += 1
            self.server.rest_after_a_byte()
        if sent < len(chunk):  # to send nothing fails on a connection that was ended, though all of it arrived
            self.sock.sendall(chunk[sent:])
        if allowed is not None:
            raise CutOff(whole=len(chunk) == len(data))


class Subscriber:
    """A connection that is subscribed; push() fills the outbox, its own thread empties it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.outbox: deque[bytes] = deque()
        self.dismissed = False
        self.woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)  # one that is full has woken it already

    def message(self, payload: bytes) -> bytes:
        """Return the frame that carries a payload."""
        return array(bulk("message"), bulk(CHANNEL), bulk(payload))

    def wake(self) -> None:
        """Make the connection's thread look at the outbox."""
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def close(self) -> None:
        self.woken.close()
        self._waker.close()


class FakeProxy(SocketServer):
    """A CLIProxyAPI on a loopback port; a context manager.

    These may be changed while it runs: `publishing`, `retention_seconds` (as its configuration says it),
    `allow_remote`, `home_mode`, `management`, `key`, `seen_from` (the address that clients appear to have),
    `ban_seconds`, `answer_http_only` (a reverse proxy: only HTTP is understood), `example_page` (template keys stand
    in its configuration: `/` warns of them), and `answers`, whole HTTP answers as bytes by path, which are sent in
    place of the proxy's own.

    For a test to look at: `handed_over` (payloads that were popped or sent to a subscriber), `lost` (those of
    them whose reply was cut), `forgotten` (too old, or in the queue at a restart), `commands` (RESP command
    names in upper case), `http_requests` as (method, path), `failures` (each counts towards a ban; none follows),
    `connections` (all there ever were).
    """

    stream_type = Wire

    def __init__(
        self, key: str = "secret-key", version: str = "v7.2.140", tls: Any = None, port: int = 0, **differences: Any
    ) -> None:
        super().__init__(port)
        self.key = key
        self.version, changes = FORKS.get(version, (version, {}))
        self.dialect = Dialect(self.version, {**changes, **differences})
        self.publishing = self.allow_remote = self.management = True
        self.home_mode = self.answer_http_only = self.example_page = False
        self.retention_seconds = 60
        self.seen_from: str | None = None
        self.ban_seconds = 1800.0
        self.seconds_per_byte = 0.0

        self.handed_over: list[bytes] = []
        self.lost: list[bytes] = []
        self.forgotten: list[bytes] = []
        self.commands: list[str] = []
        self.http_requests: list[tuple[str, str]] = []
        self.answers: dict[str, bytes] = {}
        self.failures = 0

        self._tls = tls
        self._queue: deque[tuple[float, bytes]] = deque()
        self._subscribers: list[Subscriber] = []
        self._banned_until = 0.0
        self._cut_after: int | None = None
        self._accounts: dict[str, dict[str, Any]] = {}  # entries as they are listed
        self._keys: dict[str, dict[str, Any]] = {}

    def describe(self) -> str:
        return (
            f"proxy {self.version}: queued={self.queued} handed_over={len(self.handed_over)} lost={len(self.lost)} "
            f"failures={self.failures} connections={self.connections} open={self.open_connections} "
            f"commands={self.commands[-8:]} http={self.http_requests[-4:]}"
        )

    # -- for tests: look

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def auth_attempts(self) -> int:
        """How many AUTH commands came, right or wrong."""
        return self.commands.count("AUTH")

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    # -- for tests: events

    def push(self, *events: str | bytes, counted: bool = True) -> None:
        """Publish events; as in the proxy, they vanish while it does not publish or is not managed."""
        with self.change():
            for event in events:
                if counted and (self._accounts or self._keys):
                    told = json.loads(event)
                    name = told.get("auth_index")
                    one = name if name in self._accounts else told.get("source")
                    self.count(one, failed=1) if told.get("failed") else self.count(one, success=1)
                if self.publishing and self.management:
                    self._publish(event.encode() if isinstance(event, str) else event)

    def add_account(self, auth_index: str, **entry: Any) -> None:
        """List an account file; its counters begin at zero, also where it was listed before."""
        with self.change():
            base = {"auth_index": auth_index, "name": f"codex-{auth_index}.json", "type": "codex", "disabled": False}
            self._accounts[auth_index] = {**base, **entry, "success": 0, "failed": 0}

    def add_key(self, key: str, provider: str = "codex", base_url: str = "https://up.example/v1") -> None:
        """List a key of the proxy's configuration, which events name as their source."""
        with self.change():
            self._keys[key] = {"provider": provider, "name": f"{base_url}|{key}", "success": 0, "failed": 0}

    def count(self, credential: str, success: int = 0, failed: int = 0) -> None:
        """Count attempts of a credential, by its auth_index or key, now."""
        with self.change():
            found = self._accounts.get(credential) or self._keys.get(credential)
            if found is not None:
                found["success"] += success
                found["failed"] += failed

    def refresh(self) -> None:
        """Tell subscribers that account files may have changed (pollers never see this)."""
        with self.change():
            if self.dialect.control_messages:
                self._broadcast(b'{"refresh":true}')

    # -- for tests: faults

    def ban(self) -> None:
        """Ban everybody, as it does with those who failed often enough."""
        with self.change():
            self._banned_until = time.monotonic() + self.ban_seconds

    def lift_ban(self) -> None:
        """Forget the ban, as a restart of the proxy does."""
        with self.change():
            self._banned_until = 0.0

    def cut_replies_after(self, n_bytes: int) -> None:
        """Close the connection that writes the n-th further byte of replies with events, right after it; once."""
        with self.change():
            self._cut_after = n_bytes

    def dribble(self, seconds_per_byte: float) -> None:
        """Write replies byte by byte with this pause, replies already begun as well; 0 ends it at once."""
        self.seconds_per_byte = seconds_per_byte

    def rest_after_a_byte(self) -> None:
        """Wait as long as a byte takes; raises CutOff when the proxy ends meanwhile."""
        began = time.monotonic()
        while time.monotonic() - began < self.seconds_per_byte:
            if self.closing.wait(min(self.seconds_per_byte, 0.02)):
                raise CutOff

    def forget(self) -> None:
        """Lose the queue, the ban and the counters, as a restart does."""
        with self.change():
            self.forgotten += [payload for _, payload in self._queue]
            self._queue.clear()
            self.lift_ban()
            for entry in (*self._accounts.values(), *self._keys.values()):
                entry.update(success=0, failed=0)

    def restart(self) -> None:
        """Stop and start again at the same port: every connection ends, and what was in memory is gone."""
        self.stop_listening()
        self.disconnect_all()
        self.forget()
        self.listen_again()

    def allowance(self, length: int) -> int | None:
        """Return how many of the next bytes may be written; None: all."""
        with self.lock:
            left = self._cut_after
            if left is None:
                return None
            self._cut_after = left - length if length < left else None
            return None if length < left else left

    # -- events

    def _publish(self, payload: bytes) -> None:
        is_told = bool(self._subscribers)
        if not is_told or self.dialect.keeps_published:
            self._queue.append((time.monotonic(), payload))
        if is_told:
            (self.handed_over if self._broadcast(payload) else self.lost).append(payload)
        self._expire()

    def _expire(self) -> None:
        """Drop what is older than the retention, silently, as at each push and pop of the proxy."""
        seconds = min(self.retention_seconds, 3600) if self.retention_seconds > 0 else 60
        while self._queue and time.monotonic() - self._queue[0][0] > seconds:
            self.forgotten.append(self._queue.popleft()[1])

    def _broadcast(self, payload: bytes) -> bool:
        delivered = False
        for subscriber in list(self._subscribers):
            if len(subscriber.outbox) >= SUBSCRIBER_BUFFER:
                self._dismiss(subscriber)  # too slow: dropped, and the event that hit the limit with it
                continue
            subscriber.outbox.append(subscriber.message(payload))
            subscriber.wake()
            delivered = True
        return delivered

    def _dismiss(self, subscriber: Subscriber) -> None:
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)
        subscriber.dismissed = True
        subscriber.wake()

    def _pop(self, wire: Wire, count: int, newest: bool = False) -> list[bytes]:
        with self.change():
            if wire.is_shut:
                raise Hangup  # a disconnected client's commands may still wait here; they take nothing any more
            self._expire()
            take = self._queue.pop if newest else self._queue.popleft
            popped = [take()[1] for _ in range(min(count, len(self._queue)))]
            self.handed_over += popped
            return popped

    def _send_popped(self, wire: Wire, reply: bytes, popped: list[bytes]) -> None:
        """Write a reply that carries events; those of an incomplete one are lost, as in the proxy."""
        try:
            wire.send(reply, carries_events=bool(popped))
        except (OSError, CutOff) as fault:
            if not getattr(fault, "whole", False):
                with self.change():
                    self.lost += popped
            raise

    # -- the key and the ban

    def _authenticate(self, address: str, given: str) -> tuple[int, str]:
        """Return (200, "") or the refusal; failures are counted, HTTP and RESP together."""
        with self.change():
            left_s = self._banned_until - time.monotonic()
            if left_s > 0:
                return 403, f"IP banned due to too many failed attempts. Try again in {go_duration(left_s)}"
            if address not in LOCAL_ADDRESSES and not self.allow_remote:
                return 403, "remote management disabled"
            if not self.key:
                return 403, "remote management key not set"
            if given == self.key:
                return 200, ""
            self.failures += 1
            return 401, "invalid management key" if given else "missing management key"

    # -- connections

    def admit(self, sock: socket.socket, stopped: socket.socket) -> None:
        if self.dialect.sniffs_in_accept_loop:
            select.select([sock, stopped], [], [])  # one idle client, and nobody else gets in

    def serve(self, wire: Wire) -> None:
        wire.peer = self.seen_from or wire.peer
        if not self.dialect.sniffs_in_accept_loop:
            wire.sock.settimeout(10)
        if self._tls is not None:
            if wire.sock.recv(1, socket.MSG_PEEK) != TLS_HANDSHAKE_BYTE:
                return
            wire.start_tls(self._tls)
        if wire.fill():
            wire.sock.settimeout(None)
            self._route(wire)

    def _route(self, wire: Wire) -> None:
        by_alpn = isinstance(wire.sock, ssl.SSLSocket) and wire.sock.selected_alpn_protocol() is not None
        only_http = self.answer_http_only or not self.dialect.sniffs_resp
        if only_http or by_alpn or wire.buffer[:1] not in RESP_FIRST_BYTES:
            self._serve_http(wire)
        else:
            self._serve_resp(wire)

    # -- RESP

    def _serve_resp(self, wire: Wire) -> None:
        if not self.dialect.resp:
            wire.send(error("RESP AUTH disabled; use mTLS"))
            return
        if self.home_mode:
            if self.dialect.home_mode_text:
                wire.send(error("redis usage output disabled in home mode"))
            return
        if not self.management:
            return
        self._answer_commands(wire)

    def _answer_commands(self, wire: Wire) -> None:
        authenticated = False
        while wire.buffer or wire.fill():
            command = read_command(wire)
            if not command:
                wire.send(error("empty command"))
                continue
            name, args = command[0].strip().upper(), command[1:]
            with self.change():
                self.commands.append(name)
            if name == "AUTH":
                status, text = self._authenticate(wire.peer, args[-1])
                authenticated = authenticated or status == 200
                wire.send(b"+OK\r\n" if status == 200 else error(text))
            elif not authenticated:
                _, text = self._authenticate(wire.peer, "")
                banned = text.startswith("IP banned")
                wire.send(error(text) if banned else error("Authentication required.", "NOAUTH"))
            elif name == "RPOP":
                self._answer_pop(wire, *args)
            elif name == "SUBSCRIBE" and self.dialect.subscribe:
                if self._answer_subscribe(wire, args[0].strip()):
                    return
            else:
                wire.send(error(f"unknown command '{name.lower()}'"))

    def _answer_pop(self, wire: Wire, key: str) -> None:
        if key.strip().lower() != CHANNEL:
            wire.send(error(f"unsupported channel '{key}'"))
            return
        popped = self._pop(wire, 1, newest=self.dialect.rpop_takes_newest)
        self._send_popped(wire, bulk(popped[0] if popped else None), popped)

    def _answer_subscribe(self, wire: Wire, asked: str) -> bool:
        """Serve a subscription to its end; False when it was refused and the connection goes on."""
        if asked.lower() != CHANNEL:
            wire.send(error(f"unsupported channel '{asked}'"))
            return False
        subscriber = Subscriber(wire)
        subscriber.outbox.append(array(bulk("subscribe"), bulk(CHANNEL), b":1\r\n"))
        if self.dialect.control_messages:
            subscriber.outbox.append(subscriber.message(b'{"support_refresh":true}'))
        with self.change():
            self._subscribers.append(subscriber)
        try:
            self._serve_subscriber(subscriber)
        finally:
            with self.change():
                self._dismiss(subscriber)
            subscriber.close()
        return True

    def _serve_subscriber(self, subscriber: Subscriber) -> None:
        wire = subscriber.wire
        while True:
            while subscriber.outbox:
                wire.send(subscriber.outbox.popleft(), carries_events=True)
            if subscriber.dismissed and not subscriber.outbox:
                return
            readable, _, _ = select.select([wire.sock, subscriber.woken], [], [])
            if wire.sock in readable:
                return  # nobody speaks in a subscription: the other side is gone
            subscriber.woken.recv(4096)

    # -- HTTP

    def _serve_http(self, wire: Wire) -> None:
        while wire.buffer or wire.fill():
            try:
                method, target, headers = read_http_head(wire)
            except ProtocolError:
                wire.send(http_reply(400, b"400 Bad Request", "text/plain; charset=utf-8", {"Connection": "close"}))
                return
            with self.change():
                self.http_requests.append((method, target))
            self._answer_http(wire, method, target, headers)
            if headers.get("connection", "").lower() == "close":
                return

    def _answer_http(self, wire: Wire, method: str, target: str, headers: dict[str, str]) -> None:
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        documents = self._documents() if method == "GET" else {}
        if url.path in self.answers:
            wire.send(self.answers[url.path])
        elif url.path == "/" and self.example_page:
            page = b"<!DOCTYPE html><title>Example API key detected</title>"
            wire.send(http_reply(200, page, "text/html; charset=utf-8"))
        elif url.path == "/" and method == "GET":
            self._send_json(wire, 200, {"endpoints": ["GET /v1/models"], "message": "CLI Proxy API Server"})
        elif url.path not in documents or not self.management or self.home_mode:
            wire.send(http_reply(404, b"", "text/plain"))
        else:
            status, text = self._authenticate(wire.peer, bearer_token(headers))
            if status != 200:
                self._send_json(wire, status, {"error": text})
            elif documents[url.path] is THE_QUEUE:
                self._answer_queue(wire, query)
            else:
                self._send_json(wire, 200, documents[url.path])

    def _documents(self) -> dict[str, Any]:
        """Return what each management route that there is answers with, in both trees."""
        switch = {"usage-statistics-enabled": self.publishing}
        usage: dict[str, Any] = dict(switch)
        if self.dialect.retention_setting:
            usage["redis-usage-queue-retention-seconds"] = self.retention_seconds
        config = {"api-keys": ["sk-client-secret"], **usage}
        accounts = {"files": self._listed(self._accounts)}
        v0 = {"usage-statistics-enabled": switch, "config": config, "auth-files": accounts}
        v8 = {f"config/observability/usage/{name}": value for name, value in usage.items()}
        config = {"config-version": 8, "observability": {"usage": usage}}
        v8.update({"config": config, "config/config-version": 8, "credentials": accounts})
        if self.dialect.request_totals:
            v0["api-key-usage"] = self._list_keys()
        if self.dialect.http_queue:
            v0["usage-queue"] = v8["observability/usage/queue"] = THE_QUEUE
        trees = [("v0", v0)] * self.dialect.routes_of_v0 + [("v8", v8)] * self.dialect.routes_of_v8
        return {f"/{tree}/management/{route}": one for tree, routes in trees for route, one in routes.items()}

    def _answer_queue(self, wire: Wire, query: dict[str, str]) -> None:
        count = _integer(query.get("count", "1").encode())
        if not 0 < count <= (self.dialect.most_at_once or count):
            self._send_json(wire, 400, {"error": "count must be a positive integer"})
            return
        popped = self._pop(wire, count)
        body = b"[" + b",".join(as_json_element(payload) for payload in popped) + b"]"
        self._send_popped(wire, self._json_reply(200, body), popped)

    def _listed(self, credentials: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        left_out = () if self.dialect.request_totals else ("success", "failed")
        with self.lock:
            entries = credentials.values()
            return [{name: value for name, value in one.items() if name not in left_out} for one in entries]

    def _list_keys(self) -> dict[str, Any]:
        usage: dict[str, dict[str, Any]] = {}
        for entry in self._listed(self._keys):
            usage.setdefault(entry.pop("provider"), {})[entry.pop("name")] = entry
        return usage

    def _send_json(self, wire: Wire, status: int, value: Any) -> None:
        wire.send(self._json_reply(status, json.dumps(value, separators=(",", ":")).encode()))

    def _json_reply(self, status: int, body: bytes) -> bytes:
        build = {"X-CPA-VERSION": self.version, "X-CPA-COMMIT": "a7e3596b7", "X-CPA-BUILD-DATE": "2026-08-22T10:00:00Z"}
        headers = {**build, "Date": formatdate(usegmt=True)}
        return http_reply(status, body, "application/json; charset=utf-8", headers)


def read_command(wire: Wire) -> list[str]:
    """Read one command; an empty array gives an empty list."""
    return [_read_argument(wire) for _ in range(_length_after(wire, b"*"))]


def _read_argument(wire: Wire) -> str:
    data = wire.take(_length_after(wire, b"$") + 2)
    if data[-2:] != b"\r\n":
        raise ProtocolError
    return data[:-2].decode("utf-8", "replace")


def _length_after(wire: Wire, sign: bytes) -> int:
    line = wire.line()
    if line[:1] != sign:
        raise ProtocolError
    return max(0, _integer(line[1:]))


def _integer(digits: bytes) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ProtocolError from None
