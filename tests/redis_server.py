"""A real redis-server for one test: own port, own folder, nothing kept on disk; and a stand-in for an old one."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections import deque
from typing import Any, BinaryIO

from fake_proxy import read_command
from support import SocketServer, free_port, replies_of


class RedisError(Exception):
    """An error reply."""


class RedisServer:
    """Start redis-server on a free loopback port; a context manager."""

    START_S = 10
    PUSH_BATCH = 1000

    def __init__(self, password: str | None = None) -> None:
        self.password = password
        self.host = "127.0.0.1"
        self.port = 0
        self._folder = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._stream: BinaryIO | None = None

    def __enter__(self) -> RedisServer:
        self._folder = tempfile.mkdtemp(prefix="redis-server-")
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start, on the same port as before, and return once commands are answered."""
        attempts = 1 if self.port else 3  # another program may take a free port first
        for attempt in range(attempts):
            port = self.port or free_port()
            if self._launch(port):
                self.port = port
                return
            if attempt + 1 == attempts:
                raise AssertionError(f"redis-server does not answer on port {port}; see {self._folder}/log")

    def stop(self) -> None:
        """Stop the server; its data is gone."""
        self._hang_up()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def push(self, key: str, *payloads: bytes | str) -> None:
        """Add to a list as a forwarder does, so that RPOP gives the oldest first."""
        for first in range(0, len(payloads), self.PUSH_BATCH):
            self.command("LPUSH", key, *payloads[first : first + self.PUSH_BATCH])

    def length(self, key: str) -> int:
        """Return how many items a list holds."""
        return self.command("LLEN", key)

    def command(self, *args: bytes | str | int) -> Any:
        """Send one command and return its reply; an error reply raises RedisError."""
        if self._stream is None:
            self._call()
        assert self._socket is not None
        self._socket.sendall(encode(args))
        return self._reply()

    def _launch(self, port: int) -> bool:
        options = {"port": port, "bind": self.host, "save": "", "appendonly": "no", "dir": self._folder,
                   "logfile": f"{self._folder}/log", "daemonize": "no"}  # fmt: skip
        if self.password is not None:
            options["requirepass"] = self.password
        command = ["redis-server"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + self.START_S
        while time.monotonic() < deadline:
            try:
                self.port = port
                self._call()
                self.command("PING")
                return True
            except OSError:
                self._hang_up()
            try:
                self._process.wait(0.02)
                break
            except subprocess.TimeoutExpired:
                continue
        self.stop()
        self.port = 0
        return False

    def _call(self) -> None:
        self._socket = socket.create_connection((self.host, self.port), timeout=10)
        self._stream = self._socket.makefile("rb")
        if self.password is not None:
            self.command("AUTH", self.password)

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._socket is not None:
            self._socket.close()
        self._stream = self._socket = None

    def _reply(self) -> Any:
        assert self._stream is not None
        line = self._stream.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("redis-server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            raise RedisError(rest.decode())
        number = int(rest)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"$":
            return self._stream.read(number + 2)[:-2]
        return [self._reply() for _ in range(number)]


def encode(args: tuple[bytes | str | int, ...]) -> bytes:
    """Write a command as a RESP array of bulk strings."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        data = arg if isinstance(arg, bytes) else str(arg).encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
    return b"".join(parts)


class OldRedis(SocketServer):
    """A Redis before version 6: its RPOP knows no count, and it words differently that it has no password."""

    def __init__(self, payloads, before_a_pop=lambda: None) -> None:
        super().__init__()
        self.payloads = deque(payloads)
        self.before_a_pop = before_a_pop

    def serve(self, stream) -> None:
        while stream.buffer or stream.fill():
            name, *words = read_command(stream)
            if name == "AUTH":
                stream.send(b"-ERR Client sent AUTH, but no password is set\r\n")
            elif name == "LLEN":
                stream.send(b":%d\r\n" % len(self.payloads))
            elif name == "RPOP" and len(words) == 1:
                self.before_a_pop()
                stream.send(replies_of([self.payloads.popleft()])[0] if self.payloads else b"$-1\r\n")
            else:
                stream.send(b"-ERR wrong number of arguments for '%s' command\r\n" % name.lower().encode())
