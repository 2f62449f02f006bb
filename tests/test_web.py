from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import json
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from urllib.parse import quote

import pytest
from sockets import PATIENCE_S, ended
from support import NOW, at, event, payload, put, reading, rows, write_account

import usage_dashboard as app

DAY = "/api/summary?range=24h"


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("1h", 1), ("5h", 3), ("24h", 5), ("7d", 7), ("30d", 9), ("90d", 10), ("all", 11), ("today", 4), ("yesterday", 2)],
)
def test_each_range_counts_what_lies_in_it_to_the_second(site, name, expected):
    edges = [NOW - seconds - late for seconds in (3600, 18000, 86400, 7 * 86400) for late in (0, 1)]
    put(site.store, *[event(at=edge) for edge in edges], *[at(24 * days) for days in (29.9, 89.9, 400)])
    answer = site.json(f"/api/summary?range={name}&tz_offset=0")
    assert answer["summary"]["requests"] == expected
    for part in ("hours", "models", "accounts"):
        assert sum(row["requests"] for row in answer[part]) == expected


def test_hours_are_zero_filled_and_labelled_in_the_viewers_zone(site):
    put(site.store, at(2.25))
    answer = site.json("/api/summary?range=5h&tz_offset=330")  # 17:30 in India
    assert [hour["hour"] for hour in answer["hours"]] == [f"2026-11-01 {hour}:00" for hour in (12, 13, 14, 15, 16, 17)]
    assert [hour["requests"] for hour in answer["hours"]] == [0, 0, 0, 1, 0, 0]  # 09:45 UTC is 15:15 there
    assert answer["hours"][0]["start"] == NOW - 5.5 * 3600 and answer["bucket_seconds"] == 3600


@pytest.mark.parametrize(("minutes", "hours_today"), [(0, 12), (7 * 60, 19), (-12 * 60, 0), (14 * 60, 2), (345, 17.75)])
def test_today_begins_at_midnight_of_the_zone(site, minutes, hours_today):
    if not hours_today:  # noon UTC is midnight there: an empty day has no window yet
        site.now = NOW + 1
    answer = site.json(f"/api/summary?range=today&tz_offset={minutes}")
    assert answer["start"] == NOW - hours_today * 3600


def test_start_given_by_the_page_wins_on_a_day_of_25_hours(site):
    # In New York, 2026-11-01 began at 04:00 UTC with summer time and ends with winter time (UTC-5) at 05:00 UTC.
    site.now = NOW + 16 * 3600
    midnight = 1_793_505_600
    put(site.store, event(at=midnight + 60), event(at=midnight - 60), event(at=midnight + 24.5 * 3600 - 3600))
    answer = site.json(f"/api/summary?range=today&start={midnight}&tz_offset=-300")
    assert (answer["range"], answer["start"], answer["summary"]["requests"]) == ("today", midnight, 2)
    assert len(answer["hours"]) == 24 and answer["hours"][0]["start"] == midnight


HOURLY = [at(hours + 0.2, failed=hours % 3 % 2, model=f"m{hours % 2}") for hours in range(100)]


def test_previous_of_a_time_without_requests_has_zeros(site):
    put(site.store, at(100), at(1))
    previous = site.json("/api/summary?range=24h")["previous"]
    assert previous == {**dict.fromkeys(app.SUM_NAMES, 0), "cost_usd": None, "unpriced_tokens": 0}


@pytest.mark.parametrize(("query", "start_h", "end_h"), [
    ("range=1h", 2, 1), ("range=24h&model=m1", 48, 24), ("range=today&tz_offset=0", 36, 24),
    ("range=today&tz_offset=420&status=ok", 43, 24), ("range=yesterday&tz_offset=0", 60, 36),
    (f"range=today&start={NOW - 43200:.0f}&tz_offset=0", 36, 24),
    (f"range=today&start={NOW - 7200:.0f}&end={NOW - 3600:.0f}", 3, 2), (f"start={NOW - 178560}&end={NOW}", 99.2, 49.6),
    ("range=7d", None, None), ("range=all", None, None), (f"start={NOW - 179000}&end={NOW}", None, None),
])  # fmt: skip
def test_previous_is_the_same_time_before_under_the_same_filters_if_records_reach_so_far(site, query, start_h, end_h):
    put(site.store, *HOURLY)
    previous = site.json(f"/api/summary?{query}")["previous"]
    if start_h is None:
        assert previous is None
    else:
        filters = query.partition("&")[2] if "=m1" in query or "=ok" in query else ""
        before = site.json(f"/api/summary?start={NOW - start_h * 3600}&end={NOW - end_h * 3600}&{filters}")
        assert previous == before["summary"] and previous["requests"] > 0 and before["range"] is None


