"""The collector at every kind of queue."""

from __future__ import annotations

import socket
import ssl
import time
from collections import Counter
from contextlib import closing, nullcontext

import pytest
from collecting import config_of, wait_a_while
from fake_proxy import FakeProxy
from redis_server import OldRedis, RedisServer
from support import DATA, EXPECTED_SAMPLES, KEY, SAMPLES, WRONG, ids_of, lock, payload, payloads, rows, stored_ids

import usage_dashboard as app


def assert_samples(run, greetings=0) -> None:
    """Wait until every sample is stored, but for a warm-up, which is ignored as a greeting of the queue is."""
    run.wait_for(lambda: run.accounted >= len(SAMPLES) + greetings)
    names = "timestamp, model, input_tokens, output_tokens, reasoning_tokens, total_tokens"
    assert rows(run.store.path, f"SELECT {names} FROM events ORDER BY timestamp") == sorted(
        (at, model, input, output, reasoning, total)
        for at, _, model, input, output, reasoning, _, _, total in EXPECTED_SAMPLES
    )
    assert [run.status[name] for name in ("events", "rejected", "ignored")] == [7, 0, 1 + greetings]
    assert run.store.find_faults() == []


RELEASES = {
    "auto": "v6.9.38 v6.10.8 v7.0.2 v7.1.17 v7.2.140 v8.0.47 v8-alone http-only behind-http resp-only newest-first "
            "keeps-published",
    "pop": "v7.2.140 v8.0.47 v8-alone resp-only newest-first keeps-published",
    "http": "v6.10.8 v7.1.17 v7.2.140 v8.0.47 v8-alone http-only newest-first keeps-published",
    "subscribe": "v7.0.7 v7.1.39 v7.2.140 v8.0.47 v8-alone resp-only newest-first keeps-published",
}  # fmt: skip


@pytest.mark.parametrize(("mode", "version"), [(mode, tag) for mode, tags in RELEASES.items() for tag in tags.split()])
def test_collector_on_each_release_and_mode_stores_the_samples(collect, mode, version):
    with FakeProxy(version=version) as proxy:
        used = mode if mode != "auto" else "pop" if proxy.dialect.resp and proxy.dialect.sniffs_resp else "http"
        proxy.push(*SAMPLES)
        run = collect(proxy, collect_mode=mode)
        # a subscription to a newer proxy begins with a control message
        assert_samples(run, greetings=int(mode == "subscribe" and proxy.dialect.control_messages))
        assert (run.status["mode"], run.status["publishing"], run.status["proxy_version"]) == (used, True, proxy.version)
        assert run.status["retention_seconds"] == 60
        assert (proxy.failures, proxy.lost, proxy.queued) == (0, [], 0)


@pytest.mark.parametrize(("version", "mode", "state", "said"), [
    ("v6.9.38", "http", "no_queue", "older than v6.10.8"),
    ("v6.10.7", "http", "no_queue", "older than v6.10.8"),
    ("v7.1.17", "pop", "not_resp", "does not serve its queue over RESP"),
    ("v7.1.17", "subscribe", "not_resp", "does not serve its queue over RESP"),
    ("v6.9.38", "subscribe", "not_resp", '"collect_mode": "auto"'),
    ("v7.0.6", "subscribe", "not_resp", '"collect_mode": "auto"'),
    *[("http-only", mode, "not_resp", "") for mode in ("pop", "subscribe")], ("resp-only", "http", "no_queue", ""),
    *[("no-queue", mode, "not_resp", "") for mode in ("pop", "subscribe")],
    *[("no-queue", mode, "no_queue", "") for mode in ("auto", "http")],
])  # fmt: skip
def test_collector_in_a_mode_that_a_release_lacks_says_so_and_takes_nothing(collect, version, mode, state, said):
    with FakeProxy(version=version) as proxy:
        proxy.push(*SAMPLES)
        run = collect(proxy, collect_mode=mode)
        run.wait_for_state(state)
        assert (said or app.STATE_REMEDIES[state]) in run.status["message"]
        wait_a_while(run, 3)
        assert (proxy.failures, proxy.queued) == (0, len(SAMPLES))


@pytest.mark.parametrize("mode", ["auto", "http"])
@pytest.mark.parametrize("version", ["v6.10.8", "v7.0.2"])
def test_collector_on_a_proxy_that_an_idle_connection_freezes_keeps_it_free(collect, version, mode):
    with FakeProxy(version=version) as proxy:
        run = collect(proxy, collect_mode=mode, until="waiting")
        for _ in range(3):  # others get in, and are answered
            with socket.create_connection((proxy.host, proxy.port), timeout=10) as other:
                other.sendall(b"*0\r\n")
                assert other.recv(100) == b"-ERR empty command\r\n"
        wait_a_while(run, 3)


