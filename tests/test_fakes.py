"""The stand-ins, where a fault of theirs would let the tests of the program pass for nothing."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from urllib.parse import quote

import pytest
from support import KEY

import usage_dashboard as app


@contextmanager
def connected(proxy, key=None):
    """Connect to the proxy as a client, and log in where a key is given."""
    with closing(app.RespClient(lambda: app.connect_tcp(proxy.host, proxy.port))) as client:
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
