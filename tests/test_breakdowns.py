"""Who and why: sums by client key and by failure, the filter for a key, and the owner's names."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from support import DATA, NOW, at, put, run_sql

import usage_dashboard as app

AN, BO = "sk-…1111 #4bdca8", "AIz…0001 #3f9a2c"


@pytest.fixture
def site(make_site):
    return make_site()


def keys_of(answer) -> dict[str | None, int]:
    assert sum(row["requests"] for row in answer["keys"]) == answer["summary"]["requests"]
    return {row["key"]: row["requests"] for row in answer["keys"]}


def test_masks_with_one_tag_are_one_key_shown_with_the_fullest_and_requests_without_a_key_are_a_row(site):
    put(site.store, *[at(1, api_key=key, total_tokens=tokens) for key, tokens in
                      (("… #4bdca8", 70), (AN, 1), (BO, 5), ("", 300), ("", 1))])  # fmt: skip
    answer = site.json("/api/summary?range=24h")
    assert [(row["key"], row["requests"], row["total_tokens"]) for row in answer["keys"]] == [
        (None, 2, 301), (AN, 2, 71), (BO, 1, 5),
    ]  # fmt: skip
    assert not any("unknown" in row for row in answer["keys"])


@pytest.mark.parametrize("key", [AN, "… #4bdca8", "#4bdca8", "4bdca8", "4BDCA8"])
def test_key_filter_takes_mask_or_tag_for_sums_and_requests(site, key):
    put(site.store, *[at(1, api_key=mask) for mask in ("… #4bdca8", AN, BO, "")])
    query = f"range=24h&key={quote(key)}"
    assert keys_of(site.json(f"/api/summary?{query}")) == {AN: 2}
    assert {row["api_key"] for row in site.json(f"/api/requests?{query}")["requests"]} == {"… #4bdca8", AN}
    assert keys_of(site.json(f"/api/summary?{query}&model=gpt-5.4&status=failed")) == {}


@pytest.mark.parametrize("key", ["#aaaaaa", "sk-…1111", "%", "#"])
def test_unknown_key_has_no_sums_and_no_requests(site, key):
    put(site.store, at(1, api_key=AN), at(1, api_key=""))
    query = f"range=24h&key={quote(key)}"
    answer = site.json(f"/api/summary?{query}")
    assert (answer["summary"]["requests"], answer["keys"]) == (0, [])
    assert site.json(f"/api/requests?{query}")["requests"] == []


def test_sums_of_3_0_0_whose_key_and_reason_are_unknown_are_rows_of_their_own(make_site, tmp_path):
    run_sql(tmp_path / "usage.db", (DATA / "usage-3.0.0.sql").read_text(encoding="utf-8"))
    answer = make_site().json("/api/summary?range=all")
    (unknown,) = [row for row in answer["keys"] if row.get("unknown")]
    without = [row for row in answer["keys"] if row["key"] is None and "unknown" not in row]
    assert unknown["key"] is None and unknown["requests"] > 0 and len(without) == 1
    (failure,) = [row for row in answer["failures"] if row["status_code"] is None]
    assert failure["error"] is None and failure["requests"] > 0
    assert sum(row["requests"] for row in answer["failures"]) == answer["summary"]["failed"]


def test_failures_are_grouped_by_status_and_reason_most_frequent_first(site):
    put(site.store, at(1), *[
        at(hours, failed=1, status_code=status, error=error, source=source, auth_index=source[0])
        for hours, status, error, source in (
            (9, 429, "429 limit: try again in 5 s", "an@x.com"), (2.2, 429, "429 limit: try again in 77 s", "bo@x.com"),
            (3, 429, "429 limit: try again in 7 s", "bo@x.com"), (30, 503, "503 down", "an@x.com"),
            (1, None, None, "an@x.com"),
        )
    ])  # fmt: skip
    answer = site.json("/api/summary?range=24h")
    assert answer["failures"] == [
        {"status_code": 429, "error": "429 limit: try again in … s", "requests": 3, "last_at": NOW - 2.25 * 3600,
         "accounts": ["bo@x.com", "an@x.com"]},
        {"status_code": None, "error": None, "requests": 1, "last_at": NOW - 3600, "accounts": ["an@x.com"]},
    ]  # fmt: skip
    assert [row["status_code"] for row in site.json("/api/summary?range=24h&account=bo@x.com")["failures"]] == [429]
    assert [row["requests"] for row in site.json("/api/summary?range=7d&status=503")["failures"]] == [1]
    assert site.json("/api/summary?range=7d&status=ok")["failures"] == []


def test_fifty_of_many_failures_are_told_each_with_its_last_quarter_hour(site):
    words = [f"500 {chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(60)]
    put(site.store, *[at(24 * number + 5, failed=1, status_code=500, error=word) for number, word in enumerate(words)],
        *[at(24 * 70 + number / 9, failed=1, status_code=500, error=word) for number, word in enumerate(words[:-10])])
    failures = site.json("/api/summary?range=90d&bucket=auto")["failures"]
    assert [(row["error"], row["requests"], row["last_at"]) for row in failures] == [
        (word, 2, NOW - 86400 * number - 5 * 3600) for number, word in enumerate(words[:50])
    ]
