from __future__ import annotations

import hashlib
import itertools
import json

import pytest
from support import EXPECTED_SAMPLES, MALFORMED, SAMPLES, payload, record

import usage_dashboard as app


def parse_one(**changes) -> app.Event:
    parsed = app.parse_events([json.dumps(record(**changes)).encode()])
    assert parsed.rejects == [] and parsed.ignored == 0
    return parsed.events[0]


def test_samples_of_several_releases_become_the_expected_events():
    parsed = app.parse_events(SAMPLES)
    names = ("input_tokens", "output_tokens", "reasoning_tokens", "cached_tokens", "cache_write_tokens", "total_tokens")
    got = [(e.timestamp, e.context.source, e.model, *(getattr(e, name) for name in names)) for e in parsed.events]
    assert got == EXPECTED_SAMPLES
    assert (parsed.rejects, parsed.ignored) == ([], 1)  # the warm-up with "generate": false


def test_nothing_secret_of_the_samples_is_kept():
    kept = repr(app.parse_events(SAMPLES))
    secrets = ["sk-client", "AIzaSy", "09f646457a1c", "172.18.0.1", "10.1.2.3", "__cf_bm", "claude-cli", "req_FAKE"]
    for secret in secrets:
        assert any(secret in line.decode() for line in SAMPLES) and secret not in kept


def counts(input, output, **more):
    """Return counts as a proxy names them; `more` are those of other names, without their `_tokens`."""
    named = {"input": input, "output": output, **more}
    return {f"{name}_tokens": count for name, count in named.items() if count is not None}


@pytest.mark.parametrize(
    ("provider", "tokens", "expected"),  # (input, output, reasoning, total, cached, written)
    [
        ("codex", counts(100, 30, reasoning=12, cached=80, total=130, cache_read=0), (100, 30, 12, 130, 80, None)),
        ("codex", counts(100, 30, reasoning=12, total=142), (100, 30, 12, 142, None, None)),
        ("openai-compat", counts(100, 30, total=0), (100, 30, None, 130, None, None)),
        ("gemini", counts(100, 30, reasoning=12, total=0), (100, 42, 12, 142, None, None)),
        ("antigravity", counts(100, 30, reasoning=12, total=142), (100, 42, 12, 142, None, None)),
        ("claude", counts(10, 5, reasoning=0, cache_read=100, cache_creation=7, cached=100, total=15),
         (117, 5, 0, 122, 100, 7)),
        ("claude", counts(10, 5, reasoning=0, cache_read=100, cache_creation=7, cached=100, total=122),
         (117, 5, 0, 122, 100, 7)),
        ("Claude", counts(10, 5, reasoning=0, cache_read=0, cache_creation=7, cached=7, total=0), (17, 5, 0, 22, 0, 7)),
        ("claude", counts(10, 5, reasoning=0, cached=100, total=15), (110, 5, 0, 115, 100, None)),
        ("codex", counts(-1, 5, total=5), (None, 5, None, 5, None, None)),
        ("codex", {}, (None, None, None, None, None, None)),
        ("codex", counts(10**12, None), (10**12, None, None, 10**12, None, None)),
        # cache above the input, an unknown input, and names and modes of forks
        ("codex", counts(100, 30, cached=80, cache_creation=40, total=130), (220, 30, None, 250, 80, 40)),
        ("codex", counts(100, 30, cached=80, cache_creation=20, total=130), (100, 30, None, 130, 80, 20)),
        ("codex", counts(100, 30, cached=101, total=231), (201, 30, None, 231, 101, None)),
        ("openai-compat", counts(None, 5, cached=7, total=5), (7, 5, None, 12, 7, None)),
        ("codex", counts(None, None, read=100, write=30, reasoning=12, cache_read=80, total=130),
         (100, 30, 12, 130, 80, None)),
        ("codex", {**counts(10, 5, cached=8, total=15), "cache_input_mode": "Separate_From_Input"},
         (18, 5, None, 23, 8, None)),
        ("claude", {**counts(117, 5, cache_read=100, total=122), "cache_input_mode": "included_in_input"},
         (117, 5, None, 122, 100, None)),
        ("codex", {**counts(1, 2, total=3), "token_usage_source": "x" * 5_000_000, "detail": {"a": [1]}},
         (1, 2, None, 3, None, None)),
    ],
)  # fmt: skip
def test_tokens_have_one_meaning_for_every_provider(provider, tokens, expected):
    assert_tokens(expected, provider=provider, tokens=tokens)


