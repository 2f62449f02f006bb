from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import select
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter, deque
from pathlib import Path

import pytest
from fake_proxy import FakeProxy, read_command
from redis_server import RedisServer
from support import Hangup, ProtocolError, SocketServer, Watched, free_port

import usage_dashboard as app

DATA = Path(__file__).parent / "data"
SAMPLES = (DATA / "events.jsonl").read_bytes().splitlines()
KEY = "secret-key"
WRONG = "wrong-key-of-the-owner"
ALWAYS = app.Window(0.0, 4e9)

# (model, input, output, total) of the samples, by hand from the token rules of design section 5; the eighth
# line is a warm-up with "generate": false and no usage.
EXPECTED_SAMPLES = [
    ("gpt-5.3-codex", 15230, 812, 16042),
    ("claude-sonnet-4-6", 50266, 1840, 52106),
    ("gpt-5.4", 90122, 3021, 93143),
    ("gpt-5.4", 0, 0, 0),
    ("gpt-5.4", 4210, 950, 5160),
    ("gemini-3-pro-preview", 1000, 420, 1420),
    ("gpt-5.5", 182044, 5120, 187164),
]


# ---- the collector in a thread ---------------------------------------------------------------------------


class QuickStop(threading.Event):
    """A stop event that notes how long it was asked to wait, and waits a few milliseconds instead."""

    def __init__(self, longest_s: float = 0.004) -> None:
        super().__init__()
        self.longest_s = longest_s
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return super().wait(min(timeout, self.longest_s))


class Run(Watched):
    """A collector that runs in a thread of its own; what it logged is in `lines`."""

    RECHECK_S = 0.01

    def __init__(self, config: app.Config, store: app.Store, stop: threading.Event, **options) -> None:
        super().__init__()
        self.stream = io.StringIO()
        self.store = store
        self.stop = stop
        self.error: BaseException | None = None
        self.collector = app.Collector(config, store, app.Log(self.stream), stop, **options)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            self.collector.run()
        except BaseException as error:
            self.error = error

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


@pytest.fixture
def open_store(tmp_path):
    """Open stores on tmp_path/usage.db; all are closed at the end."""
    opened = []

    def open_one(busy_timeout_s=0.05):
        opened.append(app.Store(tmp_path / "usage.db", busy_timeout_s))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()


@pytest.fixture
def collect(store):
    """Run collectors; a proxy or a redis-server, a config or the keys of one say where."""
    runs = []

    def start(
        where=None, stop=None, on=None, load=None, config_path=None, clock=time.time, steady=app.steady_s, **keys
    ):
        config = where if isinstance(where, app.Config) else config_of(where, **keys)
        options = {"load": load, "config_path": config_path, "clock": clock, "steady": steady}
        runs.append(Run(config, on or store, stop or QuickStop(), **options))
        return runs[-1]

    yield start
    for run in runs:
        run.stop.set()
    for run in runs:
        run.thread.join(10)
        assert not run.thread.is_alive()


def config_of(where=None, **keys) -> app.Config:
    if where is not None:
        keys.setdefault("cliproxy_port", where.port)
    return app.Config(**{"management_password": KEY, "poll_interval_seconds": 0.1, **keys})


def event(number=0, **changes) -> bytes:
    """Make an event that is told apart by its request id."""
    base = {"timestamp": "2026-08-22T13:00:00Z", "source": "an@example.com", "auth_index": "00000000000000ab",
            "model": "gpt-5.4", "provider": "codex", "request_id": f"r{number}"}  # fmt: skip
    return json.dumps({**base, **changes}).encode()


def events(count, first=0):
    return [event(number) for number in range(first, first + count)]


def rows(path, sql):
    """Read the database as another program would."""
    db = sqlite3.connect(str(path))
    try:
        return db.execute(sql).fetchall()
    finally:
        db.close()


def stored_ids(store) -> list[str]:
    return [row[0] for row in rows(store.path, "SELECT request_id FROM events ORDER BY id")]


def ids_of(payloads) -> list[str]:
    return [json.loads(payload)["request_id"] for payload in payloads]


def lock(store):
    """Lock the database for writing, as a backup tool or an editor would; close() or rollback() ends it."""
    db = sqlite3.connect(str(store.path), isolation_level=None, check_same_thread=False)
    db.execute("BEGIN IMMEDIATE")
    return db


def room(store, pages) -> None:
    """Give the database so many pages at most, as a full disk would."""
    with store._write_lock:
        store._writer.execute(f"PRAGMA max_page_count = {pages}")


# ---- every kind of queue ---------------------------------------------------------------------------------


def assert_samples(run) -> None:
    run.wait_for(lambda: run.accounted >= len(SAMPLES))
    got = rows(run.store.path, "SELECT model, input_tokens, output_tokens, total_tokens FROM events ORDER BY id")
    assert got == EXPECTED_SAMPLES
    assert (run.status["events"], run.status["rejected"], run.status["ignored"]) == (7, 0, 1)
    assert run.store.find_faults() == []


@pytest.mark.parametrize(
    ("version", "mode", "used"),
    [
        ("v6.9.38", "auto", "pop"),
        ("v6.10.8", "auto", "pop"),
        ("v7.0.2", "auto", "pop"),
        ("v7.1.17", "auto", "http"),
        ("v7.1.43", "auto", "pop"),
        ("v7.1.44", "auto", "pop"),
        ("v7.2.140", "auto", "pop"),
        ("v7.2.140", "pop", "pop"),
        ("v6.10.7", "pop", "pop"),
        ("v7.1.18", "auto", "pop"),
        ("v6.10.8", "http", "http"),
        ("v7.1.17", "http", "http"),
        ("v7.1.43", "http", "http"),
        ("v7.2.140", "http", "http"),
        ("v7.0.7", "subscribe", "subscribe"),
        ("v7.1.16", "subscribe", "subscribe"),
        ("v7.1.18", "subscribe", "subscribe"),
        ("v7.1.38", "subscribe", "subscribe"),
        ("v7.1.39", "subscribe", "subscribe"),
        ("v7.1.43", "subscribe", "subscribe"),
        ("v7.1.44", "subscribe", "subscribe"),
        ("v7.2.140", "subscribe", "subscribe"),
    ],
)
def test_collector_on_each_release_and_mode_stores_the_samples(collect, version, mode, used):
    with FakeProxy(version=version) as proxy:
        proxy.push(*SAMPLES)
        run = collect(proxy, collect_mode=mode)
        run.wait_for(lambda: run.status["events"] == 7)
        # a subscription to a newer proxy begins with a control message, which is ignored, too
        greetings = int(mode == "subscribe" and proxy.dialect.control_messages)
        run.wait_for(lambda: run.accounted == len(SAMPLES) + greetings)
        got = rows(run.store.path, "SELECT model, input_tokens, output_tokens, total_tokens FROM events ORDER BY id")
        assert got == EXPECTED_SAMPLES
        assert (run.status["ignored"], run.status["rejected"], run.status["mode"]) == (1 + greetings, 0, used)
        assert (proxy.failures, proxy.lost, proxy.queued, run.store.find_faults()) == (0, [], 0, [])


@pytest.mark.parametrize(
    ("version", "mode", "state", "said"),
    [
        ("v6.9.38", "http", "closed", "older than v6.10.8"),
        ("v6.10.7", "http", "closed", "older than v6.10.8"),
        ("v7.1.17", "pop", "not_resp", "does not serve its queue over RESP"),
        ("v7.1.17", "subscribe", "not_resp", "does not serve its queue over RESP"),
        ("v6.9.38", "subscribe", "not_resp", '"collect_mode": "auto"'),
        ("v7.0.6", "subscribe", "not_resp", '"collect_mode": "auto"'),
    ],
)
def test_collector_in_a_mode_that_a_release_lacks_says_so_and_takes_nothing(collect, version, mode, state, said):
    with FakeProxy(version=version) as proxy:
        proxy.push(*SAMPLES)
        run = collect(proxy, collect_mode=mode)
        run.wait_for_state(state)
        assert said in run.status["message"]
        wait_a_while(run, 3)
        assert (proxy.failures, proxy.queued) == (0, len(SAMPLES))


