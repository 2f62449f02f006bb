"""Alerts: what is told, when, to whom, and what becomes of it where nobody takes it."""

from __future__ import annotations

import io
import json
import sqlite3
import threading
from contextlib import closing

import pytest
from program import configure, start
from sockets import SocketServer, read_http_head
from support import NOW, at, put, reading, rows

import usage_dashboard as app


class Receiver(SocketServer):
    """Takes messages, as a receiver and as an HTTP proxy; `answers` are the statuses, the last one for good."""

    def __init__(self, *answers):
        super().__init__()
        self.answers, self.messages = list(answers) or [200], []

    @property
    def url(self):
        return f"http://{self.host}:{self.port}/secret-path"

    def serve(self, stream):
        method, target, headers = read_http_head(stream)
        body = stream.take(int(headers["content-length"]))
        with self.change():
            self.messages.append((method, target, headers, body.decode()))
            status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status == "hang":
            self.closing.wait(20)
        elif status == "begun":
            stream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        elif status != "gone":
            extra = f"Location: {self.url}\r\n" if status == 302 else ""
            stream.send(f"HTTP/1.1 {status} X\r\n{extra}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())

    @property
    def texts(self):
        return [json.loads(body)["text"] for *_, body in self.messages]


def window(left=50, label="5h", meter=None, due=False, reset_at="2026-11-01T15:00:00Z"):
    return {"remaining_percent": left, "label": label, "meter": meter, "due": due, "reset_at": reset_at}


def account(*windows, state="ok", mail="an.tran@example.com", tag="#3f9a2c"):
    return {"email": mail, "account_id_tag": tag, "state": state, "windows": windows or [window()]}


def kinds(*looks, before=()):
    """Return the kinds that are told look by look, each a list of accounts or the causes themselves."""
    told, lasting = [], dict.fromkeys(before, 0.0)
    for look in looks:
        causes = look if isinstance(look, dict) else app.quota_causes(look, 20)
        alerts, lasting = app.alerts_of(lasting, causes, 1.0)
        told.append([alert.kind for alert in alerts])
    return told


LOW, FINE, NEARLY = account(window(19)), account(window(25)), account(window(24.9))


@pytest.mark.parametrize(("looks", "told"), [
    ([[LOW], [LOW], [NEARLY], [LOW]], [["low_quota"], [], [], []]),
    ([[LOW], [FINE], [LOW]], [["low_quota"], [], ["low_quota"]]),
    ([[account(window(20))]], [[]]),
    ([[LOW], [account(window(None, due=True))], [LOW]], [["low_quota"], [], ["low_quota"]]),
    ([[LOW], [account(window(None))], [LOW]], [["low_quota"], [], []]),  # unknown ends nothing
    ([[LOW], [], [LOW]], [["low_quota"], [], []]),
    ([[account(window(5), window(5, "7d"), window(5, "Spark 5h", "Spark"), window(5, "budget", "budget"))]], [["low_quota"] * 3]),
    ([[account(window(0), state="limited")], [account(window(0), state="limited")], [FINE]], [["limited"], [], ["back"]]),
    ([[LOW], [account(window(0), state="limited")], [FINE], [LOW]], [["low_quota"], ["limited"], ["back"], ["low_quota"]]),
    ([[account(state="limited")], [account(state="network")], [account(state="reset_due")], [FINE]], [["limited"], [], [], ["back"]]),
    ([[account(state="relogin")], [account(state="timeout")], [account(state="limited")]], [["needs_person"], [], ["limited", "back"]]),
    ([[account(state=state)] for state in ("deactivated", "blocked", "ok", "region_blocked")], [["needs_person"], [], ["back"], []]),
    ([[account(state="limited")], [account(state="relogin")], [FINE]], [["limited"], ["needs_person"], ["back"]]),
    ([[FINE]], [[]]),
    ([app.failing_cause(sums) for sums in ((19, 19, 0), (20, 10, 0), (19, 19, 0), (40, 39, 0), (40, 10, 0), (20, 12, 3), (20, 13, 3))],
     [[], ["failing"], [], [], [], [], ["failing"]]),
])  # fmt: skip
def test_each_cause_is_told_once_and_over_only_when_the_opposite_is_known(looks, told):
    assert [sorted(one) for one in kinds(*looks)] == [sorted(one) for one in told]


def test_sentences_name_the_account_masked_and_what_there_is_to_know():
    rows = [account(window(7.5)), account(state="relogin", mail="bo@x.org"), account(window(0), state="limited", tag="#aaaaaa")]
    causes = app.quota_causes(rows, 20)
    at_three = app.local_minute(app._epoch("2026-11-01T15:00:00Z"))
    assert [alert.text for alert in app.alerts_of({}, causes, 1.0)[0]] == [
        f"a***@example.com (#3f9a2c) has 7.5 % of its 5h window left; it resets {at_three}.",
        "b***@x.org needs a person: the login is no longer valid; sign in again in the proxy.",
        f"a***@example.com (#aaaaaa) is limited, until {at_three}.",
    ]


def test_what_many_accounts_have_in_common_is_one_message():
    alerts = [app.Alert("limited", f"{number} is limited.", str(number)) for number in range(300)]
    assert app._joined([app.Alert("failing", "x"), *alerts[:5]]) == [app.Alert("failing", "x"), *alerts[:5]]
    text = "0 is limited. 1 is limited. 2 is limited. 3 is limited. 4 is limited. … and 295 more."
    assert app._joined(alerts) == [app.Alert("limited", text)]


class Watch:
    """An alerter on a real store and receiver; `status` is the collector's, `now` its clock."""

    def __init__(self, store, *urls):
        self.store, self.now, self.log, self.stop = store, NOW, io.StringIO(), threading.Event()
        self.status = {"state": "waiting", "since": NOW, "message": "Connected."}
        self.config = app.Config(alert_urls=urls)
        self.start()

    def start(self):
        log = app.Log(self.log)
        self.alerter = app.Alerter(self.config, self.store, lambda: self.status, log, self.stop, lambda: self.now)

    def look(self, after_s=60, **status):
        self.now += after_s
        self.status.update(status)
        self.alerter.look()


@pytest.fixture
def receiver():
    with Receiver() as receiver:
        yield receiver


def test_a_recorder_that_stops_is_told_after_five_minutes_and_again_when_it_records(store, receiver):
    watch = Watch(store, receiver.url)
    watch.look()
    watch.look(state="refused", since=watch.now + 60, message="Nothing listens there.")
    store.begin_outage(watch.now, "refused")
    watch.look(240, state="unreachable", since=watch.now + 200)
    assert receiver.messages == []
    watch.look(61)
    watch.look()
    assert receiver.texts == [f"Nothing is recorded since {app.local_minute(NOW + 120)}: Nothing listens there."]
    watch.start()  # as after a restart
    watch.look()
    watch.now = NOW + 120 + 3600 * 2 + 300
    store.end_outage(watch.now)
    watch.look(0, state="recording")
    watch.look()
    assert receiver.texts[1:] == ["Requests are recorded again, after 2 h 5 min; requests were lost."]


def test_what_was_told_is_not_told_again_by_the_next_process_and_counted_by_health(make_site, receiver):
    site = make_site()
    put(site.store, *(at(0.1, failed=1, status_code=500) for _ in range(25)))
    site.store.save_reading(reading(windows=json.dumps(
        [{"label": "5h", "seconds": 18000, "used_percent": 95, "reset_at": None, "meter": None}])))  # fmt: skip
    assert site.json("/api/health")["alerts"] == {"sent_today": 0, "last_failed_at": None}
    watch = Watch(site.store, receiver.url)
    for _ in range(2):
        watch.look(0)
        watch.start()
    watch.look(0)
    assert sorted(json.loads(body)["kind"] for *_, body in receiver.messages) == ["failing", "low_quota"]
    assert site.json("/api/health")["alerts"] == {"sent_today": 2, "last_failed_at": None}
    site.now = watch.now + 86400
    assert site.json("/api/health")["alerts"]["sent_today"] == 0


@pytest.mark.parametrize("answers", [[500], [302], ["gone"], [404, 429, 503]])
def test_a_receiver_that_does_not_take_it_is_tried_three_times_and_told_of_without_its_address(store, answers):
    with Receiver(*answers) as broken, Receiver() as other:
        watch = Watch(store, broken.url, other.url)
        watch.stop.wait = lambda seconds: False
        watch.look(600, state="refused", since=NOW)
        assert (len(broken.messages), len(other.messages)) == (3, 1)
        assert "receiver=1" in watch.log.getvalue() and "not_recording" in watch.log.getvalue()
        assert "secret-path" not in watch.log.getvalue() and str(broken.port) not in watch.log.getvalue()
        assert json.loads(store.get_meta("alerts"))["last_failed_at"] == watch.now
        watch.look()
        assert (len(broken.messages), len(other.messages)) == (3, 1)  # dropped


def test_a_wrong_certificate_is_told_by_its_reason_whose_text_may_name_the_host(chatgpt, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", chatgpt.proxy_url)
    fault = app.send_alert("https://chatgpt.com/secret-path", app.Alert("test", "Test."), NOW)
    assert fault == "CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize("taken", [200, "begun"])
def test_a_receiver_that_takes_it_at_the_second_try_has_it_once(store, taken):
    with Receiver(500, taken) as receiver:
        watch = Watch(store, receiver.url)
        watch.stop.wait = lambda seconds: False
        watch.look(600, state="refused", since=NOW)
        assert len(receiver.messages) == 2 and "failed" not in watch.log.getvalue()
        assert json.loads(store.get_meta("alerts"))["last_failed_at"] is None


def test_a_receiver_that_hangs_holds_up_nobody_who_wants_to_stop():
    with Receiver("hang") as receiver:
        stop, outcome = threading.Event(), []
        thread = threading.Thread(target=lambda: outcome.append(
            app.send_alert(receiver.url, app.Alert("test", "x"), 1.0, stop)))  # fmt: skip
        thread.start()
        receiver.wait_for(lambda: receiver.messages)
        stop.set()
        thread.join(5)
        assert outcome == ["no answer in time"]


def test_a_database_that_cannot_be_written_is_told_as_well(store, receiver):
    watch = Watch(store, receiver.url)
    with closing(sqlite3.connect(str(store.path))) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        watch.look(600, state="storage_error", since=NOW, message="usage.db is locked.")
        watch.look()
    assert [text[-19:] for text in receiver.texts] == ["usage.db is locked."]


FORMS = {
    "http://api.telegram.org/bot1:AA/sendMessage?chat_id=-100": ("/bot1:AA/sendMessage", {"chat_id": "-100", "text": "Test: Hi."}),
    "http://hooks.slack.com/services/T/B/x": ("/services/T/B/x", {"text": "Test: Hi."}),
    "http://discord.com/api/webhooks/1/x": ("/api/webhooks/1/x", {"content": "Test: Hi."}),
    "http://ntfy.sh/mine": ("/mine?title=Test", "Hi."),
    "http://ntfy.example.org/mine?priority=5": ("/mine?priority=5&title=Test", "Hi."),
    "http://user:p%40ss@example.org/hook?a=1": (
        "/hook?a=1", {"title": "Test", "text": "Hi.", "kind": "test", "account": None, "at": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("url", FORMS)
def test_the_address_decides_the_form_and_the_proxy_of_the_environment_is_used(receiver, monkeypatch, url):
    monkeypatch.setenv("http_proxy", f"http://{receiver.host}:{receiver.port}")
    assert app.send_alert(url, app.Alert("test", "Hi."), 1.0) is None
    (method, target, headers, body), = receiver.messages
    host = url.split("/")[2].rpartition("@")[2]
    path, content = FORMS[url]
    assert (method, target, headers["host"]) == ("POST", f"http://{host}{path}", host)
    assert (body if isinstance(content, str) else json.loads(body)) == content
    assert headers.get("authorization") == ("Basic dXNlcjpwQHNz" if "@" in url else None)


@pytest.mark.parametrize(("value", "said"), [
    ("https://x.org", "a list of addresses"), ([1], "number 1 is none"), (["https://ok.org/x", "ftp://secret"], "number 2 is none"),
    (["https://se cret"], "number 1"), (["https://secret\nx"], "number 1"), (["https://"], "number 1"), (["http://secret:x/"], "number 1"),
    (["http://localhost:8320/secret"], "this dashboard itself"), (["http://[::1]:8320/"], "this dashboard itself"),
])  # fmt: skip
def test_addresses_that_are_none_are_told_without_them(tmp_path, value, said):
    (tmp_path / "config.json").write_text(json.dumps({"alert_urls": value}))
    with pytest.raises(app.ConfigError) as caught:
        app.load_config(tmp_path / "config.json", {})
    assert said in str(caught.value) and "alert_urls" in str(caught.value) and "secret" not in str(caught.value)


def test_alert_test_sends_one_message_to_each_address_and_fails_where_one_does(call, program, receiver):
    with Receiver(503) as broken:
        configure(program, alert_urls=[receiver.url, broken.url])
        done = call("alert-test")
        assert (done.returncode, done.stdout.splitlines(), done.stderr) == (
            1, ["1 of 2 (webhook): sent", "2 of 2 (webhook): it answered with status 503"], "")  # fmt: skip
        assert [len(one.messages) for one in (receiver, broken)] == [1, 1]
    configure(program, alert_urls=[receiver.url])
    assert call("alert-test").returncode == 0
    configure(program)
    done = call("alert-test")
    assert done.returncode == 1 and "alert_urls" in done.stderr


def test_start_tells_of_an_account_and_goes_on_recording_while_a_receiver_hangs(program, proxy):
    with Receiver("hang") as receiver:
        port = configure(program, proxy, alert_urls=[receiver.url])
        running = start(program, port)
        assert running.terminate() == 0
        with sqlite3.connect(str(program.folder / "usage.db")) as db:
            db.execute("INSERT INTO quota_accounts(email, account_id_tag, state, state_at) VALUES ('a@x.org', '#123456', 'relogin', 1)")
        running = start(program, port)
        receiver.wait_for(lambda: receiver.messages, timeout=10)
        assert "a***@x.org" in receiver.messages[0][3]
        proxy.push(b'{"timestamp":"2026-11-01T00:00:00Z","request_id":"r9"}')
        running.wait_for(lambda: proxy.queued == 0)
        assert running.terminate() == 0
    assert rows(program.folder / "usage.db", "SELECT request_id FROM events") == [("r9",)]
    assert receiver.url not in "\n".join(running.lines)
