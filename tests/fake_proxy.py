"""A stand-in for CLIProxyAPI's usage queue: RESP and HTTP on one real socket, as each of its versions speaks.

    with FakeProxy(key="secret-key") as proxy:
        proxy.push('{"timestamp": "2026-05-03T09:14:22Z", ...}')
        ...                                     # point the program at proxy.host, proxy.port
        proxy.wait_for(lambda: proxy.queued == 0)

What a version does differently is in Dialect; nothing else looks at the version.
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

from sockets import Hangup, ProtocolError, SocketServer, Stream, UnexpectedEof, bearer_token, http_reply, read_http_head

RESP_FIRST_BYTES = b"*$+-:"
TLS_HANDSHAKE_BYTE = b"\x16"
MAX_FAILURES = 5
SUBSCRIBER_BUFFER = 256
LOCAL_ADDRESSES = ("127.0.0.1", "::1")
CHANNEL = "usage"


class Dialect:
    """The differences between versions, each by the first tag that has it."""

    def __init__(self, version: str) -> None:
        tag = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        self.resp = tag != (7, 1, 17)
        self.any_pop_key = tag < (7, 1, 44)
        self.subscribe = tag >= (7, 0, 7)
        self.control_messages = tag >= (7, 1, 39)
        self.echoes_channel = tag >= (7, 1, 44)
        self.http_queue = tag >= (6, 10, 8)
        self.retention_setting = tag >= (6, 10, 1)
        self.home_mode = tag >= (7, 0, 0)
        self.home_mode_text = tag >= (7, 1, 18)
        self.sniffs_in_accept_loop = tag <= (7, 0, 2)


def go_duration(seconds: float) -> str:
    """Write a duration as Go does after rounding to a second: 30m0s, 45s, 1h0m0s."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}h{minute}m{second}s" if hours else f"{minute}m{second}s" if minute else f"{second}s"


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

    def send(self, data: bytes) -> None:
        """Write a reply; raises CutOff where a fault ends it early."""
        allowed = self.server.allowance(len(data))
        chunk = data if allowed is None else data[:allowed]
        sent = 0
        while self.server.seconds_per_byte and sent < len(chunk):
            self.sock.sendall(chunk[sent : sent + 1])
            sent += 1
            self.server.rest_after_a_byte()
        self.sock.sendall(chunk[sent:])
        if allowed is not None:
            raise CutOff(whole=len(chunk) == len(data))