@pytest.fixture
def new_york(monkeypatch):
    with monkeypatch.context() as changed:
        changed.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


def test_yesterday_and_the_part_of_it_up_to_now_follow_the_clocks_of_the_zone(site, new_york):
    midnight, site.now = 1_793_505_600, 1_793_638_800  # of 2026-11-01, which has 25 hours there; noon of the next day
    put(site.store, *[event(at=midnight + 3600 * hour) for hour in range(-30, 40)])
    yesterday, today = (site.json(f"/api/summary?range={name}") for name in ("yesterday", "today"))
    assert (yesterday["start"], yesterday["end"], yesterday["summary"]["requests"]) == (midnight, midnight + 90000, 25)
    assert (yesterday["previous"]["requests"], today["previous"]["requests"]) == (24, 13)
    assert (today["start"], today["summary"]["requests"]) == (midnight + 90000, 12)


def test_day_that_begins_at_one_o_clock_is_compared_with_the_whole_day_before(site, new_york, monkeypatch):
    monkeypatch.setenv("TZ", "America/Havana")
    time.tzset()
    begin, site.now = 1_772_946_000, 1_773_028_799  # 2026-03-08, which has 23 hours there; its midnight is skipped
    put(site.store, *[event(at=begin + 3600 * hour) for hour in range(-80, 23)])
    yesterday, today = (site.json(f"/api/summary?range={name}") for name in ("yesterday", "today"))
    assert (yesterday["start"], today["start"]) == (begin - 86400, begin)
    assert (yesterday["previous"]["requests"], today["previous"]["requests"]) == (24, 24)


def test_event_of_a_proxy_whose_clock_is_ahead_is_counted(site):
    put(site.store, event(at=NOW + 120))
    assert site.json("/api/summary?range=1h")["summary"]["requests"] == 1
    put(site.store, event(at=NOW + 86400))
    assert site.json("/api/summary?range=1h")["summary"]["requests"] == 0  # a day ahead is no matter of a clock
    assert site.json("/api/summary?range=all")["summary"]["requests"] == 2


@pytest.mark.parametrize(("query", "code", "allowed"), [
    ("summary?range=foo", "bad_range", "today, yesterday, 1h, 5h, 24h, 7d, 30d, 90d, all"),
    ("summary?tz_offset=7", "bad_tz_offset", "multiple of 15"), ("summary?start=10&end=10", "bad_window", "before"),
    ("summary?start=10&end=9", "bad_window", "start must be before end; 10.000 is not before 9.000"),
    ("summary?start=2026-11-01", "bad_start", "epoch seconds, from 0 to 4102444800; 2026-11-01 is none"),
    ("summary?tz_offset=x", "bad_tz_offset", "-840 to 840"), ("summary?status=maybe", "bad_status", "ok, failed"),
    ("summary?tz_offset=9000", "bad_tz_offset", "-840 to 840"), ("summary?start=x", "bad_start", "epoch seconds"),
    ("summary?end=-1", "bad_end", "epoch seconds"), ("summary?start=1e9", "bad_start", "epoch"),
    *((f"requests?status={code}", "bad_status", "400 to 599") for code in ("399", "600", "4290", "%D9%A44%D9%A4")),
    ("requests?sort=foo", "bad_sort", "time, latency, ttft, tokens"), ("requests?order=up", "bad_order", "desc, asc"),
    ("summary?bucket=7", "bad_bucket", "auto"), ("summary?start=nan", "bad_start", "epoch seconds"),
    ("summary?start=99999999999", "bad_start", "epoch seconds"), ("requests?before=x", "bad_before", "time_desc"),
    ("requests?before=time_desc_null_5", "bad_before", "time_desc"),
    *((f"requests?limit={limit}", "bad_limit", "limit must be a whole number from 1 to 500")
      for limit in "0 -1 501 x 1.5 1e2 %D9%A3".split()),
])  # fmt: skip
def test_wrong_value_is_400_and_names_what_is_allowed(site, query, code, allowed):
    said = site.error(f"/api/{query}", 400)
    assert said["code"] == code and allowed in said["error"]


