from __future__ import annotations

import random

import pytest
from support import NOW, at, put

import usage_dashboard as app

OWN = {"My-Model": {"input": 1, "output": 3}, "gpt-5.5": {"input": 10, "cached": 0, "cache_write": None, "output": 60}}
# Model, input (with what was cached and written), cached, written, output; then what that is in millionths of a dollar.
REQUESTS = [
    ("gpt-5.3-codex", 15_230, 14_080, None, 812, 1_150 * 1.75 + 14_080 * 0.175 + 812 * 14),
    ("gpt-5.4", 90_122, 88_000, 0, 3_021, 2_122 * 2.5 + 88_000 * 0.25 + 3_021 * 15),
    ("gpt-5.4", None, None, None, None, 0),
    ("GPT-5.4-2026-03-05", 1_000, None, None, 10, 1_000 * 2.5 + 10 * 15),
    ("gpt-5.4-pro", 1_000, 400, None, 100, 600 * 30 + 400 * 30 + 100 * 180),  # no price of its own for cached ones
    ("gpt-5.6-terra", 10_000, 2_000, 3_000, 500, 5_000 * 2 + 2_000 * 0.2 + 3_000 * 2.5 + 500 * 12),
    ("gpt-5.2", 1_000, 600, 100, 0, 300 * 1.75 + 600 * 0.175 + 100 * 1.75),  # nor for written ones
    ("claude-sonnet-4-6", 50_266, 48_210, 2_044, 1_840, 12 * 3 + 48_210 * 0.3 + 2_044 * 3.75 + 1_840 * 15),
    ("claude-sonnet-4-5-20250929", 20_000, 0, 20_000, 7, 20_000 * 3.75 + 7 * 15),
    ("claude-opus-4-5@20251101", 900, 800, 0, 1, 100 * 5 + 800 * 0.5 + 1 * 25),
    ("gemini-2.5-pro", 1_000, 400, None, 420, 600 * 1.25 + 400 * 0.125 + 420 * 10),
    ("gemini-3.1-pro-high", 2_000, 0, None, 30, 2_000 * 2 + 30 * 12),  # the proxy's name of gemini-3.1-pro-preview
    ("MiniMax-M2.5", 500, 100, 300, 20, 100 * 0.3 + 100 * 0.03 + 300 * 0.375 + 20 * 1.2),
    ("my-model-20260131", 1_000, 300, 200, 10, 500 * 1 + 300 * 1 + 200 * 1 + 10 * 3),
    ("gpt-5.5", 1_000, 900, 50, 10, 50 * 10 + 900 * 0 + 50 * 10 + 10 * 60),
    ("gpt-5.4-mini", 10, 50, 5, 1, 50 * 0.075 + 5 * 0.75 + 1 * 4.5),  # an odd row, whose cache is larger than its input
    *((model, 100, 0, 0, 1, None) for model in
      ("gpt-5.4-turbo", "gpt-5.4-2026", "gpt-5-20261301", "gpt-5-12345678", "gpt", "claude-sonnet-4", "-20260101", "")),
]  # fmt: skip


@pytest.fixture
def site(make_site):
    return make_site(prices=OWN)


def request_of(minutes, model, into, cached, written, out, *_, **changes):
    counts = dict(input_tokens=into, cached_tokens=cached, cache_write_tokens=written, output_tokens=out)
    return at(1 + minutes / 60, model=model, **counts, total_tokens=(into or 0) + (out or 0), **changes)


def dollars(millionths):
    return pytest.approx(millionths / 1e6, rel=1e-9, abs=1e-12)


def test_each_request_and_their_sum_has_the_list_price_worked_out_by_hand(site):
    put(site.store, *(request_of(number, *case) for number, case in enumerate(REQUESTS)))
    costs = [row["cost_usd"] for row in site.json("/api/requests")["requests"]]
    assert costs == [usd if usd is None else dollars(usd) for *_, usd in REQUESTS]
    answer = site.json("/api/summary?range=24h")
    assert answer["prices_as_of"] == "2026-11" and "cost_usd" not in answer["hours"][0]
    whole = (dollars(sum(usd or 0 for *_, usd in REQUESTS)), 8 * 101)
    assert (answer["summary"]["cost_usd"], answer["summary"]["unpriced_tokens"]) == whole
    of_model = {row["model"]: (row["cost_usd"], row["unpriced_tokens"]) for row in answer["models"]}
    assert of_model["gpt-5.5"] == (dollars(1_600), 0) and of_model["gpt-5.4-turbo"] == (None, 101)


@pytest.mark.parametrize("query", ["", "&model=gpt-5.5", "&status=failed", "&account=a@x.com", f"&start={NOW - 9000}"])
def test_list_price_of_every_breakdown_adds_up_to_the_whole(site, query):
    dice = random.Random(query)
    put(site.store, *[
        request_of(number, dice.choice(["gpt-5.4", "gpt-5.5", "claude-opus-5", "of-my-own"]),
                   *(dice.choice([None, *range(0, 9000, 700)]) for _ in range(4)), failed=number % 2,
                   **dice.choice([{}, {"source": "a@x.com", "auth_index": "a"}]), api_key=dice.choice(["", "sk-…1111 #4bdca8"]))
        for number in range(400)
    ])  # fmt: skip
    answer = site.json(f"/api/summary?range=24h{query}")
    whole = answer["summary"]
    assert whole["cost_usd"] > 0 and (whole["unpriced_tokens"] > 0) == ("model=" not in query)
    for part in {"models", "accounts", "keys"} & set(answer):
        assert sum(row["cost_usd"] or 0 for row in answer[part]) == pytest.approx(whole["cost_usd"], rel=1e-7)
        assert sum(row["unpriced_tokens"] for row in answer[part]) == whole["unpriced_tokens"]


def test_built_in_list_is_whole_and_none_of_its_prices_is_out_of_order():
    prices = app.list_prices()
    assert len(prices) == 82 + 4
    for model, (into, cached, written, out) in prices.items():
        assert 0 < cached <= into <= out and into <= written <= into * 1.25 and model == model.lower()