def assert_tokens(expected, **sent):
    event = parse_one(**sent)
    assert (event.input_tokens, event.output_tokens, event.reasoning_tokens, event.total_tokens) == expected[:4]
    assert (event.cached_tokens, event.cache_write_tokens) == expected[4:]


def breakdown(**changes):
    base = {
        "schema_version": 2, "quality": "complete", "total_tokens": 60, "unclassified_tokens": 0,
        "input": {"total_tokens": 40, "uncached_tokens": 10, "cache_read_tokens": 25, "cache_write_tokens": 5},
        "output": {"total_tokens": 20, "non_reasoning_tokens": 12, "reasoning_tokens": 8},
    }  # fmt: skip
    return {**base, **changes}


PLAIN = counts(1, 2, reasoning=0, cached=0, total=3)


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, (40, 20, 8, 60, 25, 5)),
    *((changes, (1, 2, 0, 3, 0, None)) for changes in (
        {"schema_version": 3}, {"quality": "inconsistent"}, {"input": None}, {"output": {}}, {"total_tokens": "60"},
        {"input": {"total_tokens": 29, "cache_read_tokens": 25, "cache_write_tokens": 5}},
    )),
])  # fmt: skip
def test_complete_breakdown_wins_over_the_plain_counts_and_no_other(changes, expected):
    assert_tokens(expected, provider="claude", tokens=PLAIN, token_breakdown=breakdown(**changes))


NO_OBJECTS = [7, [1, 2], [b"a", [b"b"]], None, 1.5, "text", json.loads("[" * 90 + "]" * 90)]
REJECTED = [*MALFORMED, *((odd, "not a JSON object") for odd in NO_OBJECTS)]
REJECTED.append((app.Oversized(9_000_000), "larger than an event"))
LOG_LINE = b'{"timestamp": "2026-11-20T09:14:22Z", "level": "info", "message": "hello", "source": "app"}'
REJECTED.append((LOG_LINE, "nothing of a usage record"))


@pytest.mark.parametrize(("raw", "reason"), REJECTED, ids=range(len(REJECTED)))
def test_value_that_is_no_event_is_parked_with_its_reason_and_its_neighbours_kept(raw, reason):
    parsed = app.parse_events([SAMPLES[0], raw, SAMPLES[2]])
    assert [event.model for event in parsed.events] == ["gpt-5.3-codex", "gpt-5.4"]
    assert len(parsed.rejects) == 1 and reason in parsed.rejects[0].reason
    if isinstance(raw, (bytes, app.Oversized)):
        assert parsed.rejects[0].length == (raw if isinstance(raw, app.Oversized) else len(raw))


@pytest.mark.parametrize(("source", "kept"), [
    ("an.nguyen@gmail.com", "an.nguyen@gmail.com"), ("", ""), ("short", "… #f9b007"), ("not@mail", "… #"),
    ("sk-proj-0123456789abcdef", "sk-…cdef #"), ("a b@c.de", "… #"),
])  # fmt: skip
def test_source_that_may_be_a_key_is_masked(source, kept):
    masked = parse_one(source=source).context.source
    assert masked.startswith(kept) and (source == "" or "@" in kept or source not in masked)