@pytest.mark.parametrize("mode", ["auto", "http"])
@pytest.mark.parametrize("version", ["v6.10.8", "v7.0.2"])
def test_collector_on_a_proxy_that_an_idle_connection_freezes_keeps_it_free(collect, version, mode):
    with FakeProxy(version=version) as proxy:
        run = collect(proxy, collect_mode=mode)
        run.wait_for_state("waiting")
        for _ in range(3):  # others get in, and are answered
            with socket.create_connection((proxy.host, proxy.port), timeout=10) as other:
                other.sendall(b"*0\r\n")
                assert other.recv(100) == b"-ERR empty command\r\n"
        wait_a_while(run, 3)


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


@pytest.mark.parametrize("key", ["", KEY])
def test_collector_on_a_redis_that_knows_no_count_stores(collect, key):
    with OldRedis([*SAMPLES, *events(300)]) as server:
        run = collect(server, management_password=key)
        run.wait_for_events(307)
        assert server.connections == 1 and stored_ids(run.store)[7:] == [f"r{number}" for number in range(300)]


def test_collector_on_a_proxy_sends_auth_first_and_reports_it_all(collect, proxy):
    proxy.push(*SAMPLES)
    run = collect(proxy)
    run.wait_for_state("recording")
    status = run.status
    assert proxy.commands[0] == "AUTH" and proxy.auth_attempts == 1
    assert not {"PING", "HELLO", "CLIENT", "SELECT"} & set(proxy.commands)
    assert (status["proxy_version"], status["publishing"]) == ("v7.2.140", True)
    assert status["endpoint"] == f"127.0.0.1:{proxy.port}"
    assert status["last_event"] == pytest.approx(1787404065.90213)  # 2026-08-22T21:07:45.90213+08:00
    run.end()


def test_collector_on_one_connection_keeps_it_for_all_polls(collect, proxy):
    run = collect(proxy)
    for number in range(5):
        proxy.push(event(number))
        run.wait_for_events(number + 1)
    run.wait_for(lambda: proxy.open_connections == 1)
    assert proxy.auth_attempts == 1


def test_collector_on_an_idle_queue_waits_the_poll_interval(collect, proxy):
    run = collect(proxy, poll_interval_seconds=7.5)
    run.wait_for(lambda: run.stop.waits.count(7.5) >= 3)
    assert set(run.stop.waits) == {7.5} and run.state == "waiting"


def test_collector_on_a_long_queue_follows_full_batches_at_once(collect, proxy):
    proxy.push(*events(3000))
    run = collect(proxy, poll_interval_seconds=7.5)
    run.wait_for_events(3000)
    run.wait_for(lambda: run.stop.waits)
    assert run.stop.waits[:1] == [7.5] and ids_of(proxy.handed_over) == stored_ids(run.store)
    assert run.store.find_faults() == []


@pytest.mark.parametrize("key", ["", KEY])
def test_collector_on_a_redis_without_a_password_stores_and_never_asks_http(collect, redis_server, key):
    redis_server.push("usage", *SAMPLES)
    run = collect(redis_server, management_password=key)
    assert_samples(run)
    # one connection is the fixture's; a question over HTTP would be a third
    clients = redis_server.command("INFO", "stats").decode()
    assert "total_connections_received:2\r\n" in clients
    assert (run.status["mode"], run.status["publishing"], run.status["proxy_version"]) == ("pop", None, None)


def test_collector_on_a_redis_with_a_password_stores(collect, redis_with_password):
    redis_with_password.push("usage", *SAMPLES)
    run = collect(redis_with_password)
    assert_samples(run)
    assert "total_connections_received:2\r\n" in redis_with_password.command("INFO", "stats").decode()


def test_collector_on_a_redis_pops_only_its_own_list(collect, redis_server):
    redis_server.push("usage", event(1))
    redis_server.push("mine", event(2))
    run = collect(redis_server, queue_key="mine")
    run.wait_for_events(1)
    assert (stored_ids(run.store), redis_server.length("usage")) == (["r2"], 1)


@pytest.mark.parametrize(("password", "state"), [(WRONG, "wrong_password"), ("", "no_password")])
def test_collector_on_a_redis_that_refuses_tries_once(collect, redis_with_password, password, state):
    run = collect(redis_with_password, management_password=password)
    run.wait_for(lambda: len(run.stop.waits) > 20)
    assert run.state == state
    assert "total_connections_received:2\r\n" in redis_with_password.command("INFO", "stats").decode()


def test_collector_with_a_key_of_another_type_on_redis_says_so(collect, redis_server):
    redis_server.command("SET", "usage", "text")
    run = collect(redis_server)
    run.wait_for_state("unreachable", "refused")
    assert "no list" in run.status["message"] and redis_server.command("GET", "usage") == b"text"


def test_collector_behind_a_reverse_proxy_turns_to_http(collect, proxy):
    proxy.answer_http_only = True
    proxy.push(*SAMPLES)
    run = collect(proxy)
    assert_samples(run)
    assert run.status["mode"] == "http" and proxy.failures == 0


@pytest.mark.parametrize("mode", ["pop", "subscribe"])
def test_collector_behind_a_reverse_proxy_with_resp_only_is_not_resp(collect, proxy, mode):
    proxy.answer_http_only = True
    run = collect(proxy, collect_mode=mode)
    run.wait_for_state("not_resp")
    assert not any(method == "GET" for method, _ in proxy.http_requests)


def test_collector_behind_a_reverse_proxy_without_a_key_asks_nothing_over_http(collect, proxy):
    proxy.answer_http_only = True
    run = collect(proxy, management_password="")
    run.wait_for_state("not_resp")
    assert (proxy.failures, proxy.http_requests) == (0, [])


def test_collector_over_tls_stores_and_asks_the_api_over_tls(collect, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(DATA / "ca.pem"))
    with FakeProxy(tls=server_tls()) as proxy:
        proxy.push(*SAMPLES)
        run = collect(proxy, cliproxy_tls=True)
        assert_samples(run)
        assert (run.status["publishing"], run.status["mode"]) == (True, "pop")


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(DATA / "server.pem"))
    context.set_alpn_protocols(["h2", "http/1.1"])  # a client that takes one of them gets HTTP, never RESP
    return context


# CPython forgets to close an SSLSocket whose peer resets the connection before the handshake.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("tls_there", "tls_here"), [(True, False), (False, True), (True, True)])
def test_collector_with_the_wrong_tls_is_closed_and_told_what_to_set(collect, monkeypatch, tls_there, tls_here):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)  # so the certificate is of nobody known
    with FakeProxy(tls=server_tls() if tls_there else None) as proxy:
        run = collect(proxy, cliproxy_tls=tls_here)
        run.wait_for_state("closed")
        wanted = "SSL_CERT_FILE=" if tls_there and tls_here else "cliproxy_tls"
        assert wanted in run.status["message"]


def test_collector_that_subscribes_hears_what_comes_and_ignores_control_messages(collect, proxy):
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1 and run.status["ignored"] == 1)
    proxy.push(event(1))
    proxy.refresh()
    proxy.push(event(2))
    run.wait_for(lambda: run.accounted == 4)
    assert (stored_ids(run.store), run.status["ignored"]) == (["r1", "r2"], 2)