@pytest.mark.parametrize(("path", "method", "status", "code"), [
    ("/nothing", "GET", 404, "not_found"), ("/api/summary/", "GET", 404, "not_found"),
    ("/../usage.db", "GET", 404, "not_found"), ("/api/summary", "POST", 405, "method_not_allowed"),
    ("/", "DELETE", 405, "method_not_allowed"), ("/api/quota?force=1", "PUT", 405, "method_not_allowed"),
])  # fmt: skip
def test_unknown_route_or_method_is_told(site, path, method, status, code):
    assert site.error(path, status, method)["code"] == code


def test_bucket_auto_fits_the_length_of_the_window(site):
    put(site.store, *[at(minutes / 60) for minutes in range(0, 60, 7)])
    sizes = {"1h": 300, "5h": 900, "24h": 3600, "7d": 10800, "30d": 86400, "90d": 86400}
    for name, size in sizes.items():
        assert site.json(f"/api/summary?range={name}&bucket=auto")["bucket_seconds"] == size
    five = site.json("/api/summary?range=1h&bucket=auto")
    assert sum(hour["requests"] for hour in five["hours"]) == 9 and len(five["hours"]) in (12, 13)


def test_window_of_more_than_3000_hours_is_400_unless_its_buckets_are_longer(site):
    put(site.store, at(1))
    assert len(site.json(f"/api/summary?start={NOW - 3000 * 3600}")["hours"]) == 3000
    wide = (f"start={NOW - 3000 * 3600 - 1}", "start=0&end=4102444800", f"range=all&start={NOW - 2e7}&bucket=hour")
    for query in wide:
        said = site.error(f"/api/summary?{query}", 400)
        assert said["code"] == "bad_bucket" and "bucket=auto" in said["error"]
    for query in (f"start={NOW - 3000 * 3600 - 1}", "start=0&end=4102444800", "start=0"):
        answer = site.json(f"/api/summary?{query}&bucket=auto&tz_offset=-210")
        assert 0 < len(answer["hours"]) <= 3001 and answer["bucket_seconds"] % 86400 == 0
        assert sum(hour["requests"] for hour in answer["hours"]) == answer["summary"]["requests"] == 1
    put(site.store, event(at=app._EARLIEST_AT), event(at=app._LATEST_AT - 1))
    answer = site.json("/api/summary?range=all")
    assert answer["summary"]["requests"] == 3 and len(answer["hours"]) <= 3001
    assert answer["bucket_seconds"] == 10 * 86400


def test_rate_limited_requests_are_counted_and_listed_by_their_code(site):
    sent = [payload(n, timestamp=app.utc_text(NOW - 7200 - n), provider="zai", model="glm-5.3", failed=code != 499,
                    fail={"status_code": code, "body": "x"}) for n, code in enumerate((429, 429, 500, 401, 499))]
    assert site.store.store_batch(app.parse_events([*sent, payload(9, timestamp=app.utc_text(NOW - 60))]), 1, NOW)
    for is_swept in (False, True):  # then only the roll-ups know them
        answer = site.json("/api/summary?range=24h")
        for part in ([answer["summary"]], answer["hours"], answer["models"], answer["accounts"]):
            assert [sum(row[name] for row in part) for name in ("requests", "failed", "rate_limited")] == [6, 5, 2]
        for code, count in ((429, 2), (500, 1), (401, 1), (499, 1), (503, 0)):
            assert site.json(f"/api/summary?range=24h&status={code}")["summary"]["requests"] == count
            listed = site.json(f"/api/requests?status={code}")["requests"]
            assert [row["status_code"] for row in listed] == [code] * count * (not is_swept)
        assert site.store.find_faults() == [] and site.store.delete_some(NOW) == 5 * (not is_swept)


