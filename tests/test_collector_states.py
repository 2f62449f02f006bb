"""The collector locks nobody out, says why nothing comes, and records what it missed."""

from __future__ import annotations

import json
import os
import time

import pytest
from collecting import CUT, Answering, config_of, wait_a_while
from fake_proxy import FakeProxy
from support import ALWAYS, KEY, NOON, WRONG, free_port, lock, payload

import usage_dashboard as app

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["auto", "pop", "http", "subscribe"])
@pytest.mark.parametrize(("key", "state"), [(WRONG, "wrong_password"), ("", "no_password")])
def test_collector_with_a_wrong_key_fails_once_for_ever(collect, open_store, proxy, key, state, mode):
    for _ in range(3):
        run = collect(proxy, on=open_store(), management_password=key, collect_mode=mode)
        run.wait_for_state(state)
        wait_a_while(run)
        run.end()
    assert proxy.failures == 1 and "management_password" in run.status["message"]
    files = list(run.store.path.parent.glob("usage.db*"))
    assert len(files) > 1 and not any(WRONG.encode() in file.read_bytes() for file in files)


def test_collector_restarted_with_another_key_tries_it_once(collect, open_store, proxy):
    for number, key in enumerate(["wrong-1", "wrong-2", KEY]):
        run = collect(proxy, on=open_store(), management_password=key)
        run.wait_for_state("wrong_password" if key != KEY else "waiting")
        run.end()
        assert proxy.auth_attempts == number + 1


def test_collector_with_a_wrong_key_and_a_locked_database_lives_and_fails_once(collect, store, proxy):
    locker = lock(store)
    run = collect(proxy, management_password=WRONG, until="storage_error")
    assert proxy.connections == 0  # a refusal could not be remembered now
    locker.close()
    run.wait_for_state("wrong_password")
    wait_a_while(run)
    assert proxy.failures == 1


@pytest.mark.parametrize(("mode", "seconds"), [("auto", 1800), ("auto", 59.4), ("http", 300)])
def test_collector_that_is_banned_waits_as_long_as_the_proxy_says(collect, proxy, mode, seconds):
    proxy.ban_seconds = seconds
    proxy.ban()
    started_at = time.time()
    run = collect(proxy, collect_mode=mode, until="banned")
    assert seconds - 5 <= run.status["until"] - started_at <= seconds + 6
    run.wait_for(lambda: proxy.connections > 1)
    run.end()
    assert proxy.connections <= 1 + sum(run.stop.waits) / (seconds - 5)
    assert sum(run.stop.waits) <= proxy.connections * (seconds + 6)


def test_collector_that_is_banned_takes_a_corrected_config_meanwhile(collect, proxy):
    with FakeProxy() as other:
        other.ban()
        current = [other]
        run = collect(other, load=lambda: config_of(current[0]), until="banned")
        current[0] = proxy
        run.wait_for_state("waiting")


@pytest.mark.parametrize(("said", "state", "longest_s"), [
    ("IP banned due to too many failed attempts. Try again in 99999999h0m0s", "banned", 86400),
    ("IP banned due to too many failed attempts. Try again in " + "9" * 5000 + "s", "banned", 1800),
    ("IP banned due to too many failed attempts", "banned", 1800),
    ("this model is banned here", "unreachable", None),
])  # fmt: skip
def test_ban_is_told_by_the_proxys_own_text_and_lasts_a_day_at_most(collect, said, state, longest_s):
    with Answering(b"-ERR " + said.encode() + b"\r\n") as server:
        run = collect(server)
        run.wait_for_state(state)
        until = run.status["until"]
        assert (until and until - time.time() <= longest_s) == (longest_s and True)
        run.end()


HALF_AN_HOUR_S = 1800.0


@pytest.mark.parametrize("mode", ["auto", "http", "subscribe"])
@pytest.mark.parametrize("answer", [b"", b"\x00rubbish\r\n", b"*1\r\n+OK\r\n", *CUT])
def test_login_without_a_sound_answer_goes_out_three_times_in_half_an_hour(collect, open_store, answer, mode):
    with Answering(answer) as server:
        for _ in range(3):  # restarts change nothing
            run = collect(server, on=open_store(), collect_mode=mode)
            wait_a_while(run, waits=25)
            run.end()
        assert server.logins <= 3
        again = collect(server, on=open_store(), collect_mode=mode)
        again.slept_s = HALF_AN_HOUR_S + 60
        wait_a_while(again, waits=25)
        assert server.logins <= 6


