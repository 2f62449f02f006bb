"""Who and why: sums by client key and by failure, the filter for a key, and the owner's names."""

from __future__ import annotations

import itertools
import json
from urllib.parse import quote, urlencode

import pytest
from support import DATA, NOW, at, put, reading, run_sql

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


@pytest.mark.parametrize(("key", "masks"), [
    *((key, [AN, "… #4bdca8"]) for key in (AN, "… #4bdca8", "#4bdca8", "4bdca8", "4BDCA8")),
    *((key, []) for key in ("#aaaaaa", "sk-…1111", "%", "#")),
])  # fmt: skip
def test_key_filter_takes_mask_or_tag_for_sums_and_requests(site, key, masks):
    put(site.store, *[at(1, api_key=mask) for mask in ("… #4bdca8", AN, BO, "")])
    query = f"range=24h&key={quote(key)}"
    assert keys_of(site.json(f"/api/summary?{query}")) == ({AN: 2} if masks else {})
    assert [row["api_key"] for row in site.json(f"/api/requests?{query}")["requests"]] == masks
    assert keys_of(site.json(f"/api/summary?{query}&model=gpt-5.4&status=failed")) == {}


def test_requests_without_a_key_are_a_key_of_their_own(site):
    put(site.store, *[at(1, api_key=mask) for mask in (AN, "", "")])
    assert keys_of(site.json("/api/summary?range=24h&key=none")) == {None: 2}
    assert [row["api_key"] for row in site.json("/api/requests?range=24h&key=none")["requests"]] == [None, None]


@pytest.mark.parametrize("filters", [
    {}, {"account": "an@example.com"}, {"model": "b"}, {"key": "none"}, {"status": "failed"}, {"status": "429"},
    {"account": "an@example.com", "model": "a", "status": "ok"}, {"model": "none such", "key": AN},
])  # fmt: skip
def test_choices_of_a_filter_are_what_the_other_three_leave(site, filters):
    people, outcomes = (("an@example.com", "x1"), ("bo@example.com", "x2")), ((0, None), (1, 429), (1, 500), (1, 200), (1, None))
    kinds = itertools.product(people, "ab", (AN, ""), outcomes)
    put(site.store, *[at(1, source=mail, auth_index=index, model=model, api_key=key, failed=failed, status_code=code)
                      for n, ((mail, index), model, key, (failed, code)) in enumerate(kinds) for _ in range(n % 7 + 1)])
    choices = site.json(f"/api/summary?{urlencode({**filters, 'range': '24h', 'choices': 1})}")["choices"]
    for name, options in choices.items():
        numbers = [option["requests"] for option in options if option["value"] != "failed"]
        assert numbers == sorted(numbers, reverse=True)
        told = {option["value"]: option["requests"] for option in options}
        assert len(told) == len(options) == {"status": 4}.get(name, 2) or filters
        for value in {**told, filters.get(name): None} if name in filters else told:
            answer = site.json(f"/api/summary?{urlencode({**filters, 'range': '24h', name: value})}")
            assert answer["summary"]["requests"] == told.get(value, 0)


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


NAMES = {"#4BDCA8": " An's laptop ", "an@example.com": "Ops"}


def test_names_stand_beside_keys_and_accounts_everywhere_and_filter(site, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"names": NAMES}), encoding="utf-8")
    put(site.store, at(1, api_key="… #4bdca8"), at(1, api_key=BO, source="bo@example.com", auth_index="b"),
        at(1, api_key="", model="m"))  # fmt: skip
    site.store.save_reading(reading(account_id_tag=""))
    answer = site.json("/api/summary?range=24h")
    assert {row["key"]: row["name"] for row in answer["keys"]} == {"… #4bdca8": "An's laptop", BO: None, None: None}
    named = {"an@example.com": "Ops", "bo@example.com": None}
    assert {row["account"]: row["name"] for row in answer["accounts"]} == named
    assert [(row["account"], row["name"]) for row in site.json("/api/quota")["quotas"]] == [("an@example.com", "Ops")]
    listed = site.json("/api/requests")["requests"]
    assert {(row["account_name"], row["key_name"]) for row in listed} == {
        ("Ops", "An's laptop"), ("Ops", None), (None, None),
    }  # fmt: skip
    for asked, count in (("key=An's laptop", 1), ("account=Ops", 2), ("account=Ops&key=4bdca8", 1), ("key=Ops", 0)):
        query = quote(asked, safe="=&")
        assert site.json(f"/api/summary?range=24h&{query}")["summary"]["requests"] == count
        assert len(site.json(f"/api/requests?{query}")["requests"]) == count


def test_name_of_a_mail_with_several_accounts_is_followed_by_what_tells_them_apart(make_site):
    site = make_site(names={"an@example.com": "Ops"})
    put(site.store, *[at(1, account=account, auth_index=account) for account in ("#aaaaaa", "#bbbbbb")])
    rows = site.json("/api/summary?range=24h")["accounts"]
    assert {row["name"] for row in rows} == {"Ops (#aaaaaa)", "Ops (#bbbbbb)"}
    both = make_site(names={"an@example.com": "Ops", "an@example.com #bbbbbb": "Second"})
    assert {row["name"] for row in both.json("/api/summary?range=24h")["accounts"]} == {"Ops (#aaaaaa)", "Second"}
    assert both.json("/api/summary?range=24h&account=Second")["summary"]["requests"] == 1
    assert both.json("/api/summary?range=24h&account=Ops")["summary"]["requests"] == 2


def test_names_are_read_again_when_the_file_changes_and_one_with_faults_changes_nothing(site, tmp_path):
    path, query = tmp_path / "config.json", "/api/summary?range=24h"
    put(site.store, at(1, api_key=AN))

    def name_for(tag: str) -> tuple[int, str | None]:
        """Return what is answered to somebody who has the answer of this tag."""
        reply, body = site.ask(query, If_None_Match=tag)
        tags.append(reply.headers["ETag"])
        return reply.status, json.loads(body)["keys"][0]["name"] if body else None

    tags = [""]
    assert name_for("") == (200, None)
    for name in ("An's laptop", "An's phone, new"):
        path.write_text(json.dumps({"names": {"#4bdca8": name}}), encoding="utf-8")
        assert name_for(tags[-1]) == (200, name) and name_for(tags[-1]) == (304, None)
    for content, said in (("{", "not valid JSON"), ('{"names": {"#4bdca8": ""}}', "1 to 60 letters")):
        path.write_text(content, encoding="utf-8")
        assert [name_for(tags[-1]) for _ in range(3)] == [(304, None)] * 3 and name_for("") == (200, name)
        assert site.log.read_text().count(said) == 1
    path.unlink()
    assert name_for(tags[-1]) == (200, None)