def test_requests_are_listed_in_pages_by_a_cursor(site):
    put(site.store, *[at(1 + number / 100, request_id=f"{number:08x}") for number in range(5)])
    first = site.json("/api/requests?limit=3")
    assert [row["request_id"] for row in first["requests"]] == ["00000000", "00000001", "00000002"]
    second = site.json(f"/api/requests?limit=3&before={first['next']}")
    assert [row["request_id"] for row in second["requests"]] == ["00000003", "00000004"] and second["next"] is None


@pytest.mark.parametrize("text, found", [
    ("00000003", [3]), ("0003", []), ("503", [5]), ("50", []), ("sk-…0503", [4]), ("0503 #a5", [4]), ("#A503", [4]),
    ("xhi", [6]), ("flex", [7]), ("/v1/chat", [7]), ("flex%", []),
])  # fmt: skip
def test_search_finds_words_anywhere_and_ids_by_their_beginning(site, text, found):
    more = [{}] * 4 + [{"api_key": "sk-…0503 #a503bc"}, {"failed": 1, "status_code": 503, "error": "overloaded"},
                       {"reasoning_effort": "xhigh"}, {"service_tier": "flex", "endpoint": "POST /v1/chat"}]  # fmt: skip
    put(site.store, *[at(1 - n / 100, request_id=f"{n:08x}", **facts) for n, facts in enumerate(more)])
    told = site.json(f"/api/requests?range=24h&q={quote(text)}")["requests"]
    assert [int(row["request_id"], 16) for row in told] == found


def pages_of(site, query, size):
    """Return a list of requests as its pages have it, and the total."""
    rows, before = [], ""
    while before is not None:
        page = site.json(f"/api/requests?{query}&limit={size}{before and '&before='}{before}")
        rows, before = rows + page["requests"], page["next"]
    return rows, page["total"]


@pytest.mark.parametrize("order", ["desc", "asc"])
@pytest.mark.parametrize(("sort", "column"), list(app.SORTS.items()))
def test_requests_are_sorted_over_the_whole_window_and_unknown_values_are_last(site, sort, column, order):
    dice = random.Random(sort + order)
    names = ("latency_ms", "ttft_ms", "total_tokens")
    put(site.store, *[
        at(dice.randrange(50), model=dice.choice("ab"), **dice.choice([{}, {}, {"failed": 1, "status_code": 429}]),
           source=source, auth_index=source, **{name: dice.choice([None, 0, 7, 900, 10**12]) for name in names})
        for source in ["a@x.com", "b@x.com"] * 60
    ])  # fmt: skip
    for filters in ("status=ok", "model=a", "status=429", "range=24h", "range=24h&model=b&account=b@x.com"):
        rows = site.json(f"/api/requests?{filters}&limit=500")["requests"]
        rows.sort(key=lambda row: (row[column] or 0, row["id"]), reverse=order == "desc")
        rows.sort(key=lambda row: row[column] is None)
        assert pages_of(site, f"{filters}&sort={sort}&order={order}", 7) == (rows, len(rows)) and len(rows) > 7


@pytest.mark.parametrize("other", ["sort=latency", "order=asc", "sort=ttft&order=asc"])
def test_cursor_of_another_order_is_400(site, other):
    put(site.store, at(1), at(2))
    for one, another in (("", other), (other, "")):
        cursor = site.json(f"/api/requests?limit=1&{one}")["next"]
        assert site.error(f"/api/requests?{another}&before={cursor}", 400)["code"] == "bad_before"


def test_total_counts_what_the_list_can_reach(site):
    put(site.store, *HOURLY)
    assert site.json("/api/requests?q=m1&limit=1")["total"] is None
    site.store.delete_some(NOW - 50 * 3600, rows=1)  # the others up to there are as good as gone
    for query, count in (("status=ok", 33), ("range=all", 50), (f"start={NOW - 1e6}&end={NOW - 180000}", 0)):
        for sort in ("time", "latency"):
            rows, total = pages_of(site, f"{query}&sort={sort}", 20)
            assert len(rows) == total == count


def test_health_tells_the_collectors_state_and_the_size_and_head_gives_the_same_head(site):
    put(site.store, at(1), rejects=[])
    health = site.json("/api/health")
    assert health["ok"] is True and health["version"] == app.__version__ and health["demo"] is False
    assert health["database"]["events"] == 1 and health["database"]["bytes"] > 4096
    head, nothing = site.ask("/api/health", "HEAD")
    assert (head.status, nothing, head.headers["Content-Type"]) == (200, b"", "application/json; charset=utf-8")
    assert int(head.headers["Content-Length"]) > 100
    site.status["state"] = "wrong_password"
    assert site.json("/api/health")["ok"] is False