class Subscriber:
    """A connection that is subscribed; push() fills the outbox, its own thread empties it."""

    def __init__(self, wire: Wire, spelling: str) -> None:
        self.wire = wire
        self.spelling = spelling
        self.outbox: deque[bytes] = deque()
        self.dismissed = False
        self.woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)  # one that is full has woken it already

    def message(self, payload: bytes) -> bytes:
        """Return the frame that carries a payload."""
        return array(bulk("message"), bulk(self.spelling), bulk(payload))

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
    `ban_seconds`, `clock` (of the ban), `answer_http_only` (a reverse proxy: only HTTP is understood), and
    `example_page` (template keys stand in its configuration: `/` warns of them).

    For a test to look at: `handed_over` (payloads that were popped or sent to a subscriber), `lost` (those of
    them whose reply was cut), `forgotten` (too old, or in the queue at a restart), `commands` (RESP command
    names in upper case), `http_requests` as (method, path), `failures` (all that ever counted towards a ban),
    `connections` (all there ever were).
    """

    stream_type = Wire

    def __init__(
        self, key: str = "secret-key", version: str = "v7.2.140", tls: ssl.SSLContext | None = None, port: int = 0
    ) -> None:
        super().__init__(port)
        self.key = key
        self.version = version
        self.dialect = Dialect(version)
        self.publishing = self.allow_remote = self.management = True
        self.home_mode = self.answer_http_only = self.example_page = False
        self.retention_seconds = 60
        self.seen_from: str | None = None
        self.ban_seconds = 1800.0
        self.clock = time.monotonic
        self.seconds_per_byte = 0.0

        self.handed_over: list[bytes] = []
        self.lost: list[bytes] = []
        self.forgotten: list[bytes] = []
        self.commands: list[str] = []
        self.http_requests: list[tuple[str, str]] = []
        self.failures = 0

        self._tls = tls
        self._queue: deque[tuple[float, bytes]] = deque()
        self._subscribers: list[Subscriber] = []
        self._failures_of: dict[str, int] = {}
        self._banned_until: dict[str, float] = {}
        self._cut_after: int | None = None

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

    def push(self, *events: str | bytes) -> None:
        """Publish events; as in the proxy, they vanish while it does not publish or is not managed."""
        with self.change():
            for event in events:
                if self.publishing and self.management:
                    self._publish(event.encode() if isinstance(event, str) else event)

    def refresh(self) -> None:
        """Tell subscribers that account files may have changed (pollers never see this)."""
        with self.change():
            if self.dialect.control_messages:
                self._broadcast(b'{"refresh":true}')

    # -- for tests: faults

    def ban(self) -> None:
        """Ban the clients of this machine as if they had failed often enough."""
        with self.change():
            self._banned_until["127.0.0.1"] = self.clock() + self.ban_seconds

    def lift_ban(self) -> None:
        """Forget all bans and failures, as a restart of the proxy does."""
        with self.change():
            self._banned_until.clear()
            self._failures_of.clear()

    def cut_replies_after(self, n_bytes: int) -> None:
        """Close the connection that writes the n-th further reply byte, right after it; once."""
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
        """Lose the queue, the bans and the failures, as a restart does."""
        with self.change():
            self.forgotten += [payload for _, payload in self._queue]
            self._queue.clear()
            self.lift_ban()

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
        if not self._subscribers:
            self._queue.append((time.monotonic(), payload))
        elif self._broadcast(payload):
            self.handed_over.append(payload)
        else:
            self.lost.append(payload)
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

    def _pop(self, wire: Wire, count: int) -> list[bytes]:
        with self.change():
            if wire.is_shut:
                raise Hangup  # a disconnected client's commands may still wait here; they take nothing any more
            self._expire()
            popped = [self._queue.popleft()[1] for _ in range(min(count, len(self._queue)))]
            self.handed_over += popped
            return popped

    def _send_popped(self, wire: Wire, reply: bytes, popped: list[bytes]) -> None:
        """Write a reply that carries events; those of an incomplete one are lost, as in the proxy."""
        try:
            wire.send(reply)
        except (OSError, CutOff) as fault:
            if not getattr(fault, "whole", False):
                with self.change():
                    self.lost += popped
            raise

    # -- the key and the ban

    def _authenticate(self, address: str, given: str) -> tuple[int, str]:
        """Return (200, "") or the refusal; failures are counted per address, HTTP and RESP together."""
        with self.change():
            left_s = self._banned_until.get(address, 0.0) - self.clock()
            if left_s > 0:
                return 403, f"IP banned due to too many failed attempts. Try again in {go_duration(left_s)}"
            if address not in LOCAL_ADDRESSES and not self.allow_remote:
                return 403, "remote management disabled"
            if not self.key:
                return 403, "remote management key not set"
            if given == self.key:
                self._failures_of.pop(address, None)
                return 200, ""
            self._count_failure(address)
            return 401, "invalid management key" if given else "missing management key"

    def _count_failure(self, address: str) -> None:
        self.failures += 1
        count = self._failures_of.get(address, 0) + 1
        if count >= MAX_FAILURES:
            self._banned_until[address] = self.clock() + self.ban_seconds
            count = 0
        self._failures_of[address] = count

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
        if self.answer_http_only or by_alpn or wire.buffer[:1] not in RESP_FIRST_BYTES:
            self._serve_http(wire)
        else:
            self._serve_resp(wire)

    # -- RESP

    def _serve_resp(self, wire: Wire) -> None:
        if not self.dialect.resp:
            wire.send(error("RESP AUTH disabled; use mTLS"))
            return
        if self.home_mode and self.dialect.home_mode:
            if self.dialect.home_mode_text:
                wire.send(error("redis usage output disabled in home mode"))
            return
        if not self.management:
            return
        try:
            self._answer_commands(wire)
        except UnexpectedEof:
            wire.send(error("unexpected EOF"))
        except ProtocolError:
            wire.send(error("protocol error"))

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
                self._answer_pop(wire, args[0].strip())
            elif name == "SUBSCRIBE" and self.dialect.subscribe:
                if self._answer_subscribe(wire, args[0].strip()):
                    return
            else:
                wire.send(error(f"unknown command '{name.lower()}'"))

    def _answer_pop(self, wire: Wire, key: str) -> None:
        if not self.dialect.any_pop_key and key.lower() != CHANNEL:
            wire.send(error(f"unsupported channel '{key}'"))
            return
        popped = self._pop(wire, 1)
        self._send_popped(wire, bulk(popped[0] if popped else None), popped)

    def _answer_subscribe(self, wire: Wire, asked: str) -> bool:
        """Serve a subscription to its end; False when it was refused and the connection goes on."""
        if asked.lower() != CHANNEL:
            wire.send(error(f"unsupported channel '{asked}'"))
            return False
        subscriber = Subscriber(wire, asked if self.dialect.echoes_channel else CHANNEL)
        subscriber.outbox.append(array(bulk("subscribe"), bulk(subscriber.spelling), b":1\r\n"))
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
                wire.send(subscriber.outbox.popleft())
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
        route = url.path.rpartition("/v0/management/")[2] if url.path.startswith("/v0/management/") else ""
        known = ("usage-statistics-enabled", "config", *(["usage-queue"] if self.dialect.http_queue else []))
        if url.path == "/" and self.example_page:
            page = b"<!DOCTYPE html><title>Example API key detected</title>"
            wire.send(http_reply(200, page, "text/html; charset=utf-8"))
            return
        if method != "GET" or route not in known:
            wire.send(http_reply(404, b"404 page not found", "text/plain"))
            return
        if not self.management or (self.home_mode and self.dialect.home_mode):
            wire.send(http_reply(404, b"", "text/plain"))
            return
        status, text = self._authenticate(wire.peer, bearer_token(headers))
        if status != 200:
            self._send_json(wire, status, {"error": text})
        elif route == "usage-queue":
            self._answer_queue(wire, _integer(parse_qs(url.query).get("count", ["1"])[0].encode()))
        elif route == "config":
            self._answer_config(wire)
        else:
            self._send_json(wire, 200, {"usage-statistics-enabled": self.publishing})

    def _answer_queue(self, wire: Wire, count: int) -> None:
        if count <= 0:
            self._send_json(wire, 400, {"error": "count must be a positive integer"})
            return
        popped = self._pop(wire, count)
        body = b"[" + b",".join(as_json_element(payload) for payload in popped) + b"]"
        self._send_popped(wire, self._json_reply(200, body), popped)

    def _answer_config(self, wire: Wire) -> None:
        config = {"api-keys": ["sk-client-secret"], "usage-statistics-enabled": self.publishing}
        if self.dialect.retention_setting:
            config["redis-usage-queue-retention-seconds"] = self.retention_seconds
        self._send_json(wire, 200, config)

    def _send_json(self, wire: Wire, status: int, value: dict[str, Any]) -> None:
        wire.send(self._json_reply(status, json.dumps(value, separators=(",", ":")).encode()))

    def _json_reply(self, status: int, body: bytes) -> bytes:
        version = {"X-CPA-VERSION": self.version, "Date": formatdate(usegmt=True)}
        return http_reply(status, body, "application/json; charset=utf-8", version)


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