def test_setting_the_clock_gives_no_more_logins(collect, open_store):
    with Answering(b"\x00rubbish\r\n") as server:
        for ahead_s in (0.0, 86400.0 * 400, -86400.0 * 400):
            run = collect(server, on=open_store(), ahead_s=ahead_s, collect_mode="pop")
            run.wait_for(lambda: "logins were without a success" in run.status["message"])
            wait_a_while(run)
            run.end()
        assert server.logins == 3


def test_config_file_that_is_touched_often_sends_a_wrong_key_three_times(collect, proxy, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}", encoding="utf-8")
    run = collect(proxy, management_password=WRONG, config_path=path)
    for number in range(8):
        run.wait_for(lambda: proxy.failures >= min(number + 1, 3))
        wait_a_while(run)
        os.utime(str(path), (1700000000, 1700000000 + number))
    wait_a_while(run)
    assert proxy.failures == 3 and "the next goes out at" in run.status["message"]
    run.slept_s = HALF_AN_HOUR_S + 60
    run.wait_for(lambda: proxy.failures == 4)
    wait_a_while(run)
    assert proxy.failures == 4


def test_logins_that_succeed_are_not_limited(collect, proxy):
    run = collect(proxy)
    for number in range(1, 8):
        run.wait_for(lambda: proxy.auth_attempts == number and run.state == "waiting")
        proxy.disconnect_all()
    run.wait_for(lambda: proxy.auth_attempts == 8)


def test_collector_with_nobody_there_is_unreachable_and_backs_off_doubling(collect):
    run = collect(config_of(cliproxy_port=free_port()))
    run.wait_for(lambda: len(run.stop.waits) >= 9)
    assert run.state == "refused"
    for wait, full in zip(run.stop.waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]):
        assert full * 0.75 <= wait <= full


def test_collector_whose_queue_key_is_unknown_says_so_and_backs_off_doubling(collect, proxy):
    run = collect(proxy, queue_key="queue")
    run.wait_for(lambda: len(run.stop.waits) >= 5)
    assert "does not know this queue_key" in run.log and "state=wrong_queue_key" in run.log
    assert run.stop.waits[4] >= 12  # each login costs the proxy a bcrypt: 1, 2, 4, 8, 16


REFUSING = [  # the state, the proxy, the config, and what makes it well
    ("wrong_password", {}, {"management_password": WRONG}, {}),
    ("not_resp", {"answer_http_only": True}, {"collect_mode": "pop"}, {"answer_http_only": False}),
    ("closed", {"management": False}, {}, {"management": True}),
    ("closed", {"management": False}, {"collect_mode": "http"}, {"management": True}),
    ("closed", {"key": ""}, {"management_password": KEY}, {"key": KEY}),
    ("home_mode", {"home_mode": True}, {}, {"home_mode": False}),
    ("closed", {"home_mode": True, "version": "v7.1.16"}, {}, {"home_mode": False}),
    ("publishing_off", {"publishing": False}, {}, {}),
    ("remote_disabled", {"allow_remote": False, "seen_from": "10.0.0.9"}, {}, {"allow_remote": True}),
    ("wrong_queue_key", {}, {"queue_key": "queue"}, {}),
    ("example_keys", {"example_page": True}, {}, {}),
    *[("example_keys", {"example_page": True, "answer_http_only": True, "management": False}, here,
       {"example_page": False, "answer_http_only": False, "management": True})
      for here in ({}, {"collect_mode": "http"}, {"collect_mode": "subscribe"})],
]


@pytest.mark.parametrize("mode", ["pop", "subscribe"])
@pytest.mark.parametrize("reply", [b"HTTP/1.0 400 Bad request\r\n\r\n", b"HTTP/1.0 400 Bad request\n\n", b"<html>\n"])
def test_web_server_of_any_age_is_not_resp_and_costs_no_login(collect, reply, mode):
    with Answering(reply, closes=True) as server:
        run = collect(config_of(cliproxy_port=server.port, management_password=KEY, collect_mode=mode))
        run.wait_for(lambda: server.connections >= 12)
        assert run.state == "not_resp" and app.STATE_REMEDIES["not_resp"] in run.status["message"]