def test_unchanged_answer_is_304_without_a_look_at_the_database(site):
    put(site.store, at(1))
    tag = site.ask(DAY)[0].headers["ETag"]
    again, body = site.ask(DAY, If_None_Match=tag)
    assert (again.status, body, again.headers["ETag"]) == (304, b"", tag)
    site.store.close()
    assert site.ask(DAY)[0].status >= 500
    for sent in (tag, "*", f"W/{tag}", f'"other", {tag}'):
        assert site.ask(DAY, If_None_Match=sent)[0].status == 304


def test_new_event_another_query_or_the_next_minute_changes_the_answer(site):
    tag = site.ask(DAY)[0].headers["ETag"]
    put(site.store, at(1), at(1))
    changed, body = site.ask(DAY, If_None_Match=tag)
    assert changed.status == 200 and json.loads(body)["summary"]["requests"] == 2
    next_tag = changed.headers["ETag"]
    assert site.ask("/api/summary?range=7d", If_None_Match=next_tag)[0].status == 200
    site.now += 60
    assert site.ask(DAY, If_None_Match=next_tag)[0].status == 200


def test_answer_is_compressed_where_the_client_takes_it(site):
    put(site.store, at(1))
    plain = site.ask("/api/summary?range=7d")[1]
    reply, packed = site.ask("/api/summary?range=7d", Accept_Encoding="gzip")
    assert reply.headers["Content-Encoding"] == "gzip" and gzip.decompress(packed) == plain and len(packed) < len(plain)
    assert reply.headers["Cache-Control"] == "private, no-cache"
    for path in ("/", "/api/summary?range=7d"):
        for accepted in ("gzip;q=0", "br, gzip; q=0.000", "identity", ""):
            assert "Content-Encoding" not in site.ask(path, Accept_Encoding=accepted)[0].headers
        for accepted in ("br, GZIP;q=0.5", "gzip, br;q=0", "gzip;q=0.001"):
            assert site.ask("/api/summary?range=7d", Accept_Encoding=accepted)[0].headers["Content-Encoding"] == "gzip"


def test_page_comes_with_a_policy_that_lets_only_its_own_parts_run(site):
    reply, body = site.ask("/")
    policy = reply.headers["Content-Security-Policy"]
    script = base64.b64encode(hashlib.sha256(b"1").digest()).decode()
    assert body.startswith(b"<!doctype html>") and reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert f"script-src 'sha256-{script}'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    for name, value in (("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")):
        assert reply.headers[name] == value
    assert site.ask("/", If_None_Match=reply.headers["ETag"])[0].status == 304


