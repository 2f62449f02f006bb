"""The collector at version 8 and at forks, at proxies that restart or answer oddly, and at lists of other programs."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing

import pytest
from collecting import wait_a_while
from fake_proxy import FakeProxy
from redis_server import OldRedis
from sockets import SocketServer, http_reply
from support import ALWAYS, KEY, payload, payloads

import usage_dashboard as app

pytestmark = pytest.mark.slow
MODES = pytest.mark.parametrize("mode", ["pop", "http", "subscribe"])
V0_CONFIG, V0_SWITCH = "/v0/management/config", "/v0/management/usage-statistics-enabled"
V8_SWITCH = "/v8/management/config/observability/usage/usage-statistics-enabled"


def asked(proxy) -> list[str]:
    """Return the management questions that came, but for polls."""
    paths = [path for _, path in proxy.http_requests if "/management/" in path]
    return [path for path in paths if "queue" not in path]


def outages_of(run) -> list[tuple]:
    return [(one["reason"], one["lost"], one["to"] is None) for one in run.store.outages(ALWAYS, time.time() + 1e6)]


# ---- version 8 and forks ---------------------------------------------------------------------------------


def test_collector_asks_the_tree_that_a_proxy_has_and_tries_the_other_once(collect):
    with FakeProxy(version="v8-alone") as proxy:
        run = collect(proxy, until="waiting")
        run.wait_for(lambda: "/v8/management/credentials" in asked(proxy))
        run.ahead_s = 58.0
        run.wait_for(lambda: V8_SWITCH in asked(proxy))
        assert asked(proxy) == [V0_CONFIG, "/v8/management/config", "/v8/management/credentials", V8_SWITCH]
    with FakeProxy() as proxy:
        proxy.answers.update(dict.fromkeys((V0_CONFIG, V0_SWITCH), http_reply(404, b"", "text/plain")))
        run = collect(proxy, until="waiting")
        assert asked(proxy) == [V0_CONFIG, "/v8/management/config", V0_SWITCH]
        assert (run.status["publishing"], run.status["retention_seconds"]) == (None, None)


@MODES
@pytest.mark.parametrize("how", ["publishing", "off", "cut"])
def test_proxy_is_asked_seldom_and_only_while_nothing_arrives(collect, proxy, mode, how):
    proxy.publishing = how != "off"
    run = collect(proxy, collect_mode=mode, until="publishing_off" if how == "off" else "waiting")
    for second in range(0, 600, 20):
        run.ahead_s = float(second)
        turns, seen, before = run.status["ignored"], len(run.stop.waits), proxy.connections
        if how == "cut":
            proxy.disconnect_all()
            run.wait_for(lambda: proxy.connections > before)
        proxy.refresh()
        run.wait_for(lambda: len(run.stop.waits) > seen + 1 or run.status["ignored"] > turns)
    logins = asked(proxy).count(V0_CONFIG) if how == "cut" and mode == "http" else 0
    assert 9 <= len(asked(proxy)) <= 13 + logins
    if how == "publishing":
        for second in range(600, 900, 40):
            run.ahead_s = float(second)
            count = run.status["events"]
            proxy.push(payload(second))
            run.wait_for(lambda: run.status["events"] > count)
        assert len(asked(proxy)) <= 14


LONG = b"{" + b" " * (5 << 20) + b"}"
ODD = [*((200, body) for body in (b"<html>", b"[1]", b"7", b"null", b'{"observability": 7}', LONG, b"[" * 5000)),
       (302, b""), (500, b"{}"), (204, b""), (599, b"x")]  # fmt: skip


@pytest.mark.parametrize(("path", "state"), [(V0_CONFIG, "wrong_password"), ("/v0/management/usage-queue", "no_queue")])
def test_refusal_with_a_long_page_is_understood_as_one_without(collect, proxy, path, state):
    status = 401 if path == V0_CONFIG else 404
    proxy.answers[path] = http_reply(status, LONG, "text/html")
    run = collect(proxy, collect_mode="http", until=state)
    wait_a_while(run)
    assert run.status["rejected"] == 0 and len(asked(proxy)) < 4


@pytest.mark.parametrize(("usage", "told"), [({}, 900), ({"redis-usage-queue-retention-seconds": 120}, 120), (7, 900)])
def test_setting_of_the_newer_layout_wins_over_the_older(collect, proxy, usage, told):
    config = {"observability": {"usage": usage}, "redis-usage-queue-retention-seconds": 900}
    proxy.answers[V0_CONFIG] = http_reply(200, json.dumps(config).encode(), "application/json")
    assert collect(proxy, until="waiting").status["retention_seconds"] == told


@pytest.mark.parametrize(("status", "body"), ODD)
def test_odd_answers_of_the_management_api_leave_recording_alone(collect, proxy, status, body):
    for path in (V0_CONFIG, V0_SWITCH, "/", "/v8/management/config", V8_SWITCH):
        proxy.answers[path] = http_reply(status, body, "text/html", {"Location": V8_SWITCH})
    run = collect(proxy, until="waiting")
    run.ahead_s = 58.0
    proxy.push(*payloads(3))
    run.wait_for_events(3)
    wait_a_while(run)  # it takes them for a sign that all is well
    assert V8_SWITCH not in asked(proxy) and proxy.auth_attempts == 1
    del proxy.answers[V0_SWITCH]
    proxy.publishing = False
    run.ahead_s = 120.0
    run.wait_for_state("publishing_off")


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"])
def test_management_answer_that_dribbles_is_given_up_in_time(sent):
    class Slow(SocketServer):
        def serve(self, stream):
            stream.fill()
            stream.send(sent)
            while not self.closing.wait(0.05):
                stream.send(b" ")

    with Slow() as server, closing(app.ProxyApi(server.host, server.port, False, KEY, timeout_s=0.4)) as api:
        with pytest.raises(app.QueueFault):
            api.ask(V0_SWITCH)


@MODES
def test_connection_that_is_closed_when_idle_is_opened_again_without_a_word(collect, proxy, mode):
    run = collect(proxy, collect_mode=mode, until="waiting")
    for number in range(1, 4):
        wait_a_while(run, 0 if mode == "subscribe" else 3)
        run.wait_for(lambda: mode != "subscribe" or run.status["ignored"] == number)  # each begins with one
        before, questions = proxy.connections, len(asked(proxy))
        with proxy.change():  # no new connection is among those that are ended
            run.ahead_s = 125.0 * number
            proxy.disconnect_all()
        run.wait_for(lambda: proxy.connections > before)
        assert len(asked(proxy)) <= questions + 3
    run.wait_for(lambda: mode != "subscribe" or proxy.subscribers == 1)
    proxy.push(payload(1))
    run.wait_for_events(1)
    run.wait_for_state("recording")
    assert outages_of(run) == [] and run.log.count("state=") == 2 and proxy.failures == 0


def test_proxy_without_a_queue_is_asked_seldom(collect):
    with FakeProxy(version="no-queue") as proxy:
        run = collect(proxy, until="no_queue")
        wait_a_while(run, 90)
        assert app.STATE_REMEDIES["no_queue"] in run.status["message"] and proxy.failures == 0
        assert sum(run.stop.waits) >= 270 and len(proxy.http_requests) < 8


def test_proxy_that_serves_http_alone_tells_who_has_no_key_that_one_is_missing(collect):
    with FakeProxy(version="v7.1.17") as proxy:
        run = collect(proxy, management_password="", until="no_password")
        wait_a_while(run)
        assert app.STATE_REMEDIES["no_password"] in run.status["message"] and proxy.failures == 0


@pytest.mark.parametrize("key", ["", KEY])
def test_list_of_another_program_is_left_alone_after_twenty_values(collect, key, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}", encoding="utf-8")
    with OldRedis([b"order %d" % number for number in range(100)]) as server:
        run = collect(server, management_password=key, config_path=path, until="foreign_list")
        wait_a_while(run)
        assert (len(server.payloads), run.status["rejected"], server.connections) == (80, 20, 1)
        assert outages_of(run) == [("foreign_list", False, True)]
        os.utime(str(path), (1700000000, 1700000000))
        run.wait_for(lambda: run.status["rejected"] == 40)


def test_list_with_one_record_among_the_first_is_ours(collect):
    with OldRedis([payload(1), *[b"order"] * 99]) as server:
        run = collect(server)
        run.wait_for(lambda: run.accounted == 100)
        assert run.status["rejected"] == 99


# ---- restarts --------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("when", ["at the login", "later"])
def test_collector_that_is_banned_records_again_soon_after_the_proxy_restarted(collect, proxy, mode, when):
    run = collect(proxy, collect_mode=mode, until="waiting") if when == "later" else None
    proxy.ban()
    if run is None:
        run = collect(proxy, collect_mode=mode)
    elif mode != "http":  # where the next poll is told of it
        proxy.disconnect_all()
    run.wait_for_state("banned")
    wait_a_while(run, 10)
    connections = proxy.connections
    wait_a_while(run, 10)
    assert proxy.connections == connections
    proxy.restart()
    before = len(run.stop.waits)
    proxy.push(payload(1))
    run.wait_for_events(1)
    run.wait_for_state("recording")
    assert sum(run.stop.waits[before:]) < 20 and proxy.failures == 0


def test_ban_that_is_told_again_after_its_connection_ended_is_waited_for(collect, proxy):
    proxy.ban()
    run = collect(proxy, until="banned")
    for _ in range(3):
        proxy.disconnect_all()
        wait_a_while(run)
    assert proxy.auth_attempts == 2
    run.end()


CUT, RESTART, TUNNEL = "cut", "restart", "tunnel"


def break_off(run, proxy, how) -> None:
    """End all connections; nobody listens for a moment, unless they are cut alone."""
    before, subscribers = proxy.connections, proxy.subscribers
    if how != CUT:
        proxy.stop_listening()
    proxy.disconnect_all()
    if how != CUT:
        run.wait_for_state("refused")
        if how == RESTART:
            proxy.forget()
        proxy.listen_again()
    run.wait_for(lambda: proxy.connections > before and proxy.subscribers == subscribers)


@MODES
@pytest.mark.parametrize(("how", "quiet_s", "told"), [
    (CUT, 0, []), (TUNNEL, 0, []), (TUNNEL, 300, []),
    (RESTART, 0, [("proxy_restarted", True, False)]), (RESTART, 300, [("proxy_restarted", False, False)]),
])  # fmt: skip
def test_restart_of_the_proxy_is_an_outage_and_a_cut_connection_is_none(collect, proxy, mode, how, quiet_s, told):
    proxy.add_account("00000000000000ab")
    run = collect(proxy, collect_mode=mode, until="waiting")
    proxy.push(*payloads(5))
    run.wait_for_events(5)
    run.wait_for_state("recording")
    run.ahead_s = float(quiet_s)
    break_off(run, proxy, how)
    proxy.push(payload(6))
    run.wait_for_events(6)
    run.wait_for_state("recording")
    assert outages_of(run) == told and proxy.failures == 0


def test_restart_of_a_proxy_that_counts_nothing_shows_by_its_absence(collect):
    with FakeProxy(version="v6.9.38") as proxy:
        run = collect(proxy)
        proxy.push(payload(1))
        run.wait_for_state("recording")
        break_off(run, proxy, RESTART)
        run.wait_for_state("waiting")
        assert outages_of(run) == [("proxy_restarted", True, False)]


def test_restart_of_a_proxy_at_which_nothing_was_recorded_is_no_outage(collect, proxy):
    run = collect(proxy, until="waiting")
    run.ahead_s = 120.0
    break_off(run, proxy, RESTART)
    run.wait_for_state("waiting")
    assert outages_of(run) == []