@pytest.mark.parametrize("key", ["", KEY])
def test_collector_on_a_redis_that_knows_no_count_stores(collect, key):
    with OldRedis([*SAMPLES, *payloads(300)]) as server:
        run = collect(server, management_password=key, stored=307)
        assert server.connections == 1 and stored_ids(run.store)[7:] == [f"r{number}" for number in range(300)]


def test_collector_on_a_proxy_sends_auth_first_keeps_its_connection_and_reports_it_all(collect, proxy):
    run = collect(proxy)
    for number, sample in enumerate(SAMPLES, start=1):
        proxy.push(sample)
        run.wait_for(lambda number=number: run.accounted == number)
    run.wait_for_state("recording")
    run.wait_for(lambda: proxy.open_connections == 1)
    status = run.status
    assert proxy.commands[0] == "AUTH" and proxy.auth_attempts == 1
    assert not {"PING", "HELLO", "CLIENT", "SELECT"} & set(proxy.commands)
    assert (status["proxy_version"], status["publishing"]) == ("v7.2.140", True)
    assert status["endpoint"] == f"127.0.0.1:{proxy.port}"
    assert status["last_event"] == pytest.approx(1787404065.90213)  # 2026-08-22T21:07:45.90213+08:00
    run.end()


def test_collector_on_a_long_queue_follows_full_batches_at_once_and_waits_the_interval_when_it_is_idle(collect, proxy):
    proxy.push(*payloads(3000))
    run = collect(proxy, poll_interval_seconds=7.5, stored=3000)
    run.wait_for(lambda: run.stop.waits.count(7.5) >= 3)
    assert set(run.stop.waits) == {7.5} and ids_of(proxy.handed_over) == stored_ids(run.store)
    assert run.store.find_faults() == []


@pytest.mark.redis
@pytest.mark.parametrize(("password", "key"), [(None, ""), (None, KEY), (KEY, KEY)])
def test_collector_on_a_redis_stores_and_never_asks_http(collect, password, key):
    with RedisServer(password) as server:
        server.push("usage", *SAMPLES)
        run = collect(server, management_password=key)
        assert_samples(run)
        # one connection is the fixture's; a question over HTTP would be a third
        assert "total_connections_received:2\r\n" in server.command("INFO", "stats").decode()
        assert (run.status["mode"], run.status["publishing"], run.status["proxy_version"]) == ("pop", None, None)
        assert run.store.get_meta("retention_s") > 3600 and run.status["retention_seconds"] is None


def test_collector_on_a_redis_pops_only_its_own_list(collect, redis_server):
    redis_server.push("usage", payload(1))
    redis_server.push("mine", payload(2))
    run = collect(redis_server, queue_key="mine", stored=1)
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
    run.wait_for_state("wrong_queue_key", "refused")
    assert "no list" in run.status["message"] and redis_server.command("GET", "usage") == b"text"


@pytest.mark.parametrize(("mode", "key"), [("pop", KEY), ("subscribe", KEY), ("auto", "")])
def test_collector_behind_a_reverse_proxy_that_may_not_ask_over_http_asks_nothing(collect, proxy, mode, key):
    proxy.answer_http_only = True
    collect(proxy, collect_mode=mode, management_password=key, until="not_resp")
    assert proxy.failures == 0 and {target for _, target in proxy.http_requests} == {"/"}


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


@pytest.mark.parametrize(("tls_there", "tls_here"), [(True, False), (False, True), (True, True)])
def test_collector_with_the_wrong_tls_is_closed_and_told_what_to_set(collect, monkeypatch, tls_there, tls_here):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)  # so the certificate is of nobody known
    with FakeProxy(tls=server_tls() if tls_there else None) as proxy:
        run = collect(proxy, cliproxy_tls=tls_here, until="closed")
        wanted = "SSL_CERT_FILE=" if tls_there and tls_here else "cliproxy_tls"
        assert wanted in run.status["message"]
        run.end()


def test_collector_that_subscribes_drains_the_queue_of_each_gap_and_ignores_control_messages(collect, proxy):
    proxy.push(payload(1))
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1 and run.status["events"] == 1)
    proxy.stop_listening()
    proxy.disconnect_all()
    proxy.wait_for(lambda: proxy.subscribers == 0)
    proxy.push(payload(2), payload(3))
    assert proxy.queued == 2
    proxy.listen_again()
    run.wait_for_events(3)
    proxy.wait_for(lambda: proxy.subscribers == 1)
    proxy.refresh()
    proxy.push(payload(4))
    run.wait_for_events(4)
    assert run.status["ignored"] == 3  # each subscription begins with one
    assert (stored_ids(run.store), proxy.lost, proxy.failures) == (["r1", "r2", "r3", "r4"], [], 0)


def test_collector_that_subscribes_stores_all_it_heard_before_the_stop(collect, open_store, store, proxy):
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1 and run.status["ignored"] == 1)
    with closing(lock(store)):
        for first in range(0, 1200, 50):
            proxy.push(*payloads(50, first))
            proxy.wait_for(lambda: not any(one.outbox for one in proxy._subscribers))
        run.wait_for_state("storage_error")
    run.end()
    after = collect(proxy, on=open_store())
    after.wait_for_state("waiting", "recording")
    assert len(proxy.handed_over) == 1200 and stored_ids(after.store) == ids_of(proxy.handed_over)


