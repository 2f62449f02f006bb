"""Waiting for what changes, and servers on a loopback port, on which the stand-ins are built."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import subprocess
import threading
import time
from typing import Any, Callable, Iterator

import usage_dashboard as app

# ---- waiting ---------------------------------------------------------------------------------------------

PATIENCE_S = 60  # for what takes a moment: the machine may be busy, and only a test that fails waits so long


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

    def wait_for(self, predicate: Callable[[], Any], timeout: float = PATIENCE_S) -> Any:
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


class Hangup(Exception):
    """The connection is to be closed now."""


class ProtocolError(Hangup):
    """Input that is not what the protocol allows, or that ends in the middle."""


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
                raise ProtocolError
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def line(self) -> bytes:
        """Read a line, without its end."""
        while b"\n" not in self.buffer:
            if not self.fill():
                raise ProtocolError
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
            thread.join(PATIENCE_S)

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
            accepting.join(PATIENCE_S)

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


def deaf_client(port: int, path: str) -> socket.socket:
    """Ask a question and take nothing of the answer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(PATIENCE_S)
    client.connect(("127.0.0.1", port))
    with contextlib.suppress(OSError):  # it was ended meanwhile
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client


def ended(connections: list[socket.socket]) -> list[int]:
    """Return which connections have something to read, or were ended by the other side."""
    return [number for number, one in enumerate(connections) if select.select([one], [], [], 0)[0]]


def comes_up(process: subprocess.Popen, answers: Callable[[], Any], seconds: float, every_s: float = 0.02) -> bool:
    """Return whether a process that was just started answers in time; `answers` may raise OSError until then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, app.QueueFault):
            if answers():
                return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(every_s)
    return False
