"""Who and why: sums by client key and by failure, the filter for a key, and the owner's names."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from support import DATA, at, put, run_sql

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