def test_collector_that_subscribes_keeps_what_it_heard_while_the_session_ended(collect, open_store, proxy):
    run = collect(proxy, on=open_store(2.0), collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1 and run.state == "waiting")
    locker = lock(run.store)
    run.slept_s = 1000.0  # a sleep that is to be noted as an outage, and cannot be
    run.wait_for(lambda: run.woken)
    proxy.push(*payloads(50))  # heard while it waits for the lock
    run.wait_for_state("storage_error")
    locker.close()
    run.wait_for_events(50)
    assert stored_ids(run.store) == ids_of(proxy.handed_over)


def test_collector_that_subscribes_and_is_too_slow_loses_only_what_the_proxy_threw_away(collect, proxy):
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: proxy.subscribers == 1)
    run.wait_for_state("waiting")
    proxy.push(*payloads(3000))
    run.wait_for(lambda: run.status["events"] == 3000 - len(proxy.lost))
    assert len(proxy.lost) == 1 and proxy.queued == 0
    assert Counter(stored_ids(run.store)) == Counter(ids_of(proxy.handed_over))


@pytest.mark.parametrize("changes", [{}, {"execution_id": "0d3c1c5e-1111"}])
def test_what_a_fork_published_and_queued_as_well_is_stored_once(collect, changes):
    with FakeProxy(version="keeps-published") as proxy:
        run = collect(proxy, collect_mode="subscribe", until="waiting")
        proxy.push(payload(1, **changes), payload(2))
        run.wait_for_events(2)
        proxy.disconnect_all()
        run.wait_for(lambda: run.accounted >= 2 + 2 + 2)  # and a control message for each subscription
        assert (proxy.queued, stored_ids(run.store)) == (0, ["r1", "r2"])


def test_collector_that_subscribes_to_a_proxy_that_publishes_nothing_says_so(collect, proxy):
    proxy.publishing = False
    run = collect(proxy, collect_mode="subscribe")
    run.wait_for(lambda: run.status["ignored"] == 1)  # the control message, which is no usage
    turned = time.monotonic() + 0.3  # a subscriber waits without the stop event
    run.wait_for(lambda: time.monotonic() > turned)
    assert (run.state, run.status["publishing"]) == ("publishing_off", False)


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


def test_default_ports_with_nobody_there_name_both(collect, default_ports):
    run = collect(until="refused")
    assert "6379" in run.status["message"] and "8317" in run.status["message"]


A_REDIS = pytest.mark.redis


@pytest.mark.parametrize("there", [None, *(pytest.param(key, marks=A_REDIS) for key in ("", "another-password"))])
def test_default_ports_with_no_redis_or_a_foreign_one_take_the_proxy(collect, default_ports, there):
    with RedisServer(there or None, 6379) if there is not None else nullcontext(), FakeProxy(port=8317) as proxy:
        proxy.push(payload(1))
        run = collect(stored=1)
        run.wait_for(lambda: "endpoint=127.0.0.1:8317" in run.log)
        assert (run.status["endpoint"], proxy.failures) == ("127.0.0.1:8317", 0)


@pytest.mark.redis
def test_default_ports_with_a_redis_that_has_the_list_stay_there(collect, default_ports):
    with RedisServer(port=6379) as server, FakeProxy(port=8317) as proxy:
        server.push("usage", payload(1))
        run = collect(stored=1)
        assert run.status["endpoint"] == "127.0.0.1:6379" and proxy.connections == 0


@pytest.mark.redis
def test_default_ports_with_a_wrong_key_at_the_proxy_behind_a_redis_fail_once(collect, default_ports):
    with RedisServer(port=6379) as server, FakeProxy(port=8317) as proxy:
        run = collect(management_password=WRONG)
        proxy.wait_for(lambda: proxy.auth_attempts)
        wait_a_while(run)
        server.stop()
        wait_a_while(run)
        server.start()
        wait_a_while(run)
        assert proxy.failures == 1 and run.state in ("wrong_password", "refused")


@pytest.mark.parametrize("mode", ["auto", "http"])
def test_default_ports_with_a_proxy_that_refuses_the_key_at_the_first_never_send_it_to_the_other(
    collect, default_ports, mode
):
    with FakeProxy(port=6379) as proxy, FakeProxy(port=8317) as same:
        run = collect(management_password=WRONG, collect_mode=mode, until="wrong_password")
        wait_a_while(run, 3)
        assert (proxy.failures, same.connections) == (1, 0)


def test_default_ports_left_alone_only_by_name_are_not_guessed(collect, default_ports):
    with FakeProxy(port=8317) as proxy:
        run = collect(config_of(cliproxy_host="localhost"), until="refused")
        wait_a_while(run, 3)
        assert proxy.connections == 0