@pytest.mark.parametrize(("status", "body", "said"), [
    (429, '{"error":{"type":"usage_limit_reached","message":"The usage limit has been reached","resets_at":1}}',
     "429 usage_limit_reached: The usage limit has been reached"),
    (529, '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}',
     "529 overloaded_error: Overloaded"),
    (429, '[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"Quota"}}]', "429 RESOURCE_EXHAUSTED: Quota"),
    (402, '{"detail":{"code":"deactivated_workspace"}}', "402 deactivated_workspace"),
    (401, '{"detail":"Unauthorized"}', "401 Unauthorized"), (502, "<html>secret prompt</html>", "502 Bad Gateway"),
    (500, 'Post "https://a.b/c": dial tcp 10.1.2.3:443: connect: connection refused', "500 connection refused"),
    (500, 'Post "https://a.b/c?key=AIzaSy1": proxyconnect tcp: dial tcp 10.1.2.3:1: connect: connection refused',
     "500 egress proxy: connection refused"),
    (500, 'Get "https://a.b": socks connect tcp p:1->a.b:443: dial tcp: lookup p on 10.0.0.1:53: no such host',
     "500 egress proxy: no such host"),
    (500, "proxyconnect tcp: EOF", "500 egress proxy: stream broken off"),
    (500, 'Post "https://a.b": socks connect tcp p:1->a.b:443: unknown error host unreachable',
     "500 egress proxy: no connection"),
    (500, 'Post "https://a.b": Proxy Authentication Required', "500 egress proxy: login refused"),
    (500, "dial tcp: lookup a.b on 10.0.0.1:53: server misbehaving", "500 no such host"),
    (500, "dial tcp 10.1.2.3:443: connect: network is unreachable", "500 network is unreachable"),
    (500, "dial tcp 10.1.2.3:443: connect: connection timed out", "500 no answer in time"),
    (500, 'Post "https://a.b": net/http: request canceled (Client.Timeout exceeded while awaiting headers)',
     "500 no answer in time"), (500, "http2: timeout awaiting response headers", "500 no answer in time"),
    (500, 'Post "https://a.b": stream error: stream ID 5; INTERNAL_ERROR; received from peer',
     "500 stream broken off"), (500, "http2: server sent GOAWAY and closed the connection", "500 stream broken off"),
    (500, "read tcp 10.1.2.3:5: read: connection reset by peer", "500 connection reset"),
    (504, 'Post "https://a.b": context deadline exceeded (Client.Timeout exceeded while awaiting headers)',
     "504 no answer in time"), (500, 'Post "https://a.b/c": unexpected EOF', "500 stream broken off"),
    (500, 'Post "https://a.b": tls: failed to verify certificate: x509: certificate is valid for c, not a.b',
     "500 TLS failure"), (500, 'Post "https://a.b/c": context canceled', "500 client left"),
    (408, "stream error: stream disconnected before completion: my prompt", "408 stream broken off"),
    (500, "claude executor: upstream returned error event: my prompt", "500 error within the stream"),
    (500, "context canceled: my prompt", "500 Internal Server Error"), (499, "", "499 client left"),
    (200, "", "200 stream broken off"), (999, None, "999"), (None, "x", None),
    (400, '{"error":{"message":"key sk-proj-aa1234567890 of bob@x.org at 10.1.2.3 is bad"}}',
     "400 key … of … at … is bad"),
    (400, '{"error":{"message":"organization limit of skilled users"}}', "400 organization limit of skilled users"),
    (400, json.dumps({"error": {"code": "bad", "message": "word " * 500}}), ("400 bad: " + "word " * 31)[:159] + "…"),
])  # fmt: skip
def test_reason_of_a_failure_is_short_and_without_secrets(status, body, said):
    assert app.failure_reason(status, body) == said


def test_no_secret_shows_wherever_it_stands_in_a_message():
    secrets = ["bob@mail.example.org", "sk-abcde", "AbCd-EfGh-IjKl-MnOp-1", "10.1.2.3", "2001:db8::7:8", "eyJhbGciOi"]
    for first, second, third in itertools.permutations(secrets, 3):
        for glue in (" ", ", ", "/", "=", '"', "'", "(", ")", "; ", "<", ">", "\n", "…"):
            said = app.without_secrets(f"bad key{glue}{first}{glue}{second}{glue}{third}{glue}", 999)
            assert not any(secret in said for secret in (first, second, third)), said


@pytest.mark.parametrize(("changes", "expected"), [
    ({"failed": True}, (1, None, None)), ({"failed": None}, (0, None, None)),
    ({"failed": None, "fail": {"status_code": 503, "body": ""}}, (1, 503, "503 Service Unavailable")),
    ({"outcome": "canceled", "fail": {"status_code": 499, "body": ""}}, (1, 499, "499 client left")),
    ({"outcome": "cancelled", "fail": None}, (1, 499, "499 client left")), ({"outcome": "success"}, (0, None, None)),
    ({"outcome": "failed", "error_message": "my prompt"}, (1, None, None)),
    ({"failed": True, "fail": {"status_code": 500}, "error_message": 'Post "https://a.b": EOF'},
     (1, 500, "500 stream broken off")),
    ({"failed": True, "fail": {"status_code": 429, "error_code": "usage_limit_reached", "reset_at": 1795688024}},
     (1, 429, "429 usage_limit_reached")),
    ({"failed": True, "fail": {"status_code": 429, "error_code": "my prompt"}}, (1, 429, "429 Too Many Requests")),
])  # fmt: skip
def test_failure_is_understood_in_the_words_of_every_proxy(changes, expected):
    event = parse_one(**changes)
    assert (event.failed, event.status_code, event.error) == expected