def test_collector_that_subscribes_drains_the_queue_of_each_gap(collect, proxy):
    proxy.push(event(1))
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1 and run.status["events"] == 1)
    with proxy.change():
        proxy.disconnect_all()
        proxy.stop_listening()
    proxy.wait_for(lambda: proxy.subscribers == 0)
    proxy.push(event(2), event(3))
    assert proxy.queued == 2
    proxy.listen_again()
    run.wait_for_events(3)
    proxy.push(event(4))
    run.wait_for_events(4)
    assert (stored_ids(run.store), proxy.lost, proxy.failures) == (["r1", "r2", "r3", "r4"], [], 0)


def test_collector_that_subscribes_leaves_other_subscribers_their_events(collect, proxy, tmp_path):
    other = app.Store(tmp_path / "other.db")
    try:
        runs = [collect(proxy, collect_mode="subscribe", on=on) for on in (None, other)]
        proxy.wait_for(lambda: proxy.subscribers == 2)
        proxy.push(*events(50))
        for run in runs:
            run.wait_for_events(50)
            run.end()
    finally:
        other.close()


@pytest.mark.parametrize("count", [50, 1200])
def test_collector_that_subscribes_stores_all_it_heard_before_the_stop(collect, open_store, store, proxy, count):
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1 and run.status["ignored"] == 1)
    locker = lock(store)
    try:
        for number in range(count):
            proxy.push(event(number))
            if number % 100 == 99:
                proxy.wait_for(lambda: not any(one.outbox for one in proxy._subscribers))
        run.wait_for_state("storage_error")
        proxy.wait_for(lambda: not any(one.outbox for one in proxy._subscribers))
    finally:
        locker.close()
    run.end()
    after = collect(proxy, on=open_store())
    after.wait_for_state("waiting", "recording")
    assert len(proxy.handed_over) == count and stored_ids(after.store) == ids_of(proxy.handed_over)


def test_collector_that_subscribes_keeps_what_it_heard_while_the_session_ended(collect, open_store, proxy):
    slept, woken = [0.0], threading.Event()

    def steady():
        if slept[0]:
            woken.set()
        return app.steady_s() + slept[0]

    run = collect(proxy, on=open_store(2.0), collect_mode="subscribe", steady=steady)
    run.wait_for(lambda: proxy.subscribers == 1 and run.state == "waiting")
    locker = lock(run.store)
    slept[0] = 1000.0  # a sleep that is to be noted as an outage, and cannot be
    assert woken.wait(10)
    proxy.push(*events(50))  # heard while it waits for the lock
    run.wait_for_state("storage_error")
    locker.close()
    run.wait_for_events(50)
    assert stored_ids(run.store) == ids_of(proxy.handed_over)


def test_collector_that_subscribes_and_is_too_slow_loses_only_what_the_proxy_threw_away(collect, proxy):
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1)
    run.wait_for_state("waiting")
    proxy.push(*events(3000))
    run.wait_for(lambda: run.status["events"] == 3000 - len(proxy.lost))
    assert len(proxy.lost) == 1 and proxy.queued == 0
    assert Counter(stored_ids(run.store)) == Counter(ids_of(proxy.handed_over))


def test_collector_that_subscribes_to_a_proxy_that_publishes_nothing_says_so(collect, proxy):
    proxy.publishing = False
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: run.status["ignored"] == 1)  # the control message, which is no usage
    wait_for_turns(run)
    assert (run.state, run.status["publishing"]) == ("publishing_off", False)


def wait_for_turns(run):
    """Give a subscriber that waits without the stop event some turns."""
    seen = time.monotonic() + 0.3
    run.wait_for(lambda: time.monotonic() > seen)


# ---- nobody locked out -----------------------------------------------------------------------------------


def wait_a_while(run, waits=12):
    """Give a refused collector many chances to send its key again."""
    seen = len(run.stop.waits)
    run.wait_for(lambda: len(run.stop.waits) >= seen + waits)


@pytest.mark.parametrize("mode", ["auto", "pop", "http", "subscribe"])
def test_collector_with_a_wrong_key_fails_once_for_ever(collect, open_store, proxy, mode):
    run = collect(proxy, management_password=WRONG, collect_mode=mode)
    run.wait_for_state("wrong_password")
    wait_a_while(run)
    run.end()
    for _ in range(2):
        again = collect(proxy, on=open_store(), management_password=WRONG, collect_mode=mode)
        again.wait_for_state("wrong_password")
        wait_a_while(again)
        again.end()
    assert (proxy.failures, proxy.connections) == (1, 1)


@pytest.mark.parametrize("mode", ["auto", "pop", "http", "subscribe"])
def test_collector_with_an_empty_key_fails_at_most_once(collect, open_store, proxy, mode):
    run = collect(proxy, management_password="", collect_mode=mode)
    run.wait_for_state("no_password")
    wait_a_while(run)
    run.end()
    again = collect(proxy, on=open_store(), management_password="", collect_mode=mode)
    again.wait_for_state("no_password")
    wait_a_while(again)
    assert proxy.failures == 1 and "management_password" in run.status["message"]


def test_collector_with_a_refused_key_takes_the_corrected_one_from_load(collect, proxy):
    proxy.push(event(1))
    current = [WRONG]
    run = collect(proxy, load=lambda: config_of(proxy, management_password=current[0]), management_password=WRONG)
    run.wait_for_state("wrong_password")
    wait_a_while(run)
    current[0] = KEY
    run.wait_for_events(1)
    assert (proxy.auth_attempts, proxy.failures) == (2, 1)
    # looked at within 15 s, as the page promises
    assert max(wait for wait in run.stop.waits) <= 15


def test_collector_with_a_refused_key_tries_again_when_the_config_file_is_written(collect, proxy, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}", encoding="utf-8")
    run = collect(proxy, management_password=WRONG, config_path=path)
    run.wait_for_state("wrong_password")
    wait_a_while(run)
    assert proxy.auth_attempts == 1
    proxy.key = WRONG  # corrected on the other side
    os.utime(str(path), (1700000000, 1700000000))
    run.wait_for_state("waiting")
    assert proxy.auth_attempts == 2


def test_collector_with_a_refused_key_survives_a_config_file_with_faults(collect, proxy):
    answers = iter([app.ConfigError(["a fault"]), config_of(proxy)])

    def load():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    run = collect(proxy, load=load, management_password=WRONG)
    run.wait_for_state("waiting")
    assert "a fault" in run.log


def test_collector_restarted_with_another_key_tries_it_once(collect, open_store, proxy):
    for number, key in enumerate(["wrong-1", "wrong-2", KEY]):
        run = collect(proxy, on=open_store(), management_password=key)
        run.wait_for_state("wrong_password" if key != KEY else "waiting")
        run.end()
        assert proxy.auth_attempts == number + 1


def test_collector_after_a_login_has_forgotten_an_old_refusal(collect, open_store, proxy):
    first = collect(proxy, management_password=WRONG)
    first.wait_for_state("wrong_password")
    first.end()
    assert first.store.get_meta("refused") is not None
    run = collect(proxy, on=open_store())
    run.wait_for_state("waiting")
    assert run.store.get_meta("refused") is None


def test_collector_keeps_no_readable_key_in_the_database(collect, store, proxy):
    run = collect(proxy, management_password=WRONG)
    run.wait_for_state("wrong_password")
    run.end()
    files = [Path(f"{store.path}{suffix}") for suffix in ("", "-wal", ".spool")]
    assert not any(WRONG.encode() in file.read_bytes() for file in files if file.exists())