@pytest.mark.parametrize(("state", "there", "here", "cure"), REFUSING)
def test_collector_that_is_refused_shows_a_remedy_once_never_the_key_and_goes_on(collect, state, there, here, cure):
    with FakeProxy(version=there.get("version", "v7.2.140"), key="Key-Of-The-Owner-77") as proxy:
        for name, value in there.items():
            setattr(proxy, name, value)
        run = collect(proxy, **{"management_password": proxy.key, **here})
        run.wait_for_state(state)
        wait_a_while(run, 20)
        said = json.dumps(run.status) + run.log
        assert "Key-Of-The-Owner-77" not in said and WRONG not in said
        assert app.STATE_REMEDIES[state] in run.status["message"] and run.log.count(f"state={state} ") == 1
        assert proxy.failures == (state == "wrong_password")
        for name, value in cure.items():
            setattr(proxy, name, value)
        run.wait_for_state("waiting" if cure else state)


def test_collector_on_a_proxy_that_publishes_nothing_notes_a_loss_until_it_does(collect, proxy, store):
    proxy.publishing = False
    run = collect(proxy, until="publishing_off")
    asked = len(proxy.http_requests)
    wait_a_while(run)
    assert len(proxy.http_requests) == asked
    assert "usage-statistics-enabled: true" in run.status["message"] and run.status["publishing"] is False
    shown = [(outage["reason"], outage["to"], outage["lost"]) for outage in store.outages(ALWAYS, time.time())]
    assert shown == [("publishing_off", None, True)]
    proxy.publishing = True
    run.ahead_s = 58.0
    run.wait_for_state("waiting")  # without any event
    (outage,) = store.outages(ALWAYS, time.time())
    assert outage["lost"] and 57 <= outage["to"] - outage["from"] <= 120 and run.status["publishing"] is True


@pytest.mark.parametrize(("version", "setting", "learnt"), [
    ("v7.2.140", 3600, 3600), ("v7.2.140", 90000, 3600), ("v7.2.140", 0, 60), ("v6.9.38", 900, 60),
])  # fmt: skip
def test_collector_learns_how_long_the_proxy_remembers(collect, store, version, setting, learnt):
    with FakeProxy(version=version) as proxy:
        proxy.retention_seconds = setting
        store.put_meta("retention_s", 1e9)  # as after a Redis, which forgets nothing
        run = collect(proxy, until="waiting")
        assert (run.status["retention_seconds"], run.status["warning"]) == (learnt, None)
        assert run.store.get_meta("retention_s") == learnt
        assert proxy.failures == 0 and "sk-client-secret" not in run.log + repr(run.status)


def test_collector_that_asks_more_rarely_than_the_proxy_remembers_warns_once(collect, proxy):
    proxy.retention_seconds = 60
    run = collect(proxy, poll_interval_seconds=50, until="waiting")
    assert run.status["warning"] == "retention_short"
    proxy.disconnect_all()
    run.wait_for(lambda: proxy.auth_attempts == 2)
    run.wait_for_state("waiting")
    assert run.log.count("warning=") == 1 and "redis-usage-queue-retention-seconds: 3600" in run.log


def test_collector_whose_machine_slept_notes_the_night_as_stopped(collect, proxy, store):
    run = collect(proxy, until="waiting")
    wait_a_while(run)
    proxy.push(payload(1, timestamp=app.utc_text(time.time() + 8 * 3600)))  # popped in its first turn, perhaps
    run.slept_s = 8 * 3600.0
    run.wait_for(lambda: any(one["to"] for one in store.outages(ALWAYS, time.time())))
    (outage,) = store.outages(ALWAYS, time.time())
    assert (outage["reason"], outage["lost"]) == ("stopped", True)
    assert 8 * 3600 - 5 <= outage["to"] - outage["from"] <= 8 * 3600 + 60


def test_night_in_which_the_proxy_publishes_nothing_either_is_one_outage(store):
    now = NOON
    outages = app.OutageLog(store, 2.0, lambda: now, lambda: now)
    for publishing, seconds in ((False, 8 * 3600), (False, 10), (True, 0)):
        outages.turn(publishing)
        now += seconds
    told = {"from": NOON, "to": NOON + 8 * 3600 + 10, "reason": "publishing_off", "lost": True}
    assert store.outages(ALWAYS, now) == [told]


@pytest.mark.parametrize("ahead_s", [8 * 3600.0, -86400.0 * 400])
def test_collector_whose_clock_was_set_notes_no_outage_and_waits_as_before(collect, proxy, store, ahead_s):
    run = collect(proxy, until="waiting")
    wait_a_while(run)
    run.ahead_s = ahead_s
    proxy.push(payload(1))
    run.wait_for_events(1)
    wait_a_while(run)
    assert store.outages(ALWAYS, time.time()) == [] and min(run.stop.waits) > 0


