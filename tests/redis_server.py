"""A real redis-server for one test: own port, own folder, nothing kept on disk; and stand-ins for odd ones."""

from __future__ import annotations

import fcntl
import shutil
import socket
import struct
import subprocess
import tempfile
import termios
from collections import deque
from typing import Any

from fake_proxy import read_command
from sockets import PATIENCE_S, Hangup, SocketServer, comes_up
from support import free_port, replies_of

import usage_dashboard as app


class RedisServer:
    """Start redis-server on a free loopback port; a context manager."""

    PUSH_BATCH = 1000

    def __init__(self, password: str | None = None, port: int = 0) -> None:
        self.password = password
        self.host, self.port = "127.0.0.1", port
        self._folder = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._client: app.RespClient | None = None

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
        for port in [self.port] if self.port else [free_port() for _ in range(3)]:  # another program may be first
            self._launch(port)
            self.port = port
            if comes_up(self._process, lambda: self.command("PING"), PATIENCE_S):
                return
            self.stop()
        raise AssertionError(f"redis-server does not answer on port {self.port}; see {self._folder}/log")

    def stop(self) -> None:
        """Stop the server; its data is gone."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def push(self, key: str, *payloads: bytes | str) -> None:
        """Add to a list as a forwarder does, so that RPOP returns the oldest first."""
        for first in range(0, len(payloads), self.PUSH_BATCH):
            self.command("LPUSH", key, *payloads[first : first + self.PUSH_BATCH])

    def length(self, key: str) -> int:
        return self.command("LLEN", key)

    def command(self, *args: bytes | str | int) -> Any:
        """Send one command and return its reply; an error reply raises AssertionError."""
        if self._client is None:
            client = app.RespClient(lambda: app.connect_tcp(self.host, self.port))
            assert self.password is None or client.call("AUTH", self.password) == "OK"
            self._client = client
        reply = self._client.call(*args)
        assert not isinstance(reply, app.ErrorReply), reply
        return reply

    def _launch(self, port: int) -> None:
        command = ["redis-server", "--port", str(port), "--bind", self.host, "--save", "", "--appendonly", "no",
                   "--dir", self._folder, "--logfile", f"{self._folder}/log", "--daemonize", "no"]  # fmt: skip
        if self.password is not None:
            command += ["--requirepass", self.password]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


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


class Scripted(SocketServer):
    """A proxy that answers each RPOP with the next payload or error of a script; a None is a reset."""

    def __init__(self, replies: list[bytes | None]) -> None:
        super().__init__()
        self.replies = deque(replies)

    def serve(self, stream) -> None:
        while stream.buffer or stream.fill():
            name = read_command(stream)[0]  # or a question over HTTP, which ends the connection
            if name == "AUTH":
                stream.send(b"+OK\r\n")
            elif name == "LLEN":
                stream.send(b"-ERR unknown command 'llen'\r\n")
            else:
                self.answer_pop(stream)

    def answer_pop(self, stream) -> None:
        reply = self.replies.popleft() if self.replies else b"$-1\r\n"
        stream.send(replies_of([reply])[0] if reply[:1] == b"{" else reply)
        if self.replies and self.replies[0] is None:
            self.replies.popleft()
            while struct.unpack("i", fcntl.ioctl(stream.sock, termios.TIOCOUTQ, bytes(4))) != (0,):
                self.closing.wait(0.001)  # a reset throws away what the kernel has not sent yet
            stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.sock.close()
            raise Hangup