def test_warm_up_is_one_without_tokens_and_control_messages_are_no_events():
    zero, some = counts(0, 0, total=0), counts(7, 0, total=7)
    messages = [b'{"heartbeat":true}', b'{"support_refresh":true}', b'{"timestamp":true}', b'{"refresh":1}']
    warm_ups = [payload(n, generate=False, tokens=tokens) for n, tokens in enumerate([zero, some, {}])]
    failed = payload(3, generate=False, tokens=zero, failed=True)
    parsed = app.parse_events([*messages, *warm_ups, failed])
    assert [event.request_id for event in parsed.events] == ["r1", "r3"]
    assert (parsed.ignored, len(parsed.rejects)) == (4, 2)
    headers = {"X-Codex-Plan-Type": ["plus"]}
    assert parse_one(generate=False, tokens=some, response_headers=headers).quota_headers is not None


V8 = {"stream": True, "resolved_client_ip": "203.0.113.7", "execution_id": "0d3c1c5e-1111", "trace_id": "trace-secret",
      "session_id": "session-secret", "parent_session_id": None, "node_kind": "leaf-secret", "is_fork": True,
      "is_compaction": True, "response_model": "other-model", "metadata": {"a": ["secret" * 500_000]},
      "request_body": "secret" * 500_000, "first_byte_latency_ms": 12, "user_id": "user-secret"}  # fmt: skip


def test_new_keys_of_version_8_and_forks_are_harmless_and_not_kept():
    plain = record(request_id="r", service_tier="auto", response_service_tier="priority")
    raw = json.dumps({**plain, **V8}).encode()
    stamped = (1_795_688_024_000_000_000).to_bytes(8, "big") + json.dumps(plain).encode()
    expected = app.parse_events([plain]).events
    assert expected[0].context.service_tier == "priority" and expected[0].ttft_ms is None
    assert parse_one(service_tier="auto", response_service_tier=None).context.service_tier == "auto"
    for one in (raw, app.compact(raw), stamped):
        assert app.parse_events([one, SAMPLES[0]]).events[:1] == expected
    rejected = app.parse_events([json.dumps({**plain, **V8, "timestamp": None}).encode()]).rejects[0].event
    assert "secret" not in rejected and "203.0.113.7" not in rejected


@pytest.mark.parametrize(("sent", "mask"), [  # the SHA-256 of sk-client-aaaa-1111 begins with 4bdca8
    ({"api_key": "sk-client-aaaa-1111", "api_key_hash": "x"}, "sk-…1111 #4bdca8"),
    ({"api_key_hash": hashlib.sha256(b"sk-client-aaaa-1111").hexdigest()}, "… #4bdca8"),
    ({"api_key": "", "api_key_hash": "4BDCA800"}, "… #4bdca8"), ({"api_key_hash": "short"}, "… #f9b007"),
    ({"api_key_hash": ["4bdca8"]}, ""),
])  # fmt: skip
def test_hash_of_a_key_has_the_tag_of_the_key(sent, mask):
    assert parse_one(**sent).context.api_key == mask


def test_headers_of_a_failure_without_a_reply_are_not_its_own():
    headers = {"X-Codex-Primary-Used-Percent": ["100"]}
    bodies = ['Post "https://a.b": connect: connection refused', "stream error: stream disconnected", '{"error": "no"}']
    failures = [{"failed": True, "fail": {"status_code": 429, "body": body}} for body in bodies]
    kept = [parse_one(response_headers=headers, **failure).quota_headers for failure in failures]
    assert [bool(one) for one in kept] == [False, True, True]