def test_collector_with_a_wrong_key_and_a_locked_database_lives_and_fails_once(collect, store, proxy):
    locker = lock(store)
    run = collect(proxy, management_password=WRONG)
    run.wait_for_state("storage_error")
    assert proxy.connections == 0  # a refusal could not be remembered now
    locker.close()
    run.wait_for_state("wrong_password")
    wait_a_while(run)
    assert proxy.failures == 1


@pytest.mark.parametrize(
    ("seconds", "shortest"),
    [(1800, 1795), (45, 43), (59.4, 57), (3600, 3590), (120, 117), (0.3, 0)],
)
def test_collector_that_is_banned_waits_as_long_as_the_proxy_says(collect, proxy, seconds, shortest):
    proxy.ban_seconds = seconds
    proxy.ban()
    started_at = time.time()
    run = collect(proxy)
    run.wait_for_state("banned")
    run.wait_for(lambda: run.stop.waits)
    assert shortest <= run.stop.waits[0] <= seconds + 3
    assert shortest <= run.status["until"] - started_at <= seconds + 6


def test_collector_banned_over_http_waits_as_well(collect, proxy):
    proxy.ban_seconds = 300
    proxy.ban()
    run = collect(proxy, collect_mode="http")
    run.wait_for_state("banned")
    run.wait_for(lambda: run.stop.waits)
    assert 295 <= run.stop.waits[0] <= 303


def test_collector_of_another_machine_is_told_remote_disabled(collect):
    with FakeProxy(allow_remote=False, seen_from="192.168.1.7") as proxy:
        run = collect(proxy)
        run.wait_for_state("remote_disabled")
        assert proxy.failures == 0 and "allow-remote" in run.status["message"]
        proxy.allow_remote = True
        run.wait_for_state("waiting")


@pytest.mark.parametrize(("version", "state"), [("v7.2.140", "home_mode"), ("v7.1.16", "closed")])
def test_collector_on_a_home_node_says_what_the_proxy_shows(collect, version, state):
    with FakeProxy(version=version, home_mode=True) as proxy:
        collect(proxy).wait_for_state(state)


@pytest.mark.parametrize(("keys", "state"), [({}, "closed"), ({"collect_mode": "http"}, "closed")])
def test_collector_without_management_is_closed_and_goes_on_when_it_is_on(collect, keys, state):
    with FakeProxy(management=False) as proxy:
        run = collect(proxy, **keys)
        run.wait_for_state(state)
        assert "management" in run.status["message"] and proxy.failures == 0
        proxy.management = True
        run.wait_for_state("waiting")


def test_collector_on_a_proxy_without_a_key_is_closed(collect):
    with FakeProxy(key="") as proxy:
        collect(proxy).wait_for_state("closed")
        assert proxy.failures == 0


def test_collector_with_nobody_there_is_unreachable_and_backs_off_doubling(collect):
    run = collect(config_of(cliproxy_port=free_port()))
    run.wait_for(lambda: len(run.stop.waits) >= 9)
    assert run.state == "refused"
    for wait, full in zip(run.stop.waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]):
        assert full * 0.75 <= wait <= full


def test_collector_whose_queue_key_is_unknown_says_so_and_backs_off_doubling(collect, proxy):
    run = collect(proxy, queue_key="queue")
    run.wait_for(lambda: len(run.stop.waits) >= 5)
    assert "does not know this queue_key" in run.log and "state=unreachable" in run.log
    assert run.stop.waits[4] >= 12  # each login costs the proxy a bcrypt: 1, 2, 4, 8, 16


STATES = {
    "wrong_password": ({}, {"management_password": WRONG}),
    "not_resp": ({"answer_http_only": True}, {"collect_mode": "pop"}),
    "closed": ({"management": False}, {}),
    "home_mode": ({"home_mode": True}, {}),
    "publishing_off": ({"publishing": False}, {}),
    "remote_disabled": ({"allow_remote": False, "seen_from": "10.0.0.9"}, {}),
}


@pytest.mark.parametrize("state", sorted(STATES))
def test_collector_in_every_state_shows_a_remedy_once_and_never_the_key(collect, proxy, state):
    there, here = STATES[state]
    proxy.key = "Key-Of-The-Owner-77"  # a text that no remedy holds
    for name, value in there.items():
        setattr(proxy, name, value)
    run = collect(proxy, **{"management_password": proxy.key, **here})
    run.wait_for_state(state)
    wait_a_while(run, 10)
    said = json.dumps(run.status) + run.log
    assert proxy.key not in said and WRONG not in said
    assert app.STATE_REMEDIES[state] in run.status["message"]
    assert run.log.count(f"state={state} ") == 1


@pytest.mark.parametrize("key", [KEY, WRONG])
def test_probe_logs_in_once_pops_nothing_and_notes_no_outage(store, proxy, key):
    proxy.push(event(1))
    for _ in range(2):
        config = config_of(proxy, management_password=key)
        status = app.Collector(config, store, app.Log(io.StringIO()), threading.Event()).probe()
    assert status["state"] == ("waiting" if key == KEY else "wrong_password")
    assert proxy.queued == 1 and proxy.failures == (0 if key == KEY else 1)
    assert store.outages(ALWAYS, time.time()) == []  # the dashboard that runs beside it may be recording


# ---- says why --------------------------------------------------------------------------------------------


def test_collector_on_a_proxy_that_publishes_nothing_says_so_and_records_as_soon_as_it_does(collect, proxy):
    proxy.publishing = False
    run = collect(proxy)
    run.wait_for_state("publishing_off")
    assert "usage-statistics-enabled: true" in run.status["message"] and run.status["publishing"] is False
    proxy.publishing = True
    proxy.push(event(1))
    run.wait_for_state("recording")
    assert run.status["publishing"] is True


def test_collector_on_a_proxy_that_publishes_again_notices_without_an_event(collect, proxy):
    ahead = [0.0]
    proxy.publishing = False
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state("publishing_off")
    asked = len(proxy.http_requests)
    wait_a_while(run)
    assert len(proxy.http_requests) == asked
    proxy.publishing = True
    ahead[0] = 16.0
    run.wait_for_state("waiting")


def test_collector_on_a_proxy_that_stops_publishing_notices_within_minutes(collect, proxy):
    ahead = [0.0]
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state("waiting")
    proxy.publishing = False
    ahead[0] = 301.0
    run.wait_for_state("publishing_off")


def test_collector_on_a_proxy_that_publishes_nothing_notes_a_loss_until_it_does(collect, proxy, store):
    ahead = [0.0]
    proxy.publishing = False
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state("publishing_off")
    shown = [(outage["reason"], outage["to"], outage["lost"]) for outage in store.outages(ALWAYS, time.time())]
    assert shown == [("publishing_off", None, True)]
    proxy.publishing = True
    ahead[0] = 20.0
    run.wait_for_state("waiting")
    (outage,) = store.outages(ALWAYS, time.time())
    assert outage["lost"] and 19 <= outage["to"] - outage["from"] <= 30


@pytest.mark.parametrize(
    ("version", "setting", "learnt"),
    [("v7.2.140", 3600, 3600), ("v7.2.140", 90000, 3600), ("v7.2.140", 0, 60), ("v6.9.38", 900, 60)],
)
def test_collector_learns_how_long_the_proxy_remembers(collect, version, setting, learnt):
    with FakeProxy(version=version) as proxy:
        proxy.retention_seconds = setting
        run = collect(proxy)
        run.wait_for_state("waiting")
        assert (run.status["retention_seconds"], run.status["warning"]) == (learnt, None)
        assert run.store.get_meta("retention_s") == learnt
        assert proxy.failures == 0 and "sk-client-secret" not in run.log + repr(run.status)


