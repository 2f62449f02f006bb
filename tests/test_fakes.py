"""The stand-ins, where a fault of theirs would let the tests of the program pass for nothing."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from urllib.parse import quote

import pytest
from fake_proxy import FakeProxy
from support import KEY

import usage_dashboard as app


@contextmanager
def connected(proxy, key=None):
    """Connect to the proxy as a client, and log in where a key is given."""
    with closing(app.RespClient(app.tcp_connector(proxy.host, proxy.port))) as client:
        assert key is None or client.call("AUTH", key) == "OK"
        yield client


def test_proxy_fifth_failure_bans_over_both_protocols_until_its_time_is_over(proxy):
    banned = "ERR IP banned due to too many failed attempts. Try again in 30m0s"
    with connected(proxy, KEY) as old, connected(proxy) as new:
        assert new.call("PING") == "NOAUTH Authentication required."
        assert new.call("AUTH", "") == "ERR missing management key"
        assert [new.call("AUTH", "wrong") for _ in range(2)] == ["ERR invalid management key"] * 2
        http = urllib.request.Request(f"http://{proxy.host}:{proxy.port}/v0/management/usage-queue")
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(http, timeout=10)
        refused.value.close()
        assert (new.call("AUTH", KEY), new.call("RPOP", "usage")) == (banned, banned)
        assert (old.call("RPOP", "usage"), old.call("AUTH", KEY)) == (None, banned)
        assert proxy.failures == 5
        proxy.clock = lambda: time.monotonic() + 1801
        assert [new.call("AUTH", "wrong") for _ in range(4)] == ["ERR invalid management key"] * 4
        assert (new.call("AUTH", KEY), new.call("AUTH", "wrong")) == ("OK", "ERR invalid management key")


@pytest.mark.parametrize(("version", "command", "reply"), [
    ("v7.1.43", ("RPOP", "queue"), b"e0"),
    ("v7.1.44", ("RPOP", "queue"), "ERR unsupported channel 'queue'"),
    ("v7.1.44", ("RPOP", " USAGE "), b"e0"),
    ("v7.2.140", ("LLEN", "usage"), "ERR unknown command 'llen'"),
    ("v7.0.6", ("SUBSCRIBE", "usage"), "ERR unknown command 'subscribe'"),
    ("v7.1.38", ("SUBSCRIBE", "Usage"), [b"subscribe", b"usage", 1]),
    ("v7.1.44", ("SUBSCRIBE", "Usage"), [b"subscribe", b"Usage", 1]),
    ("v8.0.47", ("LPOP", "usage", "3"), [b"e0", b"e1"]),
    ("newest-first", ("RPOP", "usage"), b"e1"),
    ("newest-first", ("LPOP", "usage", "2"), [b"e0", b"e1"]),
    ("newest-first", ("RPOP", "usage", "1001"), "ERR value is not an integer or out of range"),
])  # fmt: skip
def test_proxy_answers_as_its_version_does(version, command, reply):
    with FakeProxy(version=version) as proxy, connected(proxy, KEY) as client:
        proxy.push("e0", "e1")
        assert client.call(*command) == reply


@pytest.mark.parametrize(("version", "freezes"), [("v7.0.2", True), ("v7.0.3", False)])
def test_proxy_of_an_old_version_is_frozen_by_an_idle_connection(version, freezes):
    with FakeProxy(version=version) as proxy, connected(proxy), connected(proxy) as other:
        other.socket.settimeout(0.2 if freezes else 10)
        if freezes:
            with pytest.raises(app.QueueFault, match="in time"):
                other.call("AUTH", KEY)
        else:
            assert other.call("AUTH", KEY) == "OK"


@pytest.mark.parametrize("n_bytes", [0, 9, 10, 19])
def test_proxy_that_cuts_its_replies_keeps_account_of_what_was_lost(proxy, n_bytes):
    proxy.push("e000", "e001", "e002")
    with connected(proxy, KEY) as client:
        proxy.cut_replies_after(n_bytes)
        client.send(app.encode_command("RPOP", "usage") * 3)
        got = []
        with pytest.raises(app.QueueFault):
            while True:
                got.append(client.receive())
    proxy.wait_for(lambda: proxy.open_connections == 0)
    assert got == proxy.handed_over[: n_bytes // 10]  # a reply has 10 bytes
    assert proxy.lost == proxy.handed_over[n_bytes // 10 :]


def asked(proxy, path):
    """Return the JSON that a management route answers with, or 404."""
    with closing(http.client.HTTPConnection(proxy.host, proxy.port, timeout=10)) as connection:
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        reply = connection.getresponse()
        return json.loads(reply.read()) if reply.status == 200 else reply.status


QUEUES = ["/v0/management/usage-queue?count=9", "/v8/management/observability/usage/queue?count=9"]
SWITCHES = ["/v0/management/usage-statistics-enabled",
            "/v8/management/config/observability/usage/usage-statistics-enabled"]  # fmt: skip


@pytest.mark.parametrize(("version", "differences", "queues", "switches"), [
    ("v7.2.140", {}, [["e"], 404], [{"usage-statistics-enabled": True}, 404]),
    ("v8.0.47", {}, [["e"], []], [{"usage-statistics-enabled": True}, True]),
    ("v8.0.47", {"routes_of_v0": False}, [404, ["e"]], [404, True]),
    ("no-queue", {}, [404, 404], [{"usage-statistics-enabled": True}, 404]),
])  # fmt: skip
def test_proxy_has_the_management_routes_of_its_version(version, differences, queues, switches):
    with FakeProxy(version=version, **differences) as proxy:
        proxy.push("e")
        assert [asked(proxy, path) for path in QUEUES] == queues
        assert [asked(proxy, path) for path in SWITCHES] == switches
        assert asked(proxy, "/v8/management/config/config-version") == (404 if queues[1] == 404 else 8)


def test_proxy_counts_attempts_in_twenty_buckets_until_it_restarts(proxy):
    proxy.wall_clock = lambda: 600 * 3_000_000.0  # 08:00 UTC
    proxy.add_account("ab", email="an@example.com")
    proxy.add_key("sk-upstream")
    proxy.push('{"auth_index": "ab", "failed": true}', '{"source": "sk-upstream"}', '{"auth_index": "cd"}')
    proxy.push('{"auth_index": "ab"}', counted=False)
    proxy.pass_time(650)
    proxy.count("ab", success=2)
    (file,) = asked(proxy, "/v0/management/auth-files")["files"]
    buckets = [tuple(bucket.values()) for bucket in file["recent_requests"]]
    assert (len(buckets), buckets[-3:]) == (20, [("07:50-08:00", 0, 0), ("08:00-08:10", 0, 1), ("08:10-08:20", 2, 0)])
    key = asked(proxy, "/v0/management/api-key-usage")["codex"]["https://up.example/v1|sk-upstream"]
    assert [(one["success"], one["failed"]) for one in (file, key)] == [(2, 1), (1, 0)]
    with connected(proxy, KEY) as client:
        proxy.restart()
        with pytest.raises(app.ConnectionClosed):
            client.call("RPOP", "usage")
    (file,) = asked(proxy, "/v0/management/auth-files")["files"]
    assert (file["success"], file["failed"], proxy.queued, len(proxy.forgotten)) == (0, 0, 0, 4)


def test_proxy_of_a_fork_sends_heartbeats_ends_the_idle_or_keeps_what_it_published():
    with FakeProxy(version="heartbeats", keeps_published=True, idle_s=120) as proxy, connected(proxy, KEY) as client:
        assert client.call("SUBSCRIBE", "usage")[0] == b"subscribe"
        proxy.wait_for(lambda: proxy.subscribers)
        proxy.pass_time(65)
        proxy.push("e")
        got = [client.receive()[2] for _ in range(4)]
        assert got == [b'{"support_refresh":true}', b'{"heartbeat":true}', b'{"heartbeat":true}', b"e"]
        assert (proxy.queued, proxy.open_connections) == (1, 1)
        proxy.pass_time(60)
        with pytest.raises(app.ConnectionClosed):
            while client.receive()[2] == b'{"heartbeat":true}':
                pass


def test_chatgpt_refuses_and_records_any_other_target(chatgpt_here):
    chatgpt_here.answer("one", status=302, headers={"Location": "https://elsewhere.example/x"})
    headers = {"Authorization": "Bearer one"}
    request = urllib.request.Request("https://chatgpt.com/backend-api/wham/usage", headers=headers)
    with pytest.raises(urllib.error.URLError):
        urllib.request.build_opener().open(request, timeout=10)
    assert [request["token"] for request in chatgpt_here.requests] == ["one"]
    assert chatgpt_here.foreign_targets == ["elsewhere.example:443"]


def test_browser_hears_what_goes_wrong_on_a_page_and_what_it_loads(browser):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}/x.png"
    page = f"<img src={address} onerror='document.title = 1'><script>missing()</script>"
    browser.goto("data:text/html," + quote(page))
    browser.wait_until("document.title === '1'")
    assert any("missing is not defined" in error for error in browser.console_errors())
    assert address in browser.requested_urls()