@pytest.mark.parametrize(("by_values", "sent", "ignored"), [
    (False, [{"execution_id": "a"}, {"execution_id": "b"}, {"execution_id": "a", "latency_ms": 11}], 1),
    (False, [{"execution_id": "a"}, {"execution_id": "a", "model": "image"}, {}, {}, {"execution_id": ["a"]}], 0),
    (False, [{"execution_id": name} for name in "abca"], 0),  # two are remembered
    (True, [{}, {}, {"latency_ms": 11}, {"auth_index": "cd"}, {}], 1),
    (True, [{}, {"timestamp": "2026-08-22T13:00:00.000000001Z"}, *[{"tokens": counts(1, 2)}] * 2], 1),
])  # fmt: skip
def test_event_that_comes_again_is_ignored(by_values, sent, ignored):
    recent = app.Recent(most=2)
    recent.by_values = by_values
    parts = [app.parse_events([json.dumps(record(**one)).encode()], recent=recent) for one in sent]
    assert sum(part.ignored for part in parts) == ignored
    assert sum(len(part.events) for part in parts) == len(sent) - ignored


def test_reject_keeps_the_event_masked_as_a_good_one_would_be():
    secrets = {"source": "sk-upstream-secret-0001", "api_key": "sk-client-secret-0002", "client_ip": "10.1.2.3",
               "tokens": {"input_tokens": "sk-hidden-secret-0003"}}  # fmt: skip
    bad = record(timestamp="never", fail={"status_code": 400, "body": "my prompt"}, **secrets)
    reject = app.parse_events([json.dumps(bad).encode()]).rejects[0]
    kept = json.loads(reject.event)
    assert kept["model"] == "gpt-5.4" and kept["source"].startswith("sk-…0001 #")
    assert kept["fail"] == {"status_code": 400}
    for secret in ("upstream", "secret", "hidden", "prompt", "10.1.2.3"):
        assert secret not in reject.event


def test_reject_is_json_that_any_program_reads_and_has_no_secret_in_a_name():
    odd = b'{"timestamp": "never", "latency_ms": 1e400, "tokens": {"sk-hidden-secret-0003": -1e400, "a": 9}}'
    for raw in (odd, {"timestamp": float("nan"), "tokens": {"bob@mail.example.org": 1, "n": float("inf")}}):
        kept = app.parse_events([raw]).rejects[0].event
        assert "number" in json.dumps(json.loads(kept, parse_constant=lambda name: pytest.fail(name)))
        assert "hidden" not in kept and "bob" not in kept


def test_odd_letters_cannot_break_the_store_or_a_terminal():
    event = parse_one(model="a\x00b\ud800c", alias="модель-快速-🚀")
    assert event.model == "a\ufffdb\ufffdc" and event.context.alias == "модель-快速-🚀"


QUOTA_HEADERS = {"X-Codex-Plan-Type": ["Plus "], "X-Codex-Primary-Used-Percent": ["42", "43"]}


def test_quota_headers_of_a_codex_reply_are_kept_and_no_other_header():
    others = {"Set-Cookie": ["__cf_bm=secret"], "X-Request-Id": ["r-1"], "X-Codex-Odd": "text", "X-Codex-None": []}
    event = parse_one(response_headers={**QUOTA_HEADERS, **others, "X-Codex-Long": ["9" * 500]})
    kept = {"x-codex-plan-type": "Plus ", "x-codex-primary-used-percent": "42", "x-codex-long": "9" * 100}
    assert (event.quota_headers, event.plan) == (kept, "plus")
    assert parse_one(failed=True, response_headers=QUOTA_HEADERS).plan == ""  # perhaps of another account


@pytest.mark.parametrize("changes", [
    {"provider": "claude", "response_headers": QUOTA_HEADERS}, {"response_headers": {"Set-Cookie": ["__cf_bm=secret"]}},
    {"response_headers": {f"X-Codex-{number}": ["1"] for number in range(81)}}, {},
    {"response_headers": {"X-Codex-Plan-Type": [7]}}, {"response_headers": ["X-Codex-Plan-Type"]},
])  # fmt: skip
def test_reply_without_sound_quota_headers_of_codex_has_none(changes):
    event = parse_one(**changes)
    assert (event.quota_headers, event.plan) == (None, "")


def identity(number, index, source, *, plan="", first=0.0, last=100.0, provider="codex"):
    return app.Identity(number, index, source, "", provider, plan, first, last)


def names(*identities):
    return {account.name: sorted(account.identity_ids) for account in app.resolve_accounts(identities)}


OLD_LOGIN = identity(1, "aa", "a@x.com", plan="plus", first=0, last=5000)
NEW_LOGIN = identity(2, "bb", "a@x.com", plan="plus", first=5100, last=9000)