def test_collector_that_asks_more_rarely_than_the_proxy_remembers_warns_once(collect, proxy):
    proxy.retention_seconds = 60
    run = collect(proxy, poll_interval_seconds=50)
    run.wait_for_state("waiting")
    assert run.status["warning"] == "retention_short"
    proxy.disconnect_all()
    run.wait_for(lambda: proxy.auth_attempts == 2)
    run.wait_for_state("waiting")
    assert run.log.count("warning=") == 1 and "redis-usage-queue-retention-seconds: 3600" in run.log


def test_collector_on_a_redis_knows_that_nothing_is_forgotten(collect, redis_server):
    run = collect(redis_server, management_password="")
    run.wait_for_state("waiting")
    assert run.store.get_meta("retention_s") > 3600 and run.status["retention_seconds"] is None


def test_collector_whose_machine_slept_notes_the_night_as_stopped(collect, proxy, store):
    slept = [0.0]
    run = collect(
        proxy, clock=lambda: time.time() + slept[0], steady=lambda: app.steady_s() + slept[0]
    )
    run.wait_for_state("waiting")
    wait_a_while(run)
    slept[0] = 8 * 3600.0
    run.wait_for(lambda: any(one["to"] for one in store.outages(ALWAYS, time.time())))
    (outage,) = store.outages(ALWAYS, time.time())
    assert (outage["reason"], outage["lost"]) == ("stopped", True)
    assert 8 * 3600 - 5 <= outage["to"] - outage["from"] <= 8 * 3600 + 60


def test_collector_whose_clock_was_set_ahead_notes_no_outage(collect, proxy, store):
    ahead = [0.0]
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state("waiting")
    wait_a_while(run)
    ahead[0] = 8 * 3600.0
    proxy.push(event(1))
    run.wait_for_events(1)
    wait_a_while(run)
    assert store.outages(ALWAYS, time.time()) == []


def test_collector_that_cannot_ask_the_api_records_all_the_same(collect, proxy):
    # banned over HTTP alone, as behind a reverse proxy that forwards another address
    run = collect(proxy)
    run.wait_for_state("waiting")
    proxy.ban()
    proxy.push(event(1))
    run.wait_for_events(1)
    assert run.state == "recording" and proxy.auth_attempts == 1


def test_collector_with_a_clock_that_jumps_back_has_no_negative_waits(collect, proxy):
    ahead = [0.0]
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state("waiting")
    ahead[0] = -86400.0 * 400
    proxy.push(event(1))
    run.wait_for_events(1)
    wait_a_while(run)
    assert min(run.stop.waits) > 0


def test_collector_whose_proxy_was_gone_notes_the_outage_with_its_reason(collect, proxy, store):
    ahead = [0.0]
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state("waiting")
    proxy.stop_listening()
    proxy.disconnect_all()
    run.wait_for_state("unreachable", "refused")
    ahead[0] = 600.0
    proxy.listen_again()
    run.wait_for_state("waiting")
    (outage,) = store.outages(ALWAYS, time.time())
    assert outage["reason"] in ("unreachable", "refused")
    assert 590 <= outage["to"] - outage["from"] <= 610


@pytest.mark.parametrize(("prepare", "reason"), [("ban", "banned"), ("switch_off", "closed")])
def test_collector_that_was_refused_notes_the_outage_with_its_reason(collect, proxy, store, prepare, reason):
    ahead = [0.0]
    if prepare == "ban":
        proxy.ban()
    else:
        proxy.management = False
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state(reason)
    run.wait_for(lambda: store.outages(ALWAYS, time.time()))
    assert [(outage["reason"], outage["to"]) for outage in store.outages(ALWAYS, time.time())] == [(reason, None)]
    ahead[0] = 600.0
    proxy.lift_ban()
    proxy.management = True
    run.wait_for_state("waiting")
    assert [outage["reason"] for outage in store.outages(ALWAYS, time.time())] == [reason]
    assert store.outages(ALWAYS, time.time())[0]["to"] is not None


def test_collector_that_reconnects_at_once_notes_no_outage(collect, proxy, store):
    run = collect(proxy)
    run.wait_for_state("waiting")
    proxy.disconnect_all()
    run.wait_for(lambda: proxy.auth_attempts == 2)
    run.wait_for_state("waiting")
    assert store.outages(ALWAYS, time.time()) == []


def test_collector_that_did_not_run_notes_the_outage_as_stopped(collect, open_store, proxy):
    collect(proxy).end()
    run = collect(proxy, clock=lambda: time.time() + 7200)
    run.wait_for_state("waiting")
    assert [outage["reason"] for outage in run.store.outages(ALWAYS, time.time())] == []  # it was never connected before
    run.end()
    again = collect(proxy, on=open_store(), clock=lambda: time.time() + 10800)
    again.wait_for_state("waiting")
    (outage,) = again.store.outages(ALWAYS, time.time())
    assert outage["reason"] == "stopped" and 3590 <= outage["to"] - outage["from"] <= 3610


def test_collector_stopped_by_a_locked_database_notes_the_outage_afterwards(collect, proxy, store):
    ahead = [0.0]
    run = collect(proxy, clock=lambda: time.time() + ahead[0])
    run.wait_for_state("waiting")
    locker = lock(store)
    proxy.push(event(1))
    run.wait_for_state("storage_error")
    ahead[0] = 600.0
    locker.close()
    run.wait_for_state("recording")
    assert [outage["reason"] for outage in store.outages(ALWAYS, time.time())] == ["storage_error"]


# ---- connections that break ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pop", "http", "subscribe"])
def test_collector_whose_connection_breaks_connects_again_without_loss(collect, proxy, mode):
    run = collect(proxy, collect_mode=mode)
    for number in range(3):
        proxy.push(event(number))
        run.wait_for_events(number + 1)
        before = proxy.connections
        proxy.disconnect_all()
        run.wait_for(lambda before=before: proxy.connections > before)
        run.wait_for(lambda: mode != "subscribe" or proxy.subscribers == 1)
    assert proxy.failures == 0 and stored_ids(run.store) == ["r0", "r1", "r2"]


def test_collector_whose_proxy_restarts_stores_what_comes_after(collect, proxy):
    run = collect(proxy)
    run.wait_for_state("waiting")
    proxy.stop_listening()
    proxy.disconnect_all()
    run.wait_for_state("unreachable", "refused")
    proxy.push(event(1))
    proxy.listen_again()
    run.wait_for_events(1)
    run.wait_for_state("recording")


def test_collector_whose_redis_restarts_stores_what_comes_after(collect, redis_server):
    redis_server.push("usage", event(1))
    run = collect(redis_server)
    run.wait_for_events(1)
    redis_server.stop()
    run.wait_for_state("unreachable", "refused")
    redis_server.start()
    redis_server.push("usage", event(2))
    run.wait_for_events(2)
    assert stored_ids(run.store) == ["r1", "r2"]


def small(number) -> bytes:
    return b'{"timestamp":"2026-08-22T13:00:00Z","request_id":"r%d"}' % number


@pytest.mark.parametrize(("mode", "step"), [("pop", 1), ("http", 5)])
def test_queue_cut_at_every_byte_of_a_reply_loses_only_what_was_cut(collect, proxy, mode, step):
    run = collect(proxy, stop=QuickStop(0.002), collect_mode=mode)
    run.wait_for_state("waiting")
    pair = 2 * len(b"$%d\r\n%s\r\n" % (len(small(0)), small(0)))
    head = 0 if mode == "pop" else 250
    number = 0
    for position in range(1, pair + head + 2, step):
        before = proxy.connections
        with proxy.change():
            proxy.commands.clear()
            proxy.cut_replies_after(position)
            proxy.push(small(number), small(number + 1))
        number += 2
        run.wait_for(lambda before=before: proxy.connections > before and proxy.queued == 0)
        # the next cut is to hit a pop, not the login or the question that begin a connection
        run.wait_for(lambda: mode == "http" or ("AUTH" in proxy.commands and proxy.commands[-1] == "RPOP"))
    run.wait_for(lambda: run.accounted == len(proxy.handed_over) - len(proxy.lost))
    whole = Counter(ids_of(proxy.handed_over)) - Counter(ids_of(proxy.lost))
    assert Counter(stored_ids(run.store)) == whole
    assert number == len(proxy.handed_over) and 0 < len(proxy.lost) < number
    assert "state=not_resp" not in run.log  # which would tell people to look for a web server
    assert run.store.find_faults() == [] and proxy.failures == 0


