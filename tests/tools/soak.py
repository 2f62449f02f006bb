#!/usr/bin/env python3
"""A soak: the program against a proxy with faults at random, and an account of every single event.

    python3 tests/tools/soak.py [--seconds 600] [--seed N] [--rate 1500]

A steady stream of events goes through the stand-in of the proxy to the real program. Meanwhile connections are cut
and reset, the proxy dribbles, stalls, restarts and forgets, the database is locked and taken away, the spool damaged,
the clock set, the program killed, stopped and started twice, and HTTP clients, fast and slow, read the API. In the end what was handed over must be what is stored,
rejected, ignored, or lost in a reply that was cut or on its way at a kill; each event once. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

from fake_proxy import FakeProxy  # noqa: E402
from support import KEY, free_port, rows  # noqa: E402

import usage_dashboard as app  # noqa: E402

OVER_THE_CAP = 8 * 1024 * 1024 + 1
MOST_REJECTS = 900  # the program keeps the newest 1,000
IN_FLIGHT = {"pop": 64, "http": 500}  # what a kill may cost
DAY_S = 86400.0
JUMPS_S = (365 * DAY_S, -DAY_S, 7200.0, -600.0, 0.0)
# Runs the program with its clock ahead by what stands in a file.
WITH_A_CLOCK = """
import mmap, struct, sys, time
folder, clock, *arguments = sys.argv[1:]
with open(clock, "rb") as stream:
    ahead = mmap.mmap(stream.fileno(), 8, access=mmap.ACCESS_READ)
right = time.time
time.time = lambda: right() + struct.unpack("d", ahead[:8])[0]
sys.path.insert(0, folder)
import usage_dashboard
sys.exit(usage_dashboard.main(arguments))
"""
PATHS = ("/api/health", "/api/summary?range=24h", "/api/requests?limit=50", "/api/quota", "/", "/api/summary?range=7d")


class Feeder(threading.Thread):
    """Publish events at a steady rate; every payload is told apart from every other."""

    def __init__(self, proxy: FakeProxy, dice: random.Random, rate: int) -> None:
        super().__init__(daemon=True)
        self.pushed = 0
        self.ended = threading.Event()
        self._proxy, self._dice, self._rate = proxy, dice, rate
        self._rejects = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        began, steady = time.monotonic(), 0
        while not self.ended.wait(0.02):
            due = int((time.monotonic() - began) * self._rate) - steady
            self.burst(due)
            steady += due

    def burst(self, count: int) -> None:
        """Publish so many events at once."""
        with self._lock:
            self._push([self._payload(number) for number in range(self.pushed, self.pushed + count)])

    def oversized(self) -> None:
        """Publish an event over the cap of a reply."""
        with self._lock:
            self._push([self._reject(b"x", OVER_THE_CAP)])

    def _push(self, payloads: list[bytes]) -> None:
        self._proxy.push(*payloads)
        self.pushed += len(payloads)

    def _payload(self, number: int) -> bytes:
        lot = self._dice.random()
        if lot < 0.02:
            return self._event(f"i{number}", generate=False, tokens=None)
        if lot < 0.025:
            return b'{"refresh":true%s}' % format(number, "b").replace("0", " ").replace("1", "\t").encode()
        if lot < 0.027 and self._rejects < MOST_REJECTS:
            return self._reject(self._dice.choice([b"x", b"{x", b'{"timestamp": "', b'{"model": 7, "id": "']))
        return self._event(f"e{number}")

    def _event(self, name: str, **more: Any) -> bytes:
        dice = self._dice
        account = dice.randrange(8)
        return json.dumps({
            "request_id": name, "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "provider": "codex",
            "source": f"user{account}@example.com", "auth_index": f"{account:016x}",
            "model": f"gpt-5.{dice.randrange(4)}",
            "tokens": {"input_tokens": dice.randrange(9000), "output_tokens": dice.randrange(900)}, **more,
        }).encode()  # fmt: skip

    def _reject(self, start: bytes, length: int = 100) -> bytes:
        """Lengthen to a length that is a multiple of three and nobody else's, by which it is found again."""
        self._rejects += 1
        end = b'"}' if b'"' in start else b""
        return start.ljust((length // 3 + self._rejects) * 3 - len(end), b"y") + end


def identity(payload: bytes) -> tuple[str, Any]:
    """Return what is to become of a payload, and how it is found again."""
    if payload.startswith(b'{"request_id"'):
        name = payload[16 : payload.index(b'"', 16)].decode()
        return ("stored" if name.startswith("e") else "ignored"), name
    if payload.startswith(b'{"refresh"'):
        return "ignored", payload
    return "rejected", len(payload) // 3


class Clients:
    """Read the API over and over, and beside that send requests, and read answers, a byte at a time."""

    def __init__(self, port: int, slow: int = 40) -> None:
        self.statuses: Counter[int] = Counter()
        self.ending = False  # what is asked while the program ends may be refused
        self.faults: list[str] = []
        self._port, self._slow = port, slow
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=job, daemon=True) for job in (self._read, self._read, self._dribble)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    def _read(self) -> None:
        for path in itertools.cycle(PATHS):
            if self._ended.wait(0.02):
                return
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)) as connection:
                # a failure: the program is being restarted
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection.request("GET", path)
                    reply = connection.getresponse()
                    self._count(path, reply.status, reply.read())

    def _count(self, path: str, status: int, said: bytes) -> None:
        with self._lock:
            self.statuses[status] += 1
            if status != 200 and not self.ending:
                self.faults.append(f"{path} was answered with {status} {said[:300]!r}")

    def _dribble(self) -> None:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        places: list[tuple[socket.socket, int] | None] = [None] * self._slow
        while not self._ended.wait(0.1):
            for index, place in enumerate(places):
                try:
                    sock, sent = place or (socket.create_connection(("127.0.0.1", self._port), timeout=1), 0)
                    if sent < len(request):
                        sock.sendall(request[sent : sent + 1])
                    elif not sock.recv(1):
                        raise ConnectionError
                    places[index] = (sock, sent + 1)
                except OSError:
                    if place:
                        place[0].close()
                    places[index] = None
        for sock, _ in filter(None, places):
            sock.close()


