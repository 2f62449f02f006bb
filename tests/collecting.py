"""The collector in a thread of its own, and servers that answer it oddly."""

from __future__ import annotations

import io
import threading
import time

from sockets import PATIENCE_S, SocketServer, Watched
from support import KEY

import usage_dashboard as app


class QuickStop(threading.Event):
    """A stop event that records how long it was asked to wait, and waits a few milliseconds instead."""

    def __init__(self, longest_s: float = 0.004) -> None:
        super().__init__()
        self.longest_s = longest_s
        self.waits: list[float] = []
        self.heard = lambda: None

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        self.heard()
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
        self.stop, stop.heard = stop, self.notify
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

    def notify(self) -> None:
        with self.change():
            pass

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

    def wait_for(self, predicate, timeout: float = PATIENCE_S):
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
        self.thread.join(PATIENCE_S)
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


CUT = (b"+O", b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{")


class Answering(SocketServer):
    """Count the logins that arrive, and answer everything that comes with the same bytes, or with none at all."""

    def __init__(self, answer, closes=False):
        super().__init__()
        self.answer, self.logins, self.closes = answer, 0, closes or answer in CUT

    def serve(self, stream):
        while stream.fill():
            with self.change():
                names = (b"Authorization",) if b"HTTP" in self.answer else (b"AUTH", b"Authorization")
                self.logins += sum(map(stream.buffer.count, names))
            stream.buffer = b""
            if not self.answer:
                return
            stream.send(self.answer)
            if self.closes:
                return
