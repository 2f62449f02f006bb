"""What governs an account: meters of single models, budgets, credits, and the windows that Claude's replies tell."""

from __future__ import annotations

import json
import re

import pytest
from support import DATA, NOW, Site, record, write_account

import usage_dashboard as app

AN = "an@example.com"
SPARK = "GPT-5.3-Codex-Spark"
FAILED = {"failed": True, "fail": {"status_code": 429, "body": '{"error": {"type": "usage_limit_reached"}}'}}


def case(name: str):
    """Return a shape from the field; in it ``@+N`` is NOW + N in epoch seconds, ``$@+N`` the same as text."""
    text = json.dumps(json.loads((DATA / "quota-cases.json").read_text(encoding="utf-8"))[name])
    text = re.sub(r'"\$@\+(\d+)"', lambda match: f'"{int(NOW) + int(match[1])}"', text)
    return json.loads(re.sub(r'"@\+(\d+)"', lambda match: str(int(NOW) + int(match[1])), text))


class Field(Site):
    """A dashboard with one account's file, which is refreshed, and whose requests come, at seconds after NOW."""

    def __init__(self, folder):
        super().__init__(folder)
        (folder / "accounts").mkdir()
        write_account(folder / "accounts", email=AN)
        (self.file,) = app.find_account_files([folder / "accounts"])[1]
        self.files = app.AccountFiles([folder / "accounts"])
        self.traffic = app.TrafficReadings(self.files, self.store, lambda: self.now, lambda: self.now)
        self.refresher.register_accounts()

    def refresh(self, reply, after_s=0.0):
        self.now = NOW + after_s
        self.store.save_reading(app.snapshot_of(self.file, reply, self.now))

    def ask(self, path, *rest, **headers):
        self.now += 61  # so that what waits is saved
        self.traffic.save_due()
        self.now -= 61
        return super().ask(path, *rest, **headers)

    def request(self, headers, after_s=0.0, **changes):
        """Take one request's record, as the collector does."""
        self.now = max(self.now, NOW + after_s)
        told = {"timestamp": app.utc_text(NOW + after_s), "source": AN, "response_headers": headers}
        sent = record(**{**told, **changes})
        self.files.look(0)
        parsed = app.parse_events([json.dumps(sent).encode()], self.files.contexts)
        self.store.store_batch(parsed, self.store.counts["sequence"] + 1, self.now)
        self.traffic.note(parsed.events)

    def shown(self):
        """Return an account's row, and what of its windows is used by their labels."""
        (row,) = self.json("/api/quota")["quotas"]
        return row, {window["label"]: window["used_percent"] for window in row["windows"]}


@pytest.fixture
def field(tmp_path):
    made = Field(tmp_path)
    yield made
    made.close()


def without_group(headers):
    return {name: value for name, value in headers.items() if "Bengalfox" not in name}


@pytest.mark.parametrize("edit", [
    dict, without_group, lambda headers: {**headers, "X-Codex-Active-Limit": ["Codex-BengalFox"]},
    lambda headers: {**headers, "X-Codex-Bengalfox-Limit-Name": ["gpt_5.3_codex_spark"]},
])  # fmt: skip
@pytest.mark.parametrize("failure", [{}, FAILED])
def test_request_to_a_model_with_its_own_meter_moves_that_meter_alone(field, edit, failure):
    field.refresh(case("spark-reply"))
    used = {"X-Codex-Primary-Used-Percent": ["100"], "X-Codex-Bengalfox-Primary-Used-Percent": ["100"]}
    field.request(edit({**case("spark-headers"), **(used if failure else {})}), 3, **failure)
    row, windows = field.shown()
    assert windows == {"7d": 50, f"{SPARK} 5h": 100 if failure else 22, f"{SPARK} 7d": 11}
    assert (row["primary_used_percent"], row["secondary_used_percent"]) == (None, 50)
    assert (row["state"], row["message"], row["source"], row["remaining_percent"]) == ("ok", None, "refresh", 50)
    assert [(pool["label"], pool["remaining_percent"]) for pool in field.json("/api/quota")["pool"]] == [("7d", 50)]


def test_ordinary_request_keeps_the_meters_and_what_only_a_refresh_tells(field):
    field.refresh(case("spark-reply"))
    for after_s in (4, 65):  # a new row, and one in the same five minutes
        field.request(case("ordinary-headers"), after_s)
        row, windows = field.shown()
        assert windows == {"7d": 51, f"{SPARK} 5h": 17, f"{SPARK} 7d": 8}
        assert (row["source"], row["reset_credits"], row["credits_balance"]) == ("traffic", 2, "0")


