"""The stand-ins themselves, where they are intricate enough to be wrong."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest
from fake_proxy import FakeProxy
from redis_server import RedisError, encode
from support import DATA

URL = "https://chatgpt.com/backend-api/wham/usage"


class Client:
    """A bare connection to the proxy."""

    def __init__(self, proxy, context=None):
        self.sock = socket.create_connection((proxy.host, proxy.port), timeout=10)
        if context:
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self.stream = self.sock.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.sock.close()

    def send(self, *words):
        self.sock.sendall(encode(words))

    def ask(self, *words):
        """Send a command and return the first line of its reply, with the text of a bulk string."""
        self.send(*words)
        return self.reply()

    def reply(self):
        line = self.stream.readline().decode().rstrip("\r\n")
        if line[:1] == "$" and line != "$-1":
            return self.stream.read(int(line[1:]) + 2)[:-2].decode()
        if line[:1] == "*":
            return [self.reply() for _ in range(int(line[1:]))]
        return line


def logged_in(proxy):
    client = Client(proxy)
    assert client.ask("AUTH", "secret-key") == "+OK"
    return client


# ---- the proxy: key and ban ------------------------------------------------------------------------------


def test_proxy_fifth_failure_bans_and_the_sixth_call_shows_it(proxy):
    banned = "-ERR IP banned due to too many failed attempts. Try again in 30m0s"
    with Client(proxy) as client:
        assert client.ask() == "-ERR empty command"
        assert client.ask("PING") == "-NOAUTH Authentication required."
        assert client.ask("AUTH") == "-ERR wrong number of arguments for 'auth' command"
        assert client.ask("AUTH", "") == "-ERR missing management key"
        assert client.ask("AUTH", "a") == "-ERR invalid management key"
        assert client.ask("AUTH", "user", "b") == "-ERR invalid management key"
        assert client.ask("AUTH", "secret-key") == banned
        assert client.ask("RPOP", "usage") == banned
        assert (proxy.failures, proxy.auth_attempts, proxy.commands[0]) == (5, 5, "PING")
        proxy.advance(1755)
        assert client.ask("PING").endswith("in 45s")
        proxy.advance(46)
        assert client.ask("AUTH", "secret-key") == "+OK"


def test_proxy_success_forgives_and_an_old_login_outlives_a_ban(proxy):
    with logged_in(proxy) as old, Client(proxy) as new:
        for _ in range(4):
            new.ask("AUTH", "wrong")
        assert new.ask("AUTH", "secret-key") == "+OK"
        proxy.ban()
        assert old.ask("RPOP", "usage") == "$-1"
        assert old.ask("AUTH", "secret-key").startswith("-ERR IP banned")
        assert old.ask("RPOP", "usage") == "$-1"


def test_proxy_counts_http_and_resp_together():
    with FakeProxy() as proxy:
        for _ in range(5):
            assert ask_http(proxy, "usage-queue", key=None) == (401, {"error": "missing management key"})
        with Client(proxy) as client:
            assert client.ask("AUTH", "secret-key").startswith("-ERR IP banned")
        status, answer = ask_http(proxy, "usage-queue")
        assert (status, answer["error"][:9]) == (403, "IP banned")


def test_proxy_remote_client_is_told_only_at_auth():
    with FakeProxy(allow_remote=False, seen_from="192.0.2.7") as proxy, Client(proxy) as client:
        assert client.ask("LLEN", "usage") == "-NOAUTH Authentication required."
        assert client.ask("AUTH", "secret-key") == "-ERR remote management disabled"
        assert proxy.failures == 0


# ---- the proxy: versions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "key", "reply"),
    [
        ("v7.1.43", "queue", "e0"),
        ("v7.1.44", "queue", "-ERR unsupported channel 'queue'"),
        ("v7.1.44", " USAGE ", "e0"),
        ("v7.2.140", "errors", "-ERR unsupported channel 'errors'"),
    ],
)
def test_proxy_pop_key_by_version(version, key, reply):
    with FakeProxy(version=version) as proxy, logged_in(proxy) as client:
        proxy.push("e0", "e1")
        assert client.ask("RPOP", key) == reply


def test_proxy_pops_the_oldest_at_either_end_and_many_at_once(proxy):
    proxy.push(*[f"e{number}" for number in range(5)])
    with logged_in(proxy) as client:
        assert client.ask("RPOP", "usage") == "e0"
        assert client.ask("LPOP", "usage") == "e1"
        assert client.ask("LPOP", "usage", 9) == ["e2", "e3", "e4"]
        assert client.ask("LPOP", "usage", 9) == []
        assert client.ask("LPOP", "usage") == "$-1"
        assert client.ask("LPOP", "usage", 0) == "-ERR value is not an integer or out of range"
        assert client.ask("LLEN", "usage") == "-ERR unknown command 'llen'"
    assert proxy.handed_over == [b"e0", b"e1", b"e2", b"e3", b"e4"]


def test_proxy_v7_1_17_speaks_only_http():
    with FakeProxy(version="v7.1.17") as proxy, Client(proxy) as client:
        assert client.ask("AUTH", "secret-key") == "-ERR RESP AUTH disabled; use mTLS"
        assert client.stream.read() == b""
        proxy.push({"n": 1}, b"\xff", {"n": 2})
        assert ask_http(proxy, "usage-queue?count=2") == (200, [{"n": 1}, "\ufffd"])
        assert ask_http(proxy, "usage-queue?count=0")[0] == 400
        assert ask_http(proxy, "usage-queue") == (200, [{"n": 2}])


def test_proxy_http_queue_came_with_v6_10_8_and_the_switch_is_older():
    with FakeProxy(version="v6.10.7", publishing=False) as proxy:
        assert ask_http(proxy, "usage-queue")[0] == 404
        assert ask_http(proxy, "usage-statistics-enabled") == (200, {"usage-statistics-enabled": False})


@pytest.mark.parametrize(
    ("settings", "reply"),
    [
        ({"management": False}, ""),
        ({"home_mode": True}, "-ERR redis usage output disabled in home mode"),
        ({"home_mode": True, "version": "v7.1.16"}, ""),
        ({"answer_http_only": True}, "HTTP/1.1 400 Bad Request"),
    ],
)
def test_proxy_that_cannot_be_used_closes(settings, reply):
    behind_nginx = settings.pop("answer_http_only", False)
    with FakeProxy(**settings) as proxy, Client(proxy) as client:
        proxy.answer_http_only = behind_nginx
        assert client.ask("AUTH", "secret-key") == reply
        client.stream.read()


@pytest.mark.parametrize(("version", "freezes"), [("v7.0.2", True), ("v7.0.3", False)])
def test_proxy_idle_connection_freezes_old_versions(version, freezes):
    with FakeProxy(version=version) as proxy, Client(proxy) as idle:
        proxy.wait_for(lambda: proxy.connections == 1)
        with Client(proxy) as other:
            other.send("AUTH", "secret-key")
            if freezes:
                idle.sock.sendall(b"G")
            assert other.reply() == "+OK"
            assert (proxy.commands, proxy.connections) == (["AUTH"], 2)


def test_proxy_idle_connection_of_an_old_version_keeps_others_out():
    with FakeProxy(version="v6.9.38") as proxy, Client(proxy) as idle, Client(proxy) as other:
        other.sock.settimeout(0.2)
        other.send("AUTH", "secret-key")
        with pytest.raises(socket.timeout):
            other.sock.recv(1)
        assert proxy.connections == 1
        idle.sock.shutdown(socket.SHUT_WR)
        other.sock.settimeout(10)
        assert other.sock.recv(16) == b"+OK\r\n"


# ---- the proxy: subscribers ------------------------------------------------------------------------------


def test_proxy_diverts_events_while_somebody_subscribes(proxy):
    proxy.push("before")
    with logged_in(proxy) as popper:
        with logged_in(proxy) as subscriber:
            assert subscriber.ask("SUBSCRIBE", "usage") == ["subscribe", "usage", ":1"]
            assert subscriber.reply() == ["message", "usage", '{"support_refresh":true}']
            assert popper.ask("RPOP", "usage") == "before"
            proxy.push("during")
            assert popper.ask("RPOP", "usage") == "$-1"
            assert subscriber.reply() == ["message", "usage", "during"]
            proxy.refresh()
            assert subscriber.reply() == ["message", "usage", '{"refresh":true}']
            assert subscriber.ask("LPOP", "usage") == "-ERR unknown command 'lpop'"
            assert subscriber.ask("PING") == ["pong", "$-1"]
            assert subscriber.ask("UNSUBSCRIBE") == ["unsubscribe", "usage", ":0"]
            assert subscriber.stream.read() == b""
        proxy.wait_for(lambda: proxy.subscribers == 0)
        proxy.push("after")
        assert popper.ask("RPOP", "usage") == "after"
    assert proxy.handed_over == [b"before", b"during", b"after"]


def test_proxy_subscription_by_version():
    with FakeProxy(version="v7.0.6") as proxy, logged_in(proxy) as client:
        assert client.ask("SUBSCRIBE", "usage") == "-ERR unknown command 'subscribe'"
    with FakeProxy(version="v7.1.38") as proxy, logged_in(proxy) as client:
        assert client.ask("SUBSCRIBE", "Usage") == ["subscribe", "usage", ":1"]
        proxy.push("first")
        assert client.reply() == ["message", "usage", "first"]


def test_proxy_drops_a_subscriber_that_does_not_read(proxy):
    events = [json.dumps({"n": number, "pad": "x" * 100_000}) for number in range(400)]
    with logged_in(proxy) as client:
        client.ask("SUBSCRIBE", "usage")
        client.reply()
        proxy.push(*events)
        assert (proxy.subscribers, len(proxy.lost)) == (0, 1)
        received = iter(client.reply, "")
        assert [message[2].encode() for message in received] == proxy.handed_over
        assert len(proxy.handed_over) + len(proxy.lost) + proxy.queued == 400


def test_proxy_switched_off_ends_subscriptions_and_forgets(proxy):
    with logged_in(proxy) as client:
        proxy.push("forgotten")
        client.ask("SUBSCRIBE", "usage")
        client.reply()
        proxy.management = False
        assert client.stream.read() == b""
        assert proxy.queued == 0


# ---- the proxy: faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 1, 4, 9, 10, 19])
def test_proxy_cuts_its_replies_after_n_bytes(proxy, n_bytes):
    whole = b"$4\r\ne000\r\n" * 3  # 10 bytes each
    proxy.push("e000", "e001", "e002")
    with logged_in(proxy) as client:
        proxy.cut_replies_after(n_bytes)
        client.sock.sendall(encode(("RPOP", "usage")) * 3)
        data = client.stream.read()
    assert len(data) == n_bytes
    assert whole.replace(b"e000\r\n$4\r\ne000", b"e000\r\n$4\r\ne001").startswith(data)
    proxy.wait_for(lambda: proxy.open_connections == 0)
    assert len(proxy.handed_over) - len(proxy.lost) == n_bytes // 10
    with logged_in(proxy):
        pass


def test_proxy_dribbles(proxy):
    proxy.dribble(0.001)
    with logged_in(proxy) as client:
        proxy.push("slow")
        assert client.ask("RPOP", "usage") == "slow"


def test_proxy_disconnects_and_comes_back_on_the_same_port(proxy):
    with logged_in(proxy) as client:
        proxy.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            Client(proxy)
        assert client.ask("RPOP", "usage") == "$-1"
        proxy.disconnect_all()
        assert client.stream.read() == b""
    proxy.listen_again()
    with logged_in(proxy):
        assert proxy.connections == 2


def test_proxy_takes_nothing_for_a_command_of_a_connection_that_is_gone(proxy):
    with logged_in(proxy) as client:
        with proxy.lock:  # the command has arrived, and waits
            client.send("RPOP", "usage")
            proxy.disconnect_all()
            proxy.push("kept")
        assert client.stream.read() == b""
        proxy.wait_for(lambda: proxy.open_connections == 0)
    assert (proxy.queued, proxy.handed_over, proxy.commands) == (1, [], ["AUTH", "RPOP"])


def test_proxy_speaks_resp_and_http_in_tls_by_alpn():
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(str(DATA / "server.pem"))
    server.set_alpn_protocols(["h2", "http/1.1"])
    trusting = ssl.create_default_context(cafile=str(DATA / "ca.pem"))
    with FakeProxy(tls=server) as proxy:
        with Client(proxy, trusting) as client:
            assert client.ask("AUTH", "secret-key") == "+OK"
            assert client.ask("SUBSCRIBE", "usage")[0] == "subscribe"
            proxy.push("e")
            assert [client.reply()[2], client.reply()[2]] == ['{"support_refresh":true}', "e"]
        trusting.set_alpn_protocols(["http/1.1"])
        with Client(proxy, trusting) as client:
            assert client.ask("AUTH", "secret-key") == "HTTP/1.1 400 Bad Request"
        with Client(proxy) as client:
            client.send("AUTH", "secret-key")
            assert client.stream.read() == b""


@pytest.mark.parametrize(
    ("sent", "reply"),
    [
        (b"+PING\r\n", b"-ERR protocol error\r\n"),
        (b"*1\r\n$4\r\nPINGxx", b"-ERR protocol error\r\n"),
        (b"*1\r\n$4\r\nPI", b"-ERR unexpected EOF\r\n"),
        (b"PING\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
    ],
)
def test_proxy_answers_broken_frames(proxy, sent, reply):
    with Client(proxy) as client:
        client.sock.sendall(sent)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.stream.readline() == reply
        client.stream.read()


def ask_http(proxy, path, key="secret-key"):
    """Return status and JSON value of a management call."""
    request = urllib.request.Request(f"http://{proxy.host}:{proxy.port}/v0/management/{path}")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            assert response.headers["X-CPA-VERSION"] == proxy.version
            return response.status, json.load(response)
    except urllib.error.HTTPError as fault:
        with fault:
            body = fault.read()
        return fault.code, json.loads(body) if body[:1] == b"{" else body.decode()


# ---- chatgpt.com -----------------------------------------------------------------------------------------


def ask_quota(chatgpt, token, timeout=10):
    """Return status and body of the quota reply, by the way the environment variables would set up."""
    handlers = [
        urllib.request.ProxyHandler({"https": chatgpt.proxy_url}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=chatgpt.ca_file)),
    ]
    request = urllib.request.Request(URL, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as fault:
        with fault:
            return fault.code, fault.read()


def test_chatgpt_answers_each_token(chatgpt):
    chatgpt.answer("one", body={"plan_type": "plus"})
    chatgpt.answer("two", status=429, headers={"Retry-After": "7"}, body=b"slow down")
    assert ask_quota(chatgpt, "one") == (200, b'{"plan_type": "plus"}')
    assert ask_quota(chatgpt, "two") == (429, b"slow down")
    assert ask_quota(chatgpt, "three") == (401, b'{"detail": "Unauthorized"}')
    assert [request["token"] for request in chatgpt.requests] == ["one", "two", "three"]
    assert {request["path"] for request in chatgpt.requests} == {"/backend-api/wham/usage"}
    assert not any("authorization" in request["proxy_headers"] for request in chatgpt.requests)
    assert chatgpt.most_at_once == 1


def test_chatgpt_is_reached_by_the_environment_alone(chatgpt, program):
    chatgpt.answer(None, body={"plan_type": "plus"})
    source = f"import urllib.request\nprint(urllib.request.urlopen({URL!r}).read().decode())"
    program.script.write_text(source)
    assert program.run(env=chatgpt.environment).stdout == '{"plan_type": "plus"}\n'


def test_chatgpt_refuses_and_records_any_other_target(chatgpt):
    chatgpt.answer("one", status=302, headers={"Location": "https://elsewhere.example/x"})
    with pytest.raises(urllib.error.URLError):
        ask_quota(chatgpt, "one")
    assert chatgpt.foreign_targets == ["elsewhere.example:443"]


def test_chatgpt_holds_an_answer_until_it_is_released(chatgpt):
    chatgpt.answer("one", body={"late": True}, hold=True)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask_quota(chatgpt, "one")))
    asking.start()
    chatgpt.wait_for(lambda: chatgpt.requests)
    assert not answers
    chatgpt.release()
    asking.join(10)
    assert answers == [(200, b'{"late": true}')]


def test_chatgpt_faults(chatgpt):
    chatgpt.answer("big", body={}, size=3_000_000)
    assert len(ask_quota(chatgpt, "big")[1]) == 3_000_000
    chatgpt.answer("drip", body={}, drip=0.001)
    assert ask_quota(chatgpt, "drip") == (200, b"{}")
    chatgpt.answer("cut", body={"plan_type": "plus"}, cut_after=5)
    with pytest.raises(http.client.IncompleteRead):
        ask_quota(chatgpt, "cut")
    chatgpt.answer("slow", body={}, delay=30)
    with pytest.raises(OSError, match="timed out"):
        ask_quota(chatgpt, "slow", timeout=0.2)


# ---- redis-server ----------------------------------------------------------------------------------------


def test_redis_pushes_so_that_rpop_is_the_oldest_and_comes_back_empty(redis_with_password):
    server = redis_with_password
    server.push("usage", *[f"e{number}" for number in range(2500)])
    assert (server.length("usage"), server.command("RPOP", "usage")) == (2500, b"e0")
    with pytest.raises(RedisError, match="WRONGTYPE"):
        server.command("GET", "usage")
    port = server.port
    server.stop()
    server.start()
    assert (server.port, server.length("usage")) == (port, 0)


# ---- the browser -----------------------------------------------------------------------------------------


PAGE = """<!doctype html><title>t</title><link rel="icon" href="data:,"><h1 id="said">Hello <b>there</b></h1>
<input oninput="said.textContent = value"><button onclick="said.textContent = 'clicked'">B</button>
<script>setTimeout(() => { window.ready = {since: 1}; }, 50);</script>"""


def test_browser_reads_clicks_and_types(browser):
    browser.goto("data:text/html," + quote(PAGE))
    assert browser.wait_until("window.ready") == {"since": 1}
    assert browser.text("#said") == "Hello there"
    browser.click("button")
    assert browser.text("h1") == "clicked"
    browser.press("Shift+Tab", "ab+c", "Backspace", "Home", "x")
    assert browser.text("h1") == "xab+"
    heading = browser.find("h1")
    assert browser.script("return [arguments[0].id, navigator.language]", heading) == ["said", "en-US"]
    assert browser.console_errors() == []
    assert [url[:9] for url in browser.requested_urls()] == ["data:text"]


def test_browser_wait_that_fails_names_the_expression(browser):
    browser.goto("data:text/html,x")
    with pytest.raises(AssertionError, match=r"document\.title === 'never'"):
        browser.wait_until("document.title === 'never'", timeout=0.2)


def test_browser_emulates_a_phone_in_the_dark(browser, tmp_path):
    try:
        browser.resize(390, 844, scale=3)
        browser.emulate(dark=True, reduced_motion=True, print=True)
        identifier = browser.new_document_script("window.early = document.title")
        browser.goto("data:text/html," + quote('<meta name="viewport" content="width=device-width">'))
        queries = ["(prefers-color-scheme: dark)", "(prefers-reduced-motion)", "print"]
        assert browser.script("return arguments[0].map(q => matchMedia(q).matches)", queries) == [True] * 3
        assert browser.script("return [innerWidth, devicePixelRatio, window.early]") == [390, 3, ""]
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
        browser.script("setTimeout(() => missing(), 0)")
        browser.wait_until("true")
        assert "missing is not defined" in browser.console_errors()[0]
    finally:
        browser.remove_document_script(identifier)
        browser.resize(1440, 900, scale=1)
        browser.emulate(dark=False, reduced_motion=False, print=False)


# ---- the program -----------------------------------------------------------------------------------------


def test_program_output_is_followed_line_by_line(program):
    program.script.write_text("import signal\nprint('one\\ntwo', flush=True)\nsignal.pause()\n")
    running = program.start("start")
    assert running.wait_for_line("two") == "two"
    assert running.lines == ["one", "two"]
    assert running.terminate() != 0
    with pytest.raises(AssertionError, match="ended without printing 'three'"):
        running.wait_for_line("three")


def test_program_does_not_see_the_developers_home_or_keys(program, monkeypatch):
    monkeypatch.setenv("MANAGEMENT_PASSWORD", "private")
    program.script.write_text("import os\nprint(os.environ['HOME'], os.environ.get('MANAGEMENT_PASSWORD'))")
    assert program.run("check").stdout.split() == [str(program.home), "None"]
    assert program.run("check", env={"MANAGEMENT_PASSWORD": "x"}).stdout.split()[1] == "x"