def test_queue_that_dribbles_loses_nothing(collect, proxy):
    proxy.push(*events(6))
    proxy.dribble(0.0002)
    run = collect(proxy)
    run.wait_for_events(6)
    assert proxy.lost == []


class Scripted(SocketServer):
    """A proxy that answers each RPOP with the next reply of a script, and resets the connection at a None."""

    def __init__(self, replies: list[bytes | None]) -> None:
        super().__init__()
        self.replies = deque(replies)

    def serve(self, stream) -> None:
        while stream.buffer or stream.fill():
            try:
                name = read_command(stream)[0]
            except ProtocolError:
                return  # a question over HTTP
            if name == "AUTH":
                stream.send(b"+OK\r\n")
            elif name == "LLEN":
                stream.send(b"-ERR unknown command 'llen'\r\n")
            else:
                self.answer_pop(stream)

    def answer_pop(self, stream) -> None:
        stream.send(self.replies.popleft() if self.replies else b"$-1\r\n")
        if self.replies and self.replies[0] is None:
            self.replies.popleft()
            while struct.unpack("i", fcntl.ioctl(stream.sock, termios.TIOCOUTQ, bytes(4))) != (0,):
                self.closing.wait(0.001)  # a reset throws away what the kernel has not sent yet
            stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream.sock.close()
            raise Hangup


def replies_of(payloads) -> list[bytes]:
    return [b"$%d\r\n%s\r\n" % (len(one), one) for one in payloads]


def test_queue_reset_behind_a_full_batch_costs_none_of_it(collect):
    script = [reply for first in range(0, 320, 16) for reply in [*replies_of(events(16, first)), None]]
    with Scripted(script) as server:
        run = collect(server, collect_mode="pop")
        run.wait_for_events(320)
        assert stored_ids(run.store) == [f"r{number}" for number in range(320)]


def test_source_whose_connection_was_reset_tells_it_with_the_next_batch():
    with Scripted([*replies_of(events(16)), None]) as server:
        connection = socket.create_connection((server.host, server.port), timeout=10)
        source = app.PopSource(lambda: connection, KEY, "usage")
        source.open()
        first = source.take(16)
        reset = select.poll()
        reset.register(connection, 0)
        assert reset.poll(10_000)
        second = source.take(16)
        source.close()
    assert first == (events(16), True, None)
    assert (second.values, second.full) == ([], False) and isinstance(second.fault, app.QueueFault)


@pytest.mark.parametrize("position", [0, 7, 15])
def test_queue_with_an_error_between_its_replies_keeps_the_others(collect, position):
    script = replies_of(events(15))
    script.insert(position, b"-LOADING Redis is loading the dataset in memory\r\n")
    with Scripted(script) as server:
        run = collect(server, collect_mode="pop")
        run.wait_for_events(15)
        assert stored_ids(run.store) == [f"r{number}" for number in range(15)]
        run.wait_for(lambda: "LOADING" in run.log and "state=unreachable" in run.log)


# ---- odd events ------------------------------------------------------------------------------------------

MALFORMED = [
    b"", b"{", b"\xff\xfe", b"null", b"[]", b"7", b'"text"', b"{}", b"[" * 3000, b'{"timestamp": NaN}',
    event(1) + event(2), b"1,0,2", event(timestamp="2026-08-22 13:00"), event(timestamp="1999-01-01T00:00:00Z"),
    event(timestamp=1755867600), event(model=["x"]), event(latency_ms="12"), event(latency_ms=10**30),
    event(fail=[1]), event(auth_index={"a": 1}), event(tokens={"input_tokens": 2**70}),
]  # fmt: skip
ODD_BUT_GOOD = [
    event(100, model="\ud800"), event(101, source="a\ud800@x.com"), event(102, source="\x00"),
    event(103, model="x" * 5000), event(104, latency_ms=-5), event(105, request_id="\u202e\x07"),
    event(106, auth_index="1e999"), event(107, provider="\ud83d"),
    event(108, response_headers={"X-Codex-Plan-Type": ["\ud800"]}), event(109, api_key="\udfff"),
    event(110, failed=True, fail={"status_code": 429, "body": '{"error": {"message": "\ud800 \\ud801"}}'}),
]  # fmt: skip


def test_collector_given_malformed_events_parks_them_and_keeps_their_neighbours(collect, proxy):
    good = events(len(MALFORMED), first=200)
    mixed = [one for pair in zip(MALFORMED, good) for one in pair]
    proxy.push(*mixed, *ODD_BUT_GOOD, b'{"refresh":true}', event(99, generate=False))
    run = collect(proxy)
    run.wait_for(lambda: run.accounted >= len(proxy.handed_over) > 0 and proxy.queued == 0)
    status = run.status
    assert (status["events"], status["rejected"], status["ignored"]) == (
        len(good) + len(ODD_BUT_GOOD), len(MALFORMED), 2)  # fmt: skip
    kept = rows(run.store.path, "SELECT reason, length, event FROM rejected_events ORDER BY id")
    assert [row[1] for row in kept] == [len(raw) for raw in MALFORMED]
    assert all(reason for reason, _, _ in kept) and run.store.find_faults() == []


def test_collector_parks_a_rejected_event_without_its_secrets(collect, proxy):
    secrets = {"api_key": "sk-client-aaaa-1111", "source": "AIzaSyFAKE-0001", "client_ip": "10.1.2.3"}
    fail = {"status_code": 500, "body": "the prompt of somebody"}
    proxy.push(event(1, timestamp="never", fail=fail, **secrets))
    run = collect(proxy)
    run.wait_for(lambda: run.status["rejected"] == 1)
    ((kept,),) = rows(run.store.path, "SELECT event FROM rejected_events")
    assert json.loads(kept)["model"] == "gpt-5.4"
    for secret in ("sk-client", "AIzaSy", "10.1.2.3", "prompt"):
        assert secret not in kept and secret not in run.log


# ---- the database cannot be written ----------------------------------------------------------------------


def test_collector_with_a_locked_database_stops_popping_and_recovers_without_loss(collect, proxy, store):
    run = collect(proxy)
    run.wait_for_state("waiting")
    locker = lock(store)
    proxy.push(*events(3000))
    run.wait_for_state("storage_error")
    wait_a_while(run, 3)
    popped = len(proxy.handed_over)
    assert popped <= 16  # the batch in hand
    wait_a_while(run, 5)
    assert len(proxy.handed_over) == popped and "locked" in run.status["message"]
    assert run.log.count("state=storage_error") == 1
    locker.close()
    run.wait_for_events(3000)
    run.wait_for_state("recording")
    assert stored_ids(store) == ids_of(proxy.handed_over) and store.find_faults() == []


def test_collector_with_a_locked_database_has_what_it_popped_in_a_private_spool(collect, proxy, store):
    locker = lock(store)
    try:
        proxy.push(*events(40))
        run = collect(proxy)
        run.wait_for_state("storage_error")
        wait_a_while(run, 3)
    finally:
        popped = ids_of(proxy.handed_over)
        spooled = [one.request_id for _, parsed in app.Spool(spool_path(store)).read() for one in parsed.events]
        locker.close()
    assert spooled == popped
    if popped:
        assert spool_path(store).stat().st_mode & 0o777 == 0o600


