"""Another program that takes records off the queue is noticed by the proxy's own counters, and little else is."""

from __future__ import annotations

import contextlib
import json
import math
from contextlib import closing
from dataclasses import replace

import pytest
from collecting import QuickStop
from fake_proxy import FakeProxy
from sockets import http_reply
from support import KEY, payload

import usage_dashboard as app

pytestmark = pytest.mark.slow

ACCOUNT, CLAUDE, UPSTREAM = "00000000000000ab", "00000000000000cd", "sk-or-upstream-key-0001"
FAILED = {"fail": {"status_code": 429, "body": ""}, "failed": True}
ONE = {"execution_id": "one", **FAILED}
LEFT = {"fail": {"status_code": 499, "body": "context canceled"}, "failed": True}
LEFT_500 = {"fail": {"status_code": 500, "body": "context canceled"}, "failed": True}  # before v7.2.124
ACCOUNTS, KEYS = "/v0/management/auth-files", "/v0/management/api-key-usage"
V8 = "/v8/management/credentials"


class Hours:
    """A collector at a proxy, and what the proxy serves while hours go by, in steps that are no gap."""

    def __init__(self, collect, proxy, step_s=80.0, **keys):
        self.proxy, self.number, self.step_s, self.has_told = proxy, 0, step_s, False
        self.subscribes = keys.get("collect_mode") == "subscribe"
        proxy.retention_seconds = 3600
        proxy.add_account(ACCOUNT, email="owner@example.org", path="/root/codex-owner.json")
        proxy.add_account(CLAUDE, type="claude")
        proxy.add_key(UPSTREAM, "my-router")
        self.start = lambda: collect(proxy, QuickStop(0.001), until="waiting", **{"poll_interval_seconds": 60, **keys})
        self.run = self.start()
        self.read()

    def pass_time(self, *steps_s):
        self.turn()  # which takes what was sent
        for step_s in steps_s:
            self.run.slept_s += step_s
            self.turn()
            self.has_told |= self.rival is not None

    def turn(self):
        """Let the turn that has begun come to its end, and another one as well."""
        for _ in range(2):
            turns = self._turns
            self.proxy.refresh()
            self.run.wait_for(lambda: self._turns > turns)

    @property
    def _turns(self):
        return self.run.status["ignored"] if self.subscribes else len(self.run.stop.waits)

    def read(self, times=1):
        """Let the counters be read, and compared when the records must have come."""
        self.pass_time(*[self.step_s] * (int(600 // self.step_s) + 3) * times)

    def send(self, count=10, counted=True, **changes):
        for _ in range(count):
            self.number += 1
            self.proxy.push(payload(self.number, **{"auth_index": ACCOUNT, **changes}), counted=counted)

    def lose(self, credential=ACCOUNT, **counts):
        """Count attempts that make no record, or whose records go elsewhere."""
        self.proxy.count(credential, **counts)

    def reconnect(self, end):
        logins = self.proxy.auth_attempts
        end()
        self.run.wait_for(lambda: self.proxy.auth_attempts > logins and self.run.state == "waiting")

    def restart(self):
        self.run.end()
        self.lose(failed=10)
        self.run = self.start()

    def lose_connection(self):
        self.lose(failed=10)
        self.send(1)
        self.pass_time(0.0)  # it has just recorded, so this is no end of an idle connection
        self.reconnect(self.proxy.disconnect_all)

    def come_late(self):
        asked = len(self.proxy.http_requests)
        self.lose(failed=10)
        while ("GET", ACCOUNTS) not in self.proxy.http_requests[asked:]:
            self.pass_time(self.step_s)
        self.send(10, counted=False, **FAILED)

    def begin_anew(self, failed):
        self.proxy.add_account(ACCOUNT)
        self.lose(failed=failed)

    def switch_off(self, steps):
        self.pass_time(*[self.step_s] * steps)
        self.send(1)
        self.pass_time(0.0)  # it is not asked for a while
        self.proxy.publishing = False
        self.lose(failed=10)
        self.read()
        assert self.run.state == "publishing_off"
        self.proxy.publishing = True

    @property
    def rival(self):
        return self.run.status["rival"]

    @property
    def questions(self):
        return [path for _, path in self.proxy.http_requests if "/management/" in path and "queue" not in path]

    @property
    def asked(self):
        return [path for path in self.questions if path in (ACCOUNTS, KEYS, V8)]


@pytest.fixture
def hours(collect, proxy):
    return Hours(collect, proxy)


# What happens in each of four readings, by its number. In each the counters or the records are ahead.
QUIET = {
    "requests": lambda it, n: (it.send(), it.send(**FAILED)),
    "retries": lambda it, n: (it.send(9, request_id="one", **FAILED), it.send(1, request_id="one")),
    "keys": lambda it, n: it.send(auth_index="00000000000000ef", source=UPSTREAM, **FAILED),
    "a key that clients use too": lambda it, n: it.send(auth_index="", source=UPSTREAM, api_key=UPSTREAM, **FAILED)
    or it.lose(UPSTREAM, failed=0),
    "image tool": lambda it, n: (it.send(5), it.send(5, model="gpt-image-2", counted=False)),
    "client left": lambda it, n: it.send(9, counted=False, **LEFT),
    "client left, as old proxies tell it": lambda it, n: it.send(9, counted=False, **LEFT_500),
    "records that come twice": lambda it, n: (it.send(1, counted=n == 0, **ONE), it.send(9, counted=False, **ONE)),
    "warm-ups": lambda it, n: it.send(generate=False),
    "rejected": lambda it, n: it.send(model=["x"], **FAILED),
    "burst of count_tokens": lambda it, n: it.lose(success=200 * (n == 1)),
    "count_tokens": lambda it, n: (it.lose(success=50), it.send(1)),
    "count_tokens refused": lambda it, n: (it.lose(CLAUDE, failed=9), it.send(1)),
    "late": lambda it, n: it.come_late(),
    "proxy restarts": lambda it, n: (it.lose(failed=10), it.reconnect(it.proxy.restart), it.lose(failed=2)),
    "counters begin anew": lambda it, n: it.send(60, **FAILED) if n == 0 else it.begin_anew(10 - n),
    "statistics off": lambda it, n: it.switch_off(steps=2 + n),
    "restart": lambda it, n: it.restart(),
    "lost connection": lambda it, n: it.lose_connection(),
    "gap": lambda it, n: (it.lose(failed=10), it.pass_time(500.0)),
    "a few are lost": lambda it, n: (it.lose(failed=3 if n else 2), it.send(27 if n else 4, **FAILED)),
}


@pytest.mark.parametrize("name", QUIET)
def test_what_is_no_rival_is_not_taken_for_one(hours, name):
    for number in range(4):
        QUIET[name](hours, number)
        hours.read()
        assert not hours.has_told
    hours.read()
    hours.lose(failed=60)  # which is one
    hours.read()
    assert hours.rival["expected"] - hours.rival["received"] >= 50


# ---- a rival ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logged_in(proxy):
    with closing(app.RespClient(lambda: app.connect_tcp(proxy.host, proxy.port))) as client:
        assert client.call("AUTH", KEY) == "OK"
        yield client


def test_second_subscriber_that_takes_all_is_noticed_until_the_records_come_again(hours):
    hours.send(5)
    hours.read()
    began = hours.run._clock()
    with logged_in(hours.proxy) as client:
        client.call("SUBSCRIBE", "usage")
        for number in range(3):
            assert hours.rival is None  # not before it has grown in three readings
            hours.send(4 + number)
            hours.read()
        assert (hours.rival["expected"], hours.rival["received"]) == (15, 0)
        assert began - 1300 < hours.rival["since"] <= began
        hours.send(12)
        hours.read(3)
        assert hours.rival["expected"] >= 15
    hours.proxy.wait_for(lambda: not hours.proxy.subscribers)
    for _ in range(2):
        hours.lose(success=15)  # count_tokens
        hours.send(20)
        hours.read()
    assert hours.rival is None


@pytest.mark.parametrize("source", [{}, {"auth_index": "", "source": UPSTREAM}])
def test_second_popper_that_takes_a_part_is_noticed_by_failures_until_they_are_even(hours, source):
    hours.send(7)
    hours.send(4, **FAILED, **source)
    hours.send(1, **ONE, **source)
    hours.read()
    taken = number = 0
    with logged_in(hours.proxy) as client:
        while taken < 12:
            number += 1
            hours.send(1, **FAILED, **source)
            taken += client.call("RPOP", "usage") is not None
    hours.send(5, counted=False, **LEFT)  # hides nothing
    hours.send(5, counted=False, **LEFT_500)
    hours.send(9, counted=False, **ONE, **source)
    hours.send(5, model="gpt-image-2", counted=False)
    hours.read()
    assert (hours.rival["expected"], hours.rival["received"]) == (number, number - taken)
    hours.send(4, **FAILED, **source)
    hours.read()
    assert hours.rival  # too few to tell
    hours.send(4, **FAILED, **source)
    hours.read()
    assert hours.rival is None


def test_rival_is_noticed_over_connections_that_end_because_they_are_idle(hours):
    for _ in range(3):
        hours.lose(success=4)
        hours.read()
        hours.reconnect(hours.proxy.disconnect_all)
    assert (hours.rival["expected"], hours.rival["received"]) == (12, 0)


def test_rival_is_noticed_over_http_and_in_none_of_the_ways_of_a_subscription(collect, proxy):
    hours = Hours(collect, proxy, collect_mode="http")
    hours.lose(failed=3)
    hours.read()
    assert hours.rival
    hours.proxy.publishing = False
    hours.read()
    assert hours.rival is None  # nothing can be said
    hours.run.end()
    hours.proxy.publishing = True
    hours = Hours(collect, proxy, step_s=30.0, collect_mode="subscribe", poll_interval_seconds=0.01)
    with logged_in(proxy) as popper, logged_in(proxy) as subscriber:
        subscriber.call("SUBSCRIBE", "usage")
        for _ in range(3):
            hours.send(5, **FAILED)
            assert popper.call("RPOP", "usage") is None
            hours.read()
            assert hours.rival is None
    hours.lose(failed=10)
    hours.read()
    assert hours.rival


# ---- what is asked ---------------------------------------------------------------------------------------


def test_counters_are_asked_twice_in_ten_minutes_and_nothing_of_the_answers_is_kept(hours):
    asked = len(hours.asked), len(hours.questions)
    hours.read(5)
    hours.lose(failed=5)
    hours.lose(UPSTREAM, failed=5)
    hours.read()
    assert hours.rival
    spans = 6 * 720 / 600
    assert 9 <= len(hours.asked) - asked[0] <= 2 * spans + 2
    assert len(hours.questions) - asked[1] <= 13 * spans
    files = b"".join(file.read_bytes() for file in hours.run.store.path.parent.glob("usage.db*"))
    told = files.decode("latin-1") + hours.run.log + json.dumps(hours.run.status)
    assert not any(secret in told for secret in ("owner@", "/root", UPSTREAM, ACCOUNT))


def test_counters_of_version_8_are_asked_for_after_one_404(collect):
    with FakeProxy(version="v8.0.47") as proxy:
        proxy.answers[ACCOUNTS] = http_reply(404, b"404 page not found", "text/plain")
        hours = Hours(collect, proxy)
        hours.lose(failed=5)
        hours.read(2)
        assert hours.rival and hours.asked[:3] == [ACCOUNTS, V8, V8]


@pytest.mark.parametrize("mode", ["pop", "http"])
@pytest.mark.parametrize("status", [302, 401, 403, 404, 500, 200])
def test_web_server_that_keeps_the_counters_back_is_asked_once_and_is_no_fault(collect, proxy, status, mode):
    body = b"<html>" if status != 200 else b'{"files": "%s"}' % bytes(5_000_000)
    proxy.answers.update({path: http_reply(status, body, "text/html") for path in (ACCOUNTS, KEYS, V8)})
    hours = Hours(collect, proxy, collect_mode=mode)
    hours.lose(failed=20)
    hours.read(3)
    has_refused = status in (401, 403)
    assert hours.asked == [ACCOUNTS, *[V8] * (status == 404), *[KEYS] * (not has_refused)]
    assert hours.run.state == "waiting" and hours.rival is None and "fault" not in hours.run.log
    assert (hours.questions[-1] == ACCOUNTS) == has_refused  # nothing at all then


def test_answers_of_any_shape_are_no_fault(hours):
    shapes = [None, 7, "x", [], [[]], {"files": {"a": 1}}, {"files": 7}, {"files": [7, None]}]
    shapes += [{"codex": 7}, {"codex": {"a|b": 7, "|": {}}}, {"": {"": []}}]
    sane = {"auth_index": ACCOUNT, "success": 0, "failed": 0, "type": "codex"}
    for name in ("type", "auth_index", "failed"):
        shapes += [{"files": [sane]}, {"files": [{**sane, name: value} for value in (None, {}, -1, 9**400, math.inf)]}]
    for body in (*map(json.dumps, shapes), "[" * 100_000, "{"):
        reply = http_reply(200, body.encode(), "application/json")
        is_of_keys = '"codex"' in body[:9]
        hours.proxy.answers = {KEYS if is_of_keys else ACCOUNTS: reply}
        hours.read()
        assert hours.run.state in ("waiting", "recording") and hours.rival is None, body[:99]
    assert "fault" not in hours.run.log


@pytest.mark.parametrize("step_s", [80.0, 40.3])  # of the latter, whether it publishes is asked as often as ever
def test_proxy_without_account_files_is_judged_by_its_keys(collect, proxy, step_s):
    proxy.answers[ACCOUNTS] = http_reply(200, b'{"files":null}', "application/json")
    hours = Hours(collect, proxy, step_s)
    hours.read(2)
    hours.lose(UPSTREAM, failed=5)
    hours.read()
    assert hours.rival


def test_rival_stands_in_health_and_check_names_it_with_what_to_do(make_site, tmp_path):
    site = make_site()
    assert site.json("/api/health")["rival"] is None
    rival = {"expected": 15, "received": 2, "since": 1795704841.6}
    site.status.update(rival=rival, endpoint="x:1", publishing=True, retention_seconds=60, clock_ahead_seconds=0.0)
    health = site.json("/api/health")
    assert health["rival"] == rival and "rival" not in health["collector"]
    findings = app.check_everything(replace(site.config, dashboard_port=site.port), tmp_path / "config.json")
    (told,) = [finding for finding in findings if "another program" in finding.found]
    assert told.level == "warning" and "counted 15" in told.found and "2 came" in told.found and told.remedy