def test_requests_of_one_minute_to_two_meters_are_both_read(field):
    field.refresh(case("spark-reply"))
    field.request(case("ordinary-headers"), 4)
    field.request(case("spark-headers"), 5)
    field.request({**case("spark-headers"), "X-Codex-Bengalfox-Primary-Used-Percent": ["20"],
                   "X-Codex-Primary-Used-Percent": ["20"]}, 3)  # fmt: skip
    assert field.shown()[1] == {"7d": 51, f"{SPARK} 5h": 22, f"{SPARK} 7d": 11}
    field.refresh({**case("spark-reply"), "additional_rate_limits": None}, 90)
    assert field.shown()[1] == {"7d": 50}


def test_own_windows_are_read_although_their_reply_tells_less_of_a_meter_than_is_known(field):
    field.request(case("spark-headers"), 100)
    field.shown()
    field.now += 100
    both = {name: value for name, value in case("spark-headers").items() if "Bengalfox" in name}
    field.request({**both, **case("ordinary-headers")}, 90)
    assert field.shown()[1]["7d"] == 51


def test_meters_of_a_reply_that_are_one_are_told_once_and_none_is_taken_for_the_budget(field):
    reply = case("spark-reply")
    (spark,) = reply["additional_rate_limits"]
    again = {**spark, "limit_name": "gpt_5.3_CODEX-Spark", "metered_feature": "other"}
    limit = {"used_percent": 100, "limit_window_seconds": 18000, "reset_at": NOW + 60}
    budget = {"limit_name": "Budget", "rate_limit": {"primary_window": limit}}
    field.refresh({**reply, "additional_rate_limits": [spark, again, budget]})
    row, windows = field.shown()
    assert windows == {"7d": 50, f"{SPARK} 5h": 17, f"{SPARK} 7d": 8, "Budget meter 5h": 100}
    assert (row["state"], row["remaining_percent"]) == ("ok", 50)
    field.request(case("ordinary-headers"), 3)
    assert field.shown()[1]["Budget meter 5h"] == 100


def test_reading_of_a_meter_that_is_older_than_the_known_one_is_dropped(field):
    field.request(case("spark-headers"), 100)
    field.shown()
    field.now += 100
    field.request({**case("spark-headers"), "X-Codex-Primary-Used-Percent": ["3"]}, 50)
    assert field.shown()[1] == {f"{SPARK} 5h": 22, f"{SPARK} 7d": 11}


def test_meter_that_is_read_first_leaves_the_account_unread_until_its_own_windows_come(field):
    field.request(without_group(case("spark-headers")), 100)
    row, windows = field.shown()
    assert windows == {"codex_bengalfox 5h": 22, "codex_bengalfox 7d": 11}
    assert (row["state"], row["secondary_used_percent"], row["remaining_percent"]) == ("never", None, None)
    field.now += 100
    field.request(case("ordinary-headers"), 90)  # older, but of the account itself
    row, windows = field.shown()
    assert (row["state"], row["message"]) == ("ok", None)
    assert windows == {"7d": 51, "codex_bengalfox 5h": 22, "codex_bengalfox 7d": 11}
    field.now += 100
    field.request(case("spark-headers"), 250)  # now with its name
    assert field.shown()[1] == {"7d": 51, f"{SPARK} 5h": 22, f"{SPARK} 7d": 11}


@pytest.mark.parametrize("sent", [
    ["codex_bengalfox", "premium"], ["premium", "codex_bengalfox"], "codex_bengalfox", [], [7], None, 7, {"a": 1},
    ["x" * 200], ["a b"], ["\x00"],
])  # fmt: skip
def test_request_whose_meter_is_in_doubt_moves_nothing(field, sent):
    field.refresh(case("spark-reply"))
    field.request({**case("ordinary-headers"), "X-Codex-Active-Limit": sent}, 3)
    row, windows = field.shown()
    assert windows["7d"] == (51 if sent is None else 50) and row["state"] == "ok"


@pytest.mark.parametrize("own", [["premium"], ["Codex"], [""], [" PREMIUM "]])
def test_request_to_the_accounts_own_meter_moves_its_windows(field, own):
    field.request({**case("ordinary-headers"), "X-Codex-Active-Limit": own}, 3)
    assert field.shown()[1] == {"7d": 51}


def test_account_over_its_window_is_limited_until_a_request_succeeds_on_credits(field):
    field.refresh(case("credits-fund-reply"))
    assert (field.shown()[0]["state"], field.shown()[0]["credits_balance"]) == ("limited", "489.25")
    field.request(case("credits-headers"), 3, **FAILED)
    assert field.shown()[0]["state"] == "limited"
    field.now += 61
    field.request(case("credits-headers"), 70)
    row, windows = field.shown()
    assert (row["state"], row["message"], row["reason"]) == ("ok", "runs on credits", "runs_on_credits")
    assert (windows, row["remaining_percent"], row["credits_balance"]) == ({"7d": 100}, 0, "489.00")
    field.now += 10 * 86400  # its window came back
    row = field.shown()[0]
    assert (row["state"], row["message"], row["reason"]) == ("ok", None, None)
    field.now += 61 - 10 * 86400
    field.request({**case("credits-headers"), "X-Codex-Credits-Has-Credits": ["False"]}, 140)
    assert (field.shown()[0]["state"], field.shown()[0]["reason"]) == ("limited", None)