def test_collector_with_a_locked_database_does_not_pop_before_it_can_store(collect, proxy, store):
    locker = lock(store)
    proxy.push(*events(40))
    run = collect(proxy)
    run.wait_for_state("storage_error")
    wait_a_while(run, 10)
    assert proxy.handed_over == []
    locker.close()
    run.wait_for_events(40)


def test_collector_on_an_open_redis_with_a_locked_database_loses_nothing(collect, redis_server, store):
    locker = lock(store)
    redis_server.push("usage", *events(20))
    run = collect(redis_server, management_password="")
    run.wait_for_state("storage_error")
    wait_a_while(run, 6)
    locker.close()
    run.wait_for_state("recording")
    run.wait_for(lambda: redis_server.length("usage") == 0)
    wait_a_while(run, 3)
    assert stored_ids(store) == [f"r{number}" for number in range(20)]


def test_collector_without_a_key_keeps_what_it_popped_to_log_in_when_the_lock_comes_just_then(collect, store):
    locks = []

    def lock_once():
        if not locks:
            locks.append(lock(store))

    with OldRedis(events(20), before_a_pop=lock_once) as server:
        run = collect(server, management_password="")
        run.wait_for_state("storage_error")
        locks[0].close()
        run.wait_for_events(20)
        assert stored_ids(store) == [f"r{number}" for number in range(20)]


def test_collector_on_a_full_disk_stops_popping_and_recovers_without_loss(collect, proxy, store):
    run = collect(proxy)
    run.wait_for_state("waiting")
    room(store, 45)
    proxy.push(*[event(number, alias="x" * 150 + str(number)) for number in range(3000)])
    run.wait_for_state("storage_error")
    wait_a_while(run, 3)
    popped = len(proxy.handed_over)
    wait_a_while(run, 5)
    assert len(proxy.handed_over) == popped < 3000 and "no room on the disk" in run.status["message"]
    room(store, 1_000_000)
    run.wait_for_events(3000)
    assert stored_ids(store) == ids_of(proxy.handed_over) and store.find_faults() == []


def test_collector_on_a_full_disk_with_a_spool_pops_nothing_new(collect, proxy, store):
    left = [event(number, alias="x" * 150 + str(number)) for number in range(3000)]
    app.Spool(spool_path(store)).append(1, app.parse_events(left))
    room(store, 45)
    proxy.push(*events(40, first=5000))
    run = collect(proxy)
    run.wait_for_state("storage_error")
    wait_a_while(run, 6)
    assert proxy.handed_over == []
    room(store, 1_000_000)
    run.wait_for_events(3040)


def test_collector_stopped_with_a_locked_database_keeps_its_batch_for_the_next_start(collect, open_store, store, proxy):
    run = collect(proxy)
    run.wait_for_state("waiting")
    locker = lock(store)
    try:
        proxy.push(*events(40))
        run.wait_for_state("storage_error")
        run.end()
    finally:
        locker.close()
    assert store.counts["stored"] == 0 and "spooled=" in run.log
    again = collect(proxy, on=open_store())
    again.wait_for_events(40)
    assert stored_ids(store) == ids_of(proxy.handed_over)