def test_collector_whose_api_fails_once_does_not_take_a_proxy_for_silent_for_ever(collect, proxy, store):
    proxy.publishing = False
    run = collect(proxy, until="publishing_off")
    proxy.ban()  # over HTTP alone, as behind a reverse proxy that forwards another address
    asked = len(proxy.http_requests)
    run.ahead_s = 58.0
    run.wait_for(lambda: len(proxy.http_requests) > asked)
    proxy.publishing = True
    proxy.push(payload(1))
    run.wait_for_state("recording")
    assert [outage["to"] is not None for outage in store.outages(ALWAYS, time.time())] == [True]


def test_collector_is_not_misled_by_what_was_left_in_the_queue_before_publishing_ended(collect, proxy):
    proxy.push(payload(1), payload(2))
    proxy.publishing = False
    run = collect(proxy, stored=2)
    run.wait_for_state("publishing_off")
    run.ahead_s = 3.0
    wait_a_while(run)
    assert run.state == "publishing_off"


SHUT_OUT = {
    "refused": (FakeProxy.stop_listening, FakeProxy.listen_again), "banned": (FakeProxy.ban, FakeProxy.lift_ban),
    "closed": [lambda it, is_open=is_open: setattr(it, "management", is_open) for is_open in (False, True)],
}  # fmt: skip


@pytest.mark.parametrize("was_connected", [False, True])
@pytest.mark.parametrize("reason", SHUT_OUT)
def test_collector_that_is_shut_out_notes_the_outage_with_its_reason(collect, proxy, store, reason, was_connected):
    run = collect(proxy, until="waiting") if was_connected else None
    shut_out, let_in = SHUT_OUT[reason]
    shut_out(proxy)
    proxy.disconnect_all()
    run = run or collect(proxy)
    run.wait_for_state(reason)
    wait_a_while(run, 20 if reason == "refused" else 1)  # being away for long uses up no login
    told = {reason, "unreachable"} if was_connected else {reason}  # the first of them
    (outage,) = store.outages(ALWAYS, time.time())
    assert outage["reason"] in told and outage["to"] is None
    with proxy.change():  # nobody logs in meanwhile
        run.slept_s = 2000.0  # its three logins may be used by now
        let_in(proxy)
        proxy.push(payload(1))
    run.wait_for_state("recording")
    (outage,) = store.outages(ALWAYS, time.time())
    assert outage["reason"] in told and 1990 <= outage["to"] - outage["from"] <= 2100


@pytest.mark.parametrize("locked_at_first", [False, True])
def test_collector_that_did_not_run_notes_the_outage_as_stopped(collect, open_store, store, proxy, locked_at_first):
    collect(proxy).end()
    run = collect(proxy, ahead_s=7200, until="waiting")
    assert run.store.outages(ALWAYS, time.time()) == []  # it was never connected before
    run.end()
    locker = lock(store) if locked_at_first else None
    again = collect(proxy, on=open_store(), ahead_s=10800)
    if locker:
        again.wait_for_state("storage_error")
        locker.close()
    again.wait_for_state("waiting")
    (outage,) = again.store.outages(ALWAYS, time.time())
    assert outage["reason"] == "stopped" and 3590 <= outage["to"] - outage["from"] <= 3700


YEAR_S = 365 * 86400.0


def new_payload(number):
    return payload(number, timestamp=app.utc_text(time.time()))


@pytest.mark.parametrize("ahead_s", [YEAR_S, -86000.0])
def test_start_with_a_wrong_clock_leaves_no_outage_over_hours_with_data(collect, open_store, proxy, ahead_s):
    before = collect(proxy, until="waiting")
    before.end()
    run = collect(proxy, on=open_store(), ahead_s=ahead_s, until="waiting")
    proxy.push(*map(new_payload, range(5)))
    run.wait_for_events(5)
    run.ahead_s = 0.0  # it is set meanwhile
    asked = len(run.stop.waits)
    run.wait_for(lambda: len(run.stop.waits) > asked + 5)
    for outage in run.store.outages(ALWAYS, time.time()):
        assert outage["to"] <= time.time() and outage["to"] - outage["from"] < 60
    assert run.store.event_count == 5