def test_kept_connection_answers_many_requests_also_pipelined_and_http_1_0_is_closed(site):
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=PATIENCE_S)
    for _ in range(3):
        connection.request("GET", "/api/health")
        assert json.loads(connection.getresponse().read())["ok"] is True
    connection.close()
    two = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2
    assert site.raw(two).count(b"HTTP/1.1 200 OK") == 2
    last = site.raw(b"GET /api/health HTTP/1.0\r\n\r\n")
    assert last.startswith(b"HTTP/1.1 200 ") and b"Connection: close" in last and last.endswith(b"}")


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/9.9\r\n\r\n", b"505"),
     (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"), (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400"),
     (b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n", b"431"), (b"GET / HTTP/1.1 extra\r\n\r\n", b"400"),
     (b"GET http://[/api/health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
     (b"GET /?" + b"a=1&" * 60 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400")],
    ids=["nonsense", "version", "many-headers", "tls", "long-line", "extra-word", "no-address", "many-parameters"],
)  # fmt: skip
def test_bytes_that_are_no_request_get_a_clear_answer(site, data, status):
    reply = site.raw(data)
    assert reply.startswith(b"HTTP/1.1 " + status) and b'"error":' in reply and b"Traceback" not in reply
    assert site.log.read_text() == ""


@pytest.mark.parametrize(("length", "statuses"), [(16_000, [b"200", b"200"]), (16_500, [b"431"])])
def test_head_may_be_16_kib_all_lines_together(site, length, statuses):
    head = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n" + b"A: 45678901234567890123456789012345678\r\n" * 90
    head += b"B: " + b"x" * (length - len(head)) + b"\r\n\r\n"
    assert re.findall(rb"HTTP/1.1 (\d+)", site.raw(head * 2)) == statuses


@pytest.mark.parametrize("head", [b"GET /api/qu", b"GET /api/quota?force=1 HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a"])
def test_head_that_was_cut_short_is_no_request(pool, head):
    assert pool.raw(head) == b"" and pool.json("/api/quota")["last_refresh"] is None


@pytest.mark.parametrize(("start", "headers", "status"), [
    (b"POST /api/health", b"Content-Length: 3000000", b"405"),
    (b"POST /api/health", b"Transfer-Encoding: chunked", b"405"),
    (b"GET /api/health", b"Content-Length: 3000000", b"200"), (b"GET /" + b"x" * 60_000, b"", b"431"),
    (b"GET /api/health", b"Content-Length: 0\r\nContent-Length: 3000000", b"200"),
])  # fmt: skip
def test_what_is_sent_on_is_never_taken_for_a_request_and_costs_nobody_the_answer(site, start, headers, status):
    sent = start + b" HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\nGET /api/quota HTTP/1.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE_S) as connection:
        connection.sendall(sent)
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
        for _ in range(20):
            connection.sendall(b"x" * 100_000)  # the answer's end must be no reset
    assert reply.startswith(b"HTTP/1.1 " + status) and b"Connection: close" in reply
    assert reply.count(b"HTTP/1.1 ") == 1


def clients_of(site, count):
    return [socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE_S) for _ in range(count)]


@contextmanager
def long_answer(site, chatgpt, folder):
    """Let an answer be made meanwhile, which is given in the end; yields who waits for it."""
    write_account(folder)
    chatgpt.answer("tok-secret-1", body={"plan_type": "plus"}, hold=True)
    (waiting,) = clients_of(site, 1)
    with waiting:
        waiting.sendall(b"GET /api/quota?force=1 HTTP/1.0\r\n\r\n")
        chatgpt.wait_for(lambda: chatgpt.requests)
        try:
            yield waiting
        finally:
            chatgpt.release()
        assert b"".join(iter(lambda: waiting.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")


def test_connection_limit_ends_the_longest_idle_and_none_whose_answer_is_being_made(site, tmp_path, chatgpt_here):
    with ExitStack() as stack:
        waiting = stack.enter_context(long_answer(site, chatgpt_here, tmp_path / "accounts"))
        clients = [waiting, *map(stack.enter_context, clients_of(site, 127))]
        assert site.json("/api/health")["ok"] is True and ended(clients) == [1]


def test_head_that_drips_is_given_up_but_no_answer_that_is_being_made(make_site, tmp_path, chatgpt_here):
    site = make_site(head_s=1.0)
    (slow,) = clients_of(site, 1)

    def is_given_up() -> bool:
        try:
            slow.sendall(b"G")
        except OSError:
            return True
        return ended([slow]) == [0]

    with long_answer(site, chatgpt_here, tmp_path / "accounts"), slow:
        chatgpt_here.wait_for(is_given_up)


@pytest.mark.parametrize("bound", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "0.0.0.0"])
def test_every_loopback_address_refuses_foreign_hosts(site, bound):
    site.json("/api/health")
    site.server.app.config = replace(site.config, dashboard_host=bound)
    for host in ("localhost:8320", "127.0.0.1:1", "[::1]:8320", "127.0.0.2"):
        assert site.ask("/api/health", Host=host)[0].status == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5:8320"):
        assert site.ask("/api/health", Host=host)[0].status == (200 if bound == "0.0.0.0" else 403)


def basic(password, user="anyone"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("path", ["/", "/api/summary", "/api/quota?force=1", "/api/health", "/nothing"])
def test_password_is_asked_for_on_every_route(make_site, path):
    site = make_site(dashboard_password="öpen: sesame")
    reply, body = site.ask(path)
    assert (reply.status, json.loads(body)["code"]) == (401, "password_needed")
    assert reply.headers["WWW-Authenticate"].startswith("Basic realm=")
    bearer = "Bearer öpen".encode().decode("latin-1")
    for wrong in (basic("x"), basic("öpen: sesame "), "Basic ???", bearer, "Basic"):
        assert site.ask(path, Authorization=wrong)[0].status == 401
    assert site.ask(path, Authorization=basic("öpen: sesame"))[0].status in (200, 404, 409)


def test_quota_has_the_columns_of_its_table_and_what_the_page_needs(site):
    put(site.store, at(1, source="an@example.com"))
    site.store.save_reading(reading(ts_epoch=NOW - 90, primary_reset_at="2026-11-01T15:00:00Z"))
    answer = site.json("/api/quota")
    row = answer["quotas"][0]
    columns = {column[1] for column in rows(site.store.path, "PRAGMA table_info(quota_snapshots)")} - {"last_at"}
    assert columns <= set(row) and {"state", "message", "age_seconds", "account"} <= set(row)
    assert (row["age_seconds"], row["account"], row["secondary_remaining_percent"]) == (90, "an@example.com", None)
    assert (answer["refreshing"], answer["progress"]) == (False, {"done": 0, "total": 0})
    assert (answer["cooldown_seconds"], answer["last_refresh"]) == (0, None)


def write_readings(store, *used_percents, every_s=300, plan="plus", email="an@example.com", reset_in=7200, **changes):
    """Save readings of the five hours, the last one now."""
    for number, used in enumerate(used_percents):
        when = NOW - (len(used_percents) - 1 - number) * every_s
        window = {"used-percent": str(used), "window-minutes": "300", "reset-at": str(NOW + reset_in)}
        headers = {"x-codex-plan-type": plan, **{f"x-codex-primary-{name}": text for name, text in window.items()}}
        row = app.reading_row(app.parse_quota(app.payload_of_headers(headers), when), (email, "#" + email), "", when)
        store.save_reading({**row, **changes})


def test_quota_says_how_long_it_lasts_for_an_account_and_for_the_pool(site):
    write_readings(site.store, 50, 52, 55, 58, 60)
    write_readings(site.store, 10, 10, 10, email="bo@example.com", reset_in=3600)
    answer = site.json("/api/quota")
    # 10 % in 20 minutes; 40 % take 80 more. The pool has 40 + 90 %, and one of its windows comes back in an hour.
    runs_out_at = app.utc_text(NOW + 4800)
    told = [row["windows"][0]["forecast"] for row in answer["quotas"]]
    assert told == [{"used_per_hour": 30, "runs_out_at": runs_out_at}, {"used_per_hour": 0, "runs_out_at": None}]
    reset = app.utc_text(NOW + 3600)
    assert answer["pool"] == [{"label": "5h", "accounts": 2, "remaining_percent": 65, "next_reset_at": reset,
                               "forecast": {"runs_out_at": None, "until": reset}}]  # fmt: skip


def test_quota_whose_reset_has_passed_is_due_and_neither_its_old_value_nor_full(site):
    write_readings(site.store, 100, reset_in=60)
    assert site.json("/api/quota")["quotas"][0]["state"] == "limited"
    site.now += 60
    (row,) = site.json("/api/quota")["quotas"]
    assert (row["state"], row["primary_used_percent"], row["primary_remaining_percent"]) == ("reset_due", None, None)
    (window,) = row["windows"]
    assert (window["due"], window["remaining_percent"], window["forecast"]) == (True, None, None)
    assert window["reset_at"] == row["primary_reset_at"] == app.utc_text(NOW + 60)
    assert site.json("/api/quota")["pool"] == []


@pytest.fixture
def pool(site, tmp_path, chatgpt_here):
    for number in range(3):
        write_account(tmp_path / "accounts", number)
        window = {"used_percent": 10 * number, "limit_window_seconds": 18000, "reset_after_seconds": 60}
        reply = {"plan_type": "plus", "rate_limit": {"primary_window": window}}
        chatgpt_here.answer(f"tok-secret-{number}", body=reply)
    return site


def test_forced_refresh_stores_every_account_and_locks_for_the_cool_down(pool, chatgpt):
    answer = pool.json("/api/quota?force=1")
    assert [row["primary_remaining_percent"] for row in answer["quotas"]] == [100, 90, 80]
    assert (answer["progress"], answer["cooldown_seconds"]) == ({"done": 3, "total": 3}, 300)
    assert answer["last_refresh"] == NOW
    reply, body = pool.ask("/api/quota?force=1")
    assert (reply.status, json.loads(body)["code"], reply.headers["Retry-After"]) == (429, "cooldown", "300")
    pool.now += 300.5
    assert pool.json("/api/quota?force=1")["last_refresh"] == pool.now
    assert len(chatgpt.requests) == 6


def test_refresh_that_is_running_is_409_and_shows_its_progress(pool, chatgpt):
    chatgpt.answer("tok-secret-1", body={"plan_type": "plus"}, hold=True)
    forcing = threading.Thread(target=pool.json, args=("/api/quota?force=1",))
    forcing.start()
    chatgpt.wait_for(lambda: len(chatgpt.requests) == 2)
    said = pool.error("/api/quota?force=1", 409)
    assert said == {"error": "refresh_quota: already running", "code": "refresh_running"}
    answer = pool.json("/api/quota")
    assert (answer["refreshing"], answer["progress"]) == (True, {"done": 1, "total": 3})
    assert [row["state"] for row in answer["quotas"]] == ["ok", "never", "never"]  # each is stored as it arrives
    chatgpt.release()
    forcing.join()
    assert pool.json("/api/quota")["refreshing"] is False


def test_head_and_other_sites_never_refresh(pool, chatgpt):
    assert pool.ask("/api/quota?force=1", "HEAD")[0].status == 200
    sites = [{"Origin": origin} for origin in ("null", "http://[", "http://evil.example")]
    sites += [{"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}, {"Referer": "http://evil.example/x"}]
    sites.append({"User_Agent": "Mozilla/5.0 (X11; Linux x86_64)"})  # an image without a referrer, over plain HTTP
    for headers in sites:
        assert pool.error("/api/quota?force=1", 403, **headers)["code"] == "foreign_site"
    assert chatgpt.requests == []
    own = {"Sec_Fetch_Site": "same-origin", "Origin": f"http://127.0.0.1:{pool.port}"}
    page = {"User_Agent": "Mozilla/5.0", "X_Requested_With": "usage-dashboard"}
    for headers in (own, page, {"User_Agent": "curl/8.5"}):
        assert pool.ask("/api/quota?force=1", **headers)[0].status == 200
        pool.now += 301


@pytest.mark.parametrize("host", ["x" * 300, "\x07", "é" * 70])
def test_host_that_cannot_be_bound_is_named(host):
    with pytest.raises(app.DashboardError, match='cannot be bound.*set "dashboard_host"'):
        app.make_server(host, 0)


def test_page_that_is_missing_is_named(tmp_path):
    with pytest.raises(app.DashboardError, match="page.html is missing"):
        app.load_page(tmp_path / "page.html")


# ---- many clients at once: who waits for whom


def put_long(store, count):
    """Store requests whose reasons are long to look through."""
    sample = [at(number / 100, failed=1, status_code=500, error="a" * 2000) for number in range(1000)]
    for _ in range(0, count, 1000):
        put(store, *sample)


@contextmanager
def searching(site, needle, clients):
    """Let so many clients search meanwhile, each for something of its own."""
    with ThreadPoolExecutor(clients) as pool:
        yield [pool.submit(site.ask, f"/api/requests?q={needle}{number}") for number in range(clients)]


def seconds_of(site, path):
    began = time.monotonic()
    site.json(path)
    return time.monotonic() - began


def test_search_that_finds_nothing_holds_up_no_summary(site):
    put_long(site.store, 4000)
    began = time.monotonic()
    with searching(site, "a" * 20, clients=6) as searches:
        beside_s = [seconds_of(site, f"/api/summary?range=24h&tz_offset={-15 * number}") for number in range(1, 4)]
    searches_s = time.monotonic() - began
    assert max(beside_s) < searches_s / 3 and {one.result()[0].status for one in searches} == {200}


def test_store_is_closed_at_once_also_under_searches(site):
    put_long(site.store, 10_000)
    needle = "a" * 30 + "b"
    took_s = seconds_of(site, f"/api/requests?q={needle}")
    with searching(site, needle, clients=24):
        site.json("/api/health")
        began = time.monotonic()
        site.store.close()
        assert time.monotonic() - began < took_s * 6