def test_budget_alone_governs_the_account(field):
    field.refresh(case("budget-only-reply"))
    row, windows = field.shown()
    assert (row["state"], row["remaining_percent"], row["reset_credits"], windows) == ("ok", 74, 0, {"budget": 26})
    (budget,) = row["windows"]
    assert (budget["meter"], budget["used"], budget["limit"]) == ("budget", 3831.746052503586, 15000)
    assert (budget["unit"], budget["reset_at"]) == ("credits", app.utc_text(NOW + 920777))
    assert [(pool["label"], pool["remaining_percent"]) for pool in field.json("/api/quota")["pool"]] == [("budget", 74)]


@pytest.mark.parametrize(("used", "limit", "percent", "state"), [
    ("3900", "15000", 26, "ok"), (10, "10", 100, "limited"), (3, 0, None, "ok"), (None, 10, None, "ok"),
])  # fmt: skip
def test_budget_without_a_percentage_is_known_by_what_is_used_of_it(field, used, limit, percent, state):
    field.refresh({**case("spark-reply"), **control(individual_limit={"used": used, "limit": limit})})
    row, windows = field.shown()
    assert (row["state"], windows["budget"]) == (state, percent)


def test_account_told_both_allowed_and_reached_is_limited(field):
    field.refresh(case("reached-and-allowed-reply"))
    row = field.shown()[0]
    assert (row["state"], row["primary_remaining_percent"], row["secondary_remaining_percent"]) == ("limited", None, 0)


def control(**changes):
    limit = {"used_percent": 90, "limit": "10", "used": 9, "unit": "USD", "reset_at": NOW + 500}
    return {"spend_control": {"reached": False, "individual_limit": limit, **changes}}


@pytest.mark.parametrize(("told", "reason"), [
    (control(), None), (control(reached=True), "spending_limit_reached"), ({"rate_limit_reached_type": None}, None),
    (control(individual_limit={"used_percent": 100, "limit": 5}), "spending_limit_reached"),
    ({"spend_control": {"reached": True}}, "spending_limit_reached"),
    ({"credits": {"overage_limit_reached": True}}, "overage_limit_reached"),
    ({"rate_limit_reached_type": {"type": "workspace_owner_credits_depleted"}}, "workspace_owner_credits_depleted"),
    ({"rate_limit_reached_type": "rate_limit_reached"}, "rate_limit_reached"),
    ({"rate_limit_reached_type": {"type": "<b>"}}, "limit_reached"),
    ({"rate_limit_reached_type": [7], "spend_control": {"reached": "yes"}, "credits": [1]}, None),
])  # fmt: skip
def test_limit_besides_the_windows_makes_the_account_limited_and_says_so(field, told, reason):
    field.refresh({**case("spark-reply"), **told})
    row = field.shown()[0]
    assert (row["state"], row["reason"]) == ("limited" if reason else "ok", reason)
    assert row["message"] == (reason and reason.replace("_", " "))
    field.request(case("ordinary-headers"), 3)  # which tells nothing of it
    row, windows = field.shown()
    is_kept = reason not in (None, "rate_limit_reached")
    assert (row["state"], row["reason"]) == ("limited" if is_kept else "ok", reason if is_kept else None)
    assert (row["secondary_used_percent"], row["source"], windows["7d"]) == (51, "traffic", 51)


def test_scarcest_window_that_governs_is_what_is_left_until_it_comes_back(field):
    field.refresh({**case("spark-reply"), **control()})
    assert field.shown()[0]["remaining_percent"] == 10
    field.refresh({**case("spark-reply"), **control(reached=True)})
    field.now = NOW + 501
    row = field.shown()[0]
    assert (row["state"], row["remaining_percent"], row["reason"], row["message"]) == ("reset_due", 50, None, None)
    field.request(case("ordinary-headers"), 502)
    row, windows = field.shown()
    assert (row["state"], row["message"], windows["7d"], windows["budget"]) == ("ok", None, 51, None)


CLAUDE = {"Status": "allowed", "Reset": "@100", "5h-Status": "allowed", "5h-Utilization": "0.34", "5h-Reset": "@3600",
          "7d-Status": "allowed_warning", "7d-Utilization": "0.805", "7d-Reset": "@90000", "7d_oi-Status": "allowed",
          "7d_oi-Utilization": "0.07", "7d_oi-Reset": "@80000", "Representative-Claim": "seven_day",
          "Fallback-Percentage": "0.5", "Overage-Status": "rejected"}  # fmt: skip