@pytest.mark.parametrize(("identities", "accounts"), [
    ([identity(1, "aa", "old@x.com", last=10), identity(2, "aa", "new@x.com", first=10, last=20),
      identity(3, "aa", "sk-…1111 #4bdca8", first=20, last=30)], {"new@x.com": [1, 2, 3]}),
    ([identity(1, "", "AIz…0001 #8d9271"), identity(2, "bb", "")], {"AIz…0001 #8d9271": [1], "index bb": [2]}),
    ([identity(1, "aa", "a@x.com"), identity(2, "bb", "a@x.com", provider="claude")],
     {"a@x.com (codex)": [1], "a@x.com (claude)": [2]}),
    ([identity(1, "aa", "a@x.com", plan="plus", last=9999), identity(2, "bb", "a@x.com", plan="team", last=9999)],
     {"a@x.com (plus)": [1], "a@x.com (team)": [2]}),
    ([OLD_LOGIN, NEW_LOGIN], {"a@x.com": [1, 2]}),
], ids=["last mail", "no mail", "two providers", "two plans at once", "new login"])  # fmt: skip
def test_account_is_named_by_the_last_mail_of_an_index_else_its_source_and_told_from_others(identities, accounts):
    assert names(*identities) == accounts


@pytest.mark.parametrize(("changes", "begin"), [({"plan": "team"}, "a@x.com ("), ({"provider": "claude"}, "a@x.com ("),
                                                ({"first_at": 0.0}, "a@x.com (#")])  # fmt: skip
def test_index_of_another_plan_or_provider_or_at_the_same_time_is_another_account(changes, begin):
    both = names(OLD_LOGIN, NEW_LOGIN._replace(**changes))
    assert sorted(both.values()) == [[1], [2]] and all(name.startswith(begin) for name in both)


def test_counts_are_limited_before_and_after_they_are_added():
    claude = {"input_tokens": 9 * 10**11, "output_tokens": 1, "cache_read_tokens": 9 * 10**11}
    assert "larger than 10^12" in app.parse_events([payload(tokens=claude, provider="claude")]).rejects[0].reason
    assert app.parse_events([payload(tokens={"input_tokens": 10**12})]).events[0].total_tokens == 10**12


def test_large_event_is_kept_small_and_read_the_same():
    error = json.dumps({"error": {"code": "too_long", "message": "input"}})
    headers = {"X-Codex-Plan-Type": ["plus"], "Set-Cookie": ["x" * 10_000]}
    changes = {"failed": True, "fail": {"status_code": 400, "body": error}, "response_headers": headers}
    changes["provider"] = "codex"
    raw = payload(1, junk="x" * 7_000_000, **changes)
    small = app.compact(raw)
    assert len(json.dumps(small)) < 2000
    assert app.parse_events([small]).events == app.parse_events([raw]).events
    huge_body = app.compact(payload(2, failed=True, fail={"status_code": 400, "body": "{" * 300_000}))
    assert app.parse_events([huge_body]).events[0].error == "400 Bad Request" and len(json.dumps(huge_body)) < 2000


@pytest.mark.parametrize("raw", [b"[" * 20_000, b"x" * 20_000, b"7" * 20_000, json.dumps(["x" * 20_000]).encode()])
def test_large_value_that_is_no_object_is_parked_with_its_length(raw):
    (reject,) = app.parse_events([app.compact(raw)]).rejects
    assert reject.length == len(raw)


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 10**6])
def test_array_is_split_into_elements_wherever_its_pieces_end(size):
    elements = [b"1", b'"a,]\\\""', b'{"x":[1,{"y":"}\\\\"}]}', b"[" * 900 + b"]" * 900, b'"\xff"', payload(1)]
    whole = b"[" + b" , ".join(elements) + b"]\n"
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert [part.strip() for part in app.elements_of(pieces)] == elements
    assert [type(part) for part in app.elements_of(pieces, 50)] == [bytes] * 3 + [app.Oversized, bytes, app.Oversized]
    assert list(app.elements_of([b"[ ]"])) == []


@pytest.mark.parametrize("broken", [b"", b"{", b"[1", b"seven", b'{"a": [1]}', b'["]', b"null"])
def test_array_that_is_none_has_no_elements(broken):
    with pytest.raises(ValueError):
        list(app.elements_of([broken]))