class Book:
    """Follow what was handed over, and compare at each end of the program what it had of that."""

    def __init__(self, proxy: FakeProxy, database: Path) -> None:
        self._proxy, self._database = proxy, database
        self.moved: list[Path] = []  # databases that were taken away
        self._read_to = 0
        self._delivered: list[bytes] = []
        self.gone: set[bytes] = set()  # on their way, or just read, at a kill
        self.faults: list[str] = []
        self.losses: list[int] = []

    def close_at(self, what: str, may_lose: int) -> None:
        """Compare at an end of the program; at most so many of the last ones handed over may be gone."""
        self._proxy.wait_for(lambda: self._proxy.open_connections == 0, 30)
        self._read_on()
        missing = len(self._delivered) - len(self.gone) - self._kept()
        if not 0 <= missing <= may_lose:
            self.faults.append(f"{missing} events are missing at a {what}, where {may_lose} may be")
        if missing > 0:
            self.gone.update(self._delivered[-missing:])
        if may_lose:
            self.losses.append(missing)

    def _read_on(self) -> None:
        with self._proxy.lock:
            handed, lost = self._proxy.handed_over[self._read_to :], set(self._proxy.lost)
        self._read_to += len(handed)
        self._delivered += [payload for payload in handed if payload not in lost]

    def _kept(self) -> int:
        """Count what the databases have, and what waits in the spool for the next start."""
        meta = dict(rows(self._database, "SELECT key, value FROM meta"))
        kept = sum(self._counts().values())
        for batch in app.Spool(Path(f"{self._database}.spool")).read():
            if isinstance(batch, tuple) and batch[0] > meta.get("sequence", 0):
                kept += len(batch[1].events) + len(batch[1].rejects) + batch[1].ignored
        return kept

    def _counts(self) -> Counter[str]:
        """Add up what all databases say that they stored, rejected and ignored."""
        counts: Counter[str] = Counter()
        for database in (*self.moved, self._database):
            counts.update(dict(rows(database, "SELECT key, value FROM meta WHERE key IN ('stored', 'rejected', 'ignored')")))
        return counts

    def _column(self, sql: str) -> list[Any]:
        return [value for database in (*self.moved, self._database) for (value,) in rows(database, sql)]

    def balance(self, pushed: int) -> list[str]:
        """Compare every event with what became of it; returns what does not fit, and prints the account."""
        proxy = self._proxy
        lost, handed = set(proxy.lost), proxy.handed_over
        wanted: dict[str, list[Any]] = {"stored": [], "rejected": [], "ignored": []}
        for payload in handed:
            if payload not in lost and payload not in self.gone:
                kind, name = identity(payload)
                wanted[kind].append(name)
        stored = self._column("SELECT request_id FROM events")
        rejected = [length // 3 for length in self._column("SELECT length FROM rejected_events")]
        meta = self._counts()
        accounted = len(stored) + len(rejected) + meta.get("ignored", 0) + len(lost) + len(self.gone)
        self._print(pushed, stored, rejected, meta, len(lost), len(handed) - accounted)
        found = list(self.faults)
        for name, got in (("stored", Counter(stored)), ("rejected", Counter(rejected))):
            more, less = got - Counter(wanted[name]), Counter(wanted[name]) - got
            if more or less:
                found.append(f"{name}: {sum(more.values())} too many {list(more)[:5]}, "
                             f"{sum(less.values())} missing {list(less)[:5]}")  # fmt: skip
        if meta.get("ignored", 0) != len(wanted["ignored"]):
            found.append(f"ignored: {meta.get('ignored', 0)}, where {len(wanted['ignored'])} were handed over")
        outages = rows(self._database, "SELECT from_at, to_at FROM outages")
        if any(to is None or to - start > 600 for start, to in outages):
            found.append(f"outages of the clock's making: {outages}")
        if pushed != len(handed) + len(proxy.forgotten) + proxy.queued:
            found.append("the proxy's own account does not balance")
        with contextlib.closing(app.Store(self._database)) as store:
            return found + store.find_faults()

    def _print(self, pushed: int, stored: list, rejected: list, meta: dict, lost: int, unexplained: int) -> None:
        lines = {
            "pushed": pushed, "forgotten by the proxy, too old or at a restart": len(self._proxy.forgotten),
            "handed over": len(self._proxy.handed_over), "  stored": len(stored), "  rejected": len(rejected),
            "  ignored": meta.get("ignored", 0), "  lost in replies that were cut": lost,
            f"  lost on their way at {len(self.losses)} kills, at most {max(self.losses, default=0)}": len(self.gone),
            "  unexplained": unexplained, "stored twice": len(stored) - len(set(stored)),
        }  # fmt: skip
        for name, count in lines.items():
            print(f"{name:60}{count:>10}")


class Soak:
    """Run the program in a folder of its own, with one fault after the other."""

    def __init__(self, folder: Path, seconds: float, seed: int, rate: int) -> None:
        self.dice = random.Random(seed)
        self.folder, self.seconds = folder, seconds
        self.pace = 1.0 if seconds >= 60 else 0.5
        self.database = folder / "usage.db"
        self.proxy = FakeProxy(KEY)
        self.proxy.retention_seconds = 5
        self.feeder = Feeder(self.proxy, random.Random(seed + 1), rate)
        self.book = Book(self.proxy, self.database)
        self.log, self.log_from = folder / "log", 0
        self.clock = folder / "clock"
        self.clock.write_bytes(struct.pack("d", 0.0))
        self.port = free_port()
        self.clients = Clients(self.port)
        self.mode = "pop"
        self.process: subprocess.Popen[bytes] | None = None
        self.counts: Counter[str] = Counter()
        self.longest_stop_s = 0.0
        self.found: list[str] = []
        self._idle = threading.Event()

    def run(self) -> list[str]:
        """Soak, settle, balance the account, and return what does not fit."""
        ends_at = time.monotonic() + self.seconds
        nothing = contextlib.nullcontext
        lasting = self._deck([self.locked, self.stalling, self.dribbling, nothing, nothing])
        sudden = self._deck(
            [self.kill, self.stop, self.cut, self.disconnect, self.restart, self.oversized, self.kill,
             self.damaged_spool, self.second_start, self.taken_away, self.clock_jump]
        )  # fmt: skip
        with self.proxy, self.clients:
            self.start()
            self.wait_until_up()
            self.feeder.start()
            try:
                while time.monotonic() < ends_at or not (self.counts["kill"] and self.counts["stop"]):
                    with self._counted(next(lasting)):
                        self.rest(0.1, 1.0)
                        self._counted(next(sudden))
                        self.rest(0.1, 1.0)
                    self.check_alive()
                self.settle()
            finally:
                self.feeder.ended.set()
                self.feeder.join()
                self.process.kill()
                self.process.wait()
        self.found += self.book.balance(self.feeder.pushed)
        self._look_back()
        return self.found

    def _deck(self, cards: list[Any]) -> Iterator[Any]:
        """Deal the cards at random, each of them before any comes again."""
        while True:
            yield from self.dice.sample(cards, len(cards))

    def _counted(self, fault: Callable[[], Any]) -> Any:
        self.counts[fault.__name__] += 1
        return fault()

    def rest(self, low: float, high: float) -> None:
        """Let some time go by."""
        self._idle.wait(self.dice.uniform(low, high) * self.pace)

    def _look_back(self) -> None:
        log = self.log.read_text(encoding="utf-8", errors="replace")
        counts = [f"{name} {count}" for name, count in sorted(self.counts.items()) if name != "nullcontext"]
        print("faults:", ", ".join(counts))
        print(f"longest stop {self.longest_stop_s:.1f} s; HTTP answers: {dict(self.clients.statuses)}")
        self.found += self.clients.faults
        for words in ("Traceback", "a fault of its own", "http fault="):
            if words in log:
                self.found.append(f"the program printed {words!r}: {log[log.index(words) - 200 :][:600]}")

    # The program

    def start(self) -> None:
        """Start the program, in either mode of taking."""
        self.mode = self.dice.choice(["pop", "pop", "pop", "http"])
        config = {
            "cliproxy_port": self.proxy.port, "management_password": KEY, "collect_mode": self.mode,
            "poll_interval_seconds": 0.1, "dashboard_host": "127.0.0.1", "dashboard_port": self.port,
            "database": str(self.database), "auth_dir": str(self.folder / "accounts"), "retention_days": 30,
        }  # fmt: skip
        path = self.folder / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        path.chmod(0o600)
        command = [sys.executable, "-c", WITH_A_CLOCK, str(ROOT), str(self.clock), "start", "--no-browser",
                   "--config", str(path)]  # fmt: skip
        with self.log.open("ab") as log:
            self.log_from = log.tell()
            self.clients.ending = False
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_up(self) -> None:
        """Wait for its first line; from then on it stops in order."""
        self.proxy.wait_for(lambda: b"Usage Dashboard" in self.log.read_bytes()[self.log_from :], 30)

    def check_alive(self) -> None:
        """Start it again where it ended by itself, which it must not."""
        if self.process.poll() is not None:
            self.found.append(f"the program ended by itself with exit code {self.process.returncode}")
            self.book.close_at("end of its own", 0)
            self.start()

    def kill(self) -> None:
        """End the program under load as a power cut would, and start it again."""
        self.feeder.burst(self.dice.choice([0, 3000]))
        self.rest(0, 0.2)
        self.process.kill()
        self.process.wait()
        self._again("kill", IN_FLIGHT[self.mode])

    def damaged_spool(self) -> None:
        """Kill the program, and leave lines in its spool that are no batches."""
        self.process.kill()
        self.process.wait()
        odd = self.dice.choice([b"[]", b'{"new": "layout"}', b"[1, [], [], [], 0]", b"[" * 5000, b"7"])
        checked = hashlib.sha256(odd).hexdigest()[:16].encode() + b" " + odd
        torn = b"0123456789abcdef [" + bytes(self.dice.randrange(256) for _ in range(300))
        with open(f"{self.database}.spool", "ab") as spool:
            spool.write(b"\n" + b"\n".join(self.dice.sample([odd, checked, torn, b"\x00" * 4096], 3)))
        self._again("damaged_spool", IN_FLIGHT[self.mode])

    def second_start(self) -> None:
        """Start the program once more on the same database, which it must refuse."""
        self.wait_until_up()
        command = [sys.executable, str(ROOT / "usage_dashboard.py"), "start", "--no-browser", "--port", str(free_port()),
                   "--config", str(self.folder / "config.json")]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False)
        if done.returncode != 1 or str(self.process.pid).encode() not in done.stdout:
            self.found.append(f"a second start ended with {done.returncode}: {done.stdout[-300:]!r}")

    def taken_away(self) -> None:
        """Take the database away under the running program, which makes a new one."""
        self.wait_until_up()
        moved = self.folder / f"taken-{len(self.book.moved)}.db"
        for suffix in ("-shm", "-wal", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self.database}{suffix}", f"{moved}{suffix}")
        self.book.moved.append(moved)
        self.proxy.wait_for(lambda: self.database.exists() and b"was deleted" in self.log.read_bytes()[self.log_from :], 30)

    def clock_jump(self) -> None:
        """Set the program's clock; events keep the right time."""
        self._set_clock(self.dice.choice(JUMPS_S))

    def _set_clock(self, ahead_s: float) -> None:
        with self.clock.open("r+b") as stream:
            stream.write(struct.pack("d", ahead_s))

    def stop(self) -> None:
        """Stop the program as systemd does, and start it again."""
        self.wait_until_up()
        self._terminate()
        # while the proxy stalls, what is on its way is given up after a while, as at a kill
        self._again("stop", IN_FLIGHT[self.mode] if self.proxy.seconds_per_byte else 0)

    def _terminate(self) -> None:
        self.clients.ending = True
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.longest_stop_s = max(self.longest_stop_s, time.monotonic() - began)
        if code:
            self.found.append(f"the program was stopped, with exit code {code}")

    def _again(self, what: str, may_lose: int) -> None:
        self.proxy.dribble(0)
        self.book.close_at(what, may_lose)
        self.start()

    def settle(self) -> None:
        """End the stream, let the program take the rest, and stop it."""
        self._set_clock(0.0)
        self.rest(2, 3)  # a few polls by the right clock
        self.feeder.ended.set()
        self.feeder.join()
        self.proxy.wait_for(lambda: self.proxy.queued == 0, 60)
        self.wait_until_up()
        self._terminate()
        self.book.close_at("last stop", 0)

    # Faults

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the database as another program would."""
        with contextlib.closing(sqlite3.connect(str(self.database), timeout=20, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield
            self.rest(0, 3.0)

    @contextlib.contextmanager
    def stalling(self, seconds_per_byte: float = 60) -> Iterator[None]:
        """Let the proxy say nothing for a while."""
        self.proxy.dribble(seconds_per_byte)
        yield
        self.proxy.dribble(0)

    def dribbling(self) -> contextlib.AbstractContextManager[None]:
        """Let the proxy speak slowly for a while."""
        return self.stalling(0.0005)

    def cut(self) -> None:
        """Break a connection somewhere within the replies that come."""
        self.proxy.cut_replies_after(self.dice.randrange(1, 30_000))
        self.feeder.burst(300)

    def disconnect(self) -> None:
        """Break every connection now."""
        self.proxy.disconnect_all()

    def restart(self) -> None:
        """Restart the proxy, which forgets its queue."""
        self.proxy.stop_listening()
        self.proxy.disconnect_all()
        self.proxy.forget()
        self.rest(0, 0.5)
        self.proxy.listen_again()

    def oversized(self) -> None:
        """Publish an event over the cap, now and then."""
        if self.counts["oversized"] <= 20:
            self.feeder.oversized()


def main() -> int:
    """Run the soak of the command line."""
    parser = argparse.ArgumentParser(description="Soak the program in faults, and balance the account of every event.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--rate", type=int, default=1500, help="events a second")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.seconds:g} s, {options.rate} events a second", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="usage-dashboard-soak-"))
    soak = Soak(folder, options.seconds, options.seed, options.rate)
    found = soak.run()
    if soak.longest_stop_s > 3:
        found.append("a stop took more than 3 s")
    for fault in found:
        print("FAULT:", fault)
    if found:
        print(f"what it left is in {folder}")
        return 1
    print("the account balances")
    shutil.rmtree(str(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