def claude(**changes):
    told = {**CLAUDE, **{name.replace("__", "-"): text for name, text in changes.items()}}
    return {
        f"Anthropic-Ratelimit-Unified-{name}": [str(int(NOW) + int(text[1:])) if text[:1] == "@" else text]
        for name, text in told.items()
    }


BEN = {"provider": "claude", "source": "ben@example.com", "auth_index": "cc", "model": "claude-opus-4-5"}


def row_of(field, mail="ben@example.com", provider="claude"):
    rows = field.json("/api/quota")["quotas"]
    return next((row for row in rows if (row["email"], row["provider"]) == (mail, provider)), None)


def test_windows_of_claude_come_with_its_replies(field):
    field.request(claude(), 3, **BEN)
    row = row_of(field)
    assert (row["state"], row["source"], row["account"], row["limit_reached"]) == ("ok", "traffic", BEN["source"], 0)
    assert (row["primary_used_percent"], row["secondary_used_percent"], row["remaining_percent"]) == (34, 80.5, 19.5)
    assert row["primary_reset_at"] == app.utc_text(NOW + 3600)
    assert [(one["label"], one["meter"], one["seconds"], one["used_percent"]) for one in row["windows"]] == [
        ("5h", None, 18000, 34), ("7d", None, 604800, 80.5), ("7d_oi 7d", "7d_oi", 604800, 7)]  # fmt: skip
    assert [pool["label"] for pool in field.json("/api/quota")["pool"]] == ["claude 5h", "claude 7d"]


@pytest.mark.parametrize(("changes", "failure", "state", "used"), [
    ({"Status": "rejected", "5h__Utilization": "1.02"}, FAILED, "limited", 100),
    ({"Status": "rejected"}, FAILED, "limited", 34),  # it decides, whatever the windows say
    ({"7d_oi__Status": "rejected", "7d_oi__Utilization": "1"}, FAILED, "ok", 34),
    ({"5h__Status": "rejected", "5h__Utilization": "1"}, {}, "ok", 100),
    ({"Status": "odd", "7d__Utilization": "1"}, {}, "limited", 34),
    ({"Status": "allowed_warning"}, {}, "ok", 34),
    ({}, FAILED, None, None), ({"Status": "rejected"}, {"failed": True, "fail": {"status_code": 500}}, None, None),
    ({"Status": "rejected"}, {"failed": True, "fail": {"status_code": 499}}, None, None),
])  # fmt: skip
def test_status_of_claude_decides_and_a_failure_is_believed_where_it_fits(field, changes, failure, state, used):
    field.request(claude(**changes), 3, **BEN, **failure)
    row = row_of(field)
    assert (row and row["state"], row and row["primary_used_percent"]) == (state, used)


def test_claude_that_goes_on_beyond_its_window_runs_on_credits(field):
    field.request(claude(**{"5h__Utilization": "1.1", "Overage__Status": "allowed"}), 3, **BEN)
    row = row_of(field)
    assert (row["state"], row["reason"], row["primary_remaining_percent"]) == ("ok", "runs_on_credits", 0)


def test_claude_with_the_mail_of_a_codex_account_is_a_row_of_its_own_that_a_refresh_keeps(field):
    field.refresh(case("spark-reply"))
    field.request(claude(), 3, **{**BEN, "source": AN})
    for _ in range(2):
        assert row_of(field, AN)["primary_used_percent"] == 34
        assert row_of(field, AN, "codex")["secondary_used_percent"] == 50
        field.refresher._forget_absent([field.file])


ODD = ["-0.1", "34", "x", "", "nan", "1e400", "9" * 90, "1" + "0" * 400]


@pytest.mark.parametrize(("name", "text"), [
    *(("5h__Utilization", text) for text in ODD), *(("5h__Reset", text) for text in ("-5", "1e400", "soon", "")),
])  # fmt: skip
def test_odd_number_of_claude_is_no_window(field, name, text):
    field.request(claude(**{name: text}), 3, **BEN)
    assert (row_of(field)["primary_used_percent"], row_of(field)["secondary_used_percent"]) == (None, 80.5)


def test_reset_may_be_a_time_in_words_and_status_beyond_doubt(field):
    field.request(claude(**{"5h__Reset": "2026-11-02T00:00:00Z"}), 3, **BEN)
    assert row_of(field)["primary_reset_at"] == "2026-11-02T00:00:00Z"
    doubt = {**claude(), "Anthropic-Ratelimit-Unified-Status": ["allowed", "rejected"]}
    field.request(doubt, 3, **{**BEN, "source": "c@d.ef"})
    assert row_of(field, "c@d.ef") is None