@pytest.mark.parametrize("damage", ["overwritten", "truncated"])
def test_collector_whose_database_is_damaged_leaves_it_so_and_goes_on_once_it_is_mended(collect, proxy, store, damage):
    run = collect(proxy)
    proxy.push(*events(100))
    run.wait_for_events(100)
    rows(store.path, "PRAGMA wal_checkpoint(TRUNCATE)")
    whole = store.path.read_bytes()
    damaged = b"\x5a" * len(whole) if damage == "overwritten" else whole[: len(whole) // 2]
    replace_content(store.path, damaged)
    proxy.push(*events(200, first=100))
    run.wait_for_state("storage_error")
    wait_a_while(run, 3)
    assert "is damaged" in run.status["message"] and store.path.read_bytes() == damaged
    assert len(proxy.handed_over) <= 100 + 16
    replace_content(store.path, whole)
    run.wait_for_events(300)
    assert stored_ids(store) == [f"r{number}" for number in range(300)] and store.find_faults() == []


def replace_content(path, content) -> None:
    """Write a file anew without giving it another inode, as cp does."""
    with path.open("r+b") as file:
        file.truncate()
        file.write(content)


# ---- the spool -------------------------------------------------------------------------------------------


def spool_path(store) -> Path:
    return Path(f"{store.path}.spool")


def parsed(*numbers) -> app.Parsed:
    return app.parse_events([event(number) for number in numbers])


@pytest.mark.parametrize(
    ("committed", "expected"),
    [
        (0, ["r1", "r2", "r3"]),  # killed before the first commit
        (1, ["r1", "r2", "r3"]),  # after it, before the spool was dropped
        (2, ["r1", "r2", "r3"]),  # after both
    ],
)
def test_spool_left_by_a_crash_is_stored_exactly_once(collect, open_store, store, proxy, committed, expected):
    spool = app.Spool(spool_path(store))
    batches = [(1, parsed(1, 2)), (2, parsed(3))]
    for number, batch in batches:
        spool.append(number, batch)
    for number, batch in batches[:committed]:
        store.store_batch(batch, number, 1787000000.0)
    run = collect(proxy, on=open_store())
    run.wait_for_state("waiting")
    assert stored_ids(store) == expected and spool.read() == []
    run.end()
    again = collect(proxy, on=open_store())
    again.wait_for_state("waiting")
    assert stored_ids(store) == expected and store.find_faults() == []


def test_spool_replay_keeps_rejects_and_ignored_in_the_account(collect, proxy, store):
    batch = app.parse_events([event(1), b"{", b'{"refresh":true}'])
    app.Spool(spool_path(store)).append(1, batch)
    run = collect(proxy)
    run.wait_for_state("waiting")
    assert (run.status["events"], run.status["rejected"], run.status["ignored"]) == (1, 1, 1)


def test_spool_read_back_equals_what_was_written(tmp_path):
    spool = app.Spool(tmp_path / "spool")
    batch = app.parse_events([*SAMPLES, *MALFORMED, *ODD_BUT_GOOD, event(7, alias="tiếng Việt\u2028\x85")])
    spool.append(3, batch)
    assert spool.read() == [(3, batch)]


def test_spool_with_a_torn_last_line_gives_the_whole_batches(collect, proxy, store):
    path = spool_path(store)
    app.Spool(path).append(1, parsed(1))
    whole = path.read_bytes()
    app.Spool(path).append(2, parsed(2))
    both = path.read_bytes()
    for length in range(len(whole), len(both) - 1, 7):
        path.write_bytes(both[:length])
        assert [number for number, _ in app.Spool(path).read()] == [1]
    run = collect(proxy)
    run.wait_for_state("waiting")
    assert stored_ids(store) == ["r1"]


def test_spool_with_a_torn_line_takes_the_next_batch_whole(tmp_path):
    # a full disk tears a line, some room is made, and then the power goes
    path = tmp_path / "spool"
    app.Spool(path).append(1, parsed(1))
    path.write_bytes(path.read_bytes()[:-20])
    app.Spool(path).append(2, parsed(2))
    assert app.Spool(path).read() == [(2, parsed(2))]


@pytest.mark.parametrize("content", [b"\n\n\n", b"\x00" * 500, b"garbage", b"0123456789abcdef []\n", b"\xff" * 99])
def test_spool_of_rubbish_does_not_keep_the_collector_from_recording(collect, proxy, store, content):
    spool_path(store).write_bytes(content)
    proxy.push(event(1))
    run = collect(proxy)
    run.wait_for_events(1)


@pytest.mark.parametrize("content", ['[1, {"layout": "new"}]', "[1, [], [], 0]", "{}", "7"])
def test_spool_of_another_version_does_not_end_the_collector(collect, proxy, store, content):
    checksum = hashlib.sha256(content.encode()).hexdigest()[:16]
    spool_path(store).write_text(f"{checksum} {content}\n", encoding="ascii")
    proxy.push(event(1))
    run = collect(proxy)
    run.wait_for_events(1)


def test_spool_is_private_and_dated_while_recording(collect, proxy, store):
    collect(proxy).wait_for_state("waiting")
    path = spool_path(store)
    Watched().wait_for(path.exists)
    assert path.stat().st_mode & 0o777 == 0o600
    assert abs(path.stat().st_mtime - time.time()) < 20


# ---- stopping --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pop", "http", "subscribe"])
def test_stop_under_load_stores_all_that_was_handed_over(collect, open_store, mode):
    with FakeProxy() as proxy:
        run = collect(proxy, collect_mode=mode)
        run.wait_for_state("waiting", "recording")
        for first in range(0, 4000, 100):
            proxy.push(*events(100, first))
            proxy.wait_for(lambda: not any(len(one.outbox) > 100 for one in list(proxy._subscribers)))
            if first == 1500:
                run.stop.set()
        run.thread.join(3)
        assert not run.thread.is_alive()
        run.end()
        if mode != "subscribe":  # what a subscriber is sent while it leaves is in flight
            assert Counter(stored_ids(run.store)) == Counter(ids_of(proxy.handed_over))
        after = collect(proxy, on=open_store())
        after.wait_for(lambda: proxy.queued == 0)
        after.end()
        got = Counter(stored_ids(after.store))
        assert max(got.values()) == 1 and after.store.find_faults() == []


def test_stop_while_the_proxy_stalls_gives_up_when_hurried_and_keeps_what_came(collect, proxy):
    stop = threading.Event()
    run = collect(proxy, stop=stop)
    run.wait_for_state("waiting")
    with proxy.change():
        proxy.push(*events(3))
        proxy.dribble(0.001)
    run.wait_for(lambda: len(proxy.handed_over) == 3)  # two are here whole, the third is on its way
    stop.set()
    proxy.dribble(5.0)
    run.collector.hurry()
    run.thread.join(3)
    alive = run.thread.is_alive()
    proxy.closing.set()
    run.end()
    assert not alive and stored_ids(run.store)[:2] == ["r0", "r1"]


@pytest.mark.parametrize("mode", ["pop", "http", "subscribe"])
def test_stop_in_the_middle_of_an_answer_is_no_fault_of_the_program_when_hurried(collect, proxy, mode):
    run = collect(proxy, collect_mode=mode)
    run.wait_for_state("waiting")
    run.wait_for(lambda: mode != "subscribe" or proxy.subscribers)
    proxy.dribble(60)
    proxy.push(*events(3))
    run.wait_for(lambda: proxy.handed_over)
    run.stop.set()
    run.collector.hurry()
    run.thread.join(5)
    alive = run.thread.is_alive()
    proxy.dribble(0)
    run.end()
    assert not alive and "a fault of its own" not in run.log


@pytest.mark.parametrize("state", ["banned", "wrong_password", "refused"])
def test_stop_while_waiting_ends_at_once(collect, proxy, state):
    if state == "banned":
        proxy.ban()
    if state == "refused":
        proxy.stop_listening()
    run = collect(proxy, stop=threading.Event(), management_password=WRONG)
    run.wait_for_state(state)
    before = time.monotonic()
    run.end()
    assert time.monotonic() - before < 1


COLLECT = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import usage_dashboard as app
config = app.Config(cliproxy_port=int(sys.argv[2]), management_password="secret-key", poll_interval_seconds=0.1)
app.Collector(config, app.Store(Path(sys.argv[3])), app.Log(), threading.Event()).run()
"""


def test_kill_under_load_repeats_nothing_and_loses_only_what_was_in_flight(collect, open_store, store, proxy):
    root = str(Path(app.__file__).parent)
    command = [sys.executable, "-c", COLLECT, root, str(proxy.port), str(store.path)]
    number, kills = 0, []
    for round_number in range(3):
        already = len(proxy.handed_over)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while len(proxy.handed_over) < already + 2500 + 700 * round_number:
                proxy.push(*events(200, number))
                number += 200
                proxy.wait_for(lambda: proxy.queued < 3000)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        proxy.wait_for(lambda: proxy.open_connections == 0)
        kills.append(len(proxy.handed_over))
    run = collect(proxy, on=open_store())
    run.wait_for(lambda: proxy.queued == 0)
    run.end()
    got = stored_ids(run.store)
    handed = ids_of(proxy.handed_over)
    kept = set(got)
    assert len(kept) == len(got)  # nothing twice
    missing = [position for position, one in enumerate(handed) if one not in kept]
    in_flight = [position for kill in kills for position in range(kill - 64, kill)]
    assert set(missing) <= set(in_flight)
    assert run.store.find_faults() == []


# ---- the default ports -----------------------------------------------------------------------------------


@pytest.fixture
def default_ports():
    """Make sure that nobody on this machine uses the two ports of the defaults."""
    for port in (6379, 8317):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port} is taken on this machine")


def redis_at_default(password=None) -> RedisServer:
    server = RedisServer(password)
    server.port = 6379
    return server


def test_default_ports_with_only_a_proxy_take_its_own_port(collect, default_ports):
    with FakeProxy(port=8317) as proxy:
        proxy.push(event(1))
        run = collect()
        run.wait_for_events(1)
        assert run.status["endpoint"] == "127.0.0.1:8317" and "endpoint=127.0.0.1:8317" in run.log
        assert proxy.failures == 0


def test_default_ports_with_nobody_there_name_both(collect, default_ports):
    run = collect()
    run.wait_for_state("refused")
    assert "6379" in run.status["message"] and "8317" in run.status["message"]


@pytest.mark.redis
@pytest.mark.parametrize("password", [None, "another-password"])
def test_default_ports_with_a_foreign_redis_take_the_proxy(collect, default_ports, password):
    with redis_at_default(password), FakeProxy(port=8317) as proxy:
        proxy.push(event(1))
        run = collect()
        run.wait_for_events(1)
        assert run.status["endpoint"] == "127.0.0.1:8317" and proxy.failures == 0


@pytest.mark.redis
def test_default_ports_with_a_redis_that_has_the_list_stay_there(collect, default_ports):
    with redis_at_default() as server, FakeProxy(port=8317) as proxy:
        server.push("usage", event(1))
        run = collect()
        run.wait_for_events(1)
        assert run.status["endpoint"] == "127.0.0.1:6379" and proxy.connections == 0


@pytest.mark.redis
def test_default_ports_with_a_wrong_key_at_the_proxy_behind_a_redis_fail_once(collect, default_ports):
    with redis_at_default() as server, FakeProxy(port=8317) as proxy:
        run = collect(management_password=WRONG)
        proxy.wait_for(lambda: proxy.auth_attempts)
        wait_a_while(run)
        server.stop()
        wait_a_while(run)
        server.start()
        wait_a_while(run)
        assert proxy.failures == 1 and run.state in ("wrong_password", "refused")


def test_default_ports_left_alone_only_by_name_are_not_guessed(collect, default_ports):
    with FakeProxy(port=8317) as proxy:
        run = collect(config_of(cliproxy_host="localhost"))
        run.wait_for_state("refused")
        wait_a_while(run, 3)
        assert proxy.connections == 0
