"""Whose usage and whose quota: account files, events and readings together, as a user with a mixed pool sees them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from support import ALWAYS, DATA, Site, id_token, record, run_sql, sums_by, write_account

import usage_dashboard as app

MAIL = "pair@example.com"


def hash_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def case(name: str) -> str:
    """Return a case's text with its times counted from now."""
    now, text = int(time.time()), (DATA / name).read_text(encoding="utf-8")
    text = re.sub(r'"(\$?)@\+(\d+)"', lambda m: f'"{now + int(m[2])}"' if m[1] else str(now + int(m[2])), text)
    return re.sub(r'"T-(\d+)"', lambda m: json.dumps(app.utc_text(now - int(m[1]))), text)


class Pool:
    """A proxy with a collector and the API over one store, and the folder of account files."""

    def __init__(self, folder: Path, proxy, collect) -> None:
        self.folder, self.proxy, self.site = folder / "accounts", proxy, Site(folder)
        self.folder.mkdir()
        self.sent, self._collect = 0, collect
        self.start()

    def start(self, **options) -> None:
        self.run = self._collect(self.proxy, on=self.site.store, auth_dir=str(self.folder), **options)

    def file(self, name, account_id="", mail=MAIL, token="", plan="business", user="", odd=None, listed=True) -> Path:
        about = {"chatgpt_plan_type": plan, "chatgpt_user_id": user}
        content = {"type": "codex", "email": mail, "account_id": account_id, "access_token": token or f"token-{name}",
                   "id_token": id_token({"https://api.openai.com/auth": about}), **(odd or {})}  # fmt: skip
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        if listed:
            self.site.refresher.register_accounts()  # as at a start and each hour
        self.run.slept_s += 5  # the time until files are looked at again
        return path

    def take(self, *events, **one) -> None:
        """Have the proxy hand over events, or one of these values, and wait until they are stored."""
        events = events or (self.event(**one),)
        self.sent += len(events)
        self.proxy.push(*events)
        self.run.wait_for_events(self.sent)

    def event(self, token=None, used=None, ago=60.0, tokens=1000, plan="business", **more) -> bytes:
        now = int(time.time())
        sent = {"timestamp": app.utc_text(now - ago), "source": MAIL, "auth_index": "b1", **more}
        sent.update({"tokens": {"total_tokens": tokens}, "access_token_sha256": token and hash_of(token)})
        if used is not None:
            headers = {"Plan-Type": plan, "Primary-Used-Percent": str(used), "Primary-Window-Minutes": "10080",
                       "Primary-Reset-At": str(now + 90000)}  # fmt: skip
            sent["response_headers"] = {f"X-Codex-{name}": [text] for name, text in headers.items()}
        return json.dumps(record(**sent)).encode()

    def read(self) -> None:
        """Let the readings that wait be saved."""
        self.run.slept_s += 61
        self.run.wait_for(lambda: not self.run.collector._readings._waiting)

    def usage(self) -> dict[str, int]:
        rows = self.site.json("/api/summary?range=all")["accounts"]
        assert len({row["account"] for row in rows}) == len(rows)
        for row in rows:  # the filter means the same
            told = self.site.json(f"/api/requests?limit=500&account={quote(row['account'])}")["requests"]
            assert {one["account"] for one in told} == {row["account"]} and len(told) == row["requests"]
        return {row["account"]: row["total_tokens"] for row in rows}

    def quota(self) -> dict[str, float]:
        """Return what is used of each account's week, once what waits is saved."""
        self.read()
        rows = self.site.json("/api/quota")["quotas"]
        assert len({row["account"] for row in rows}) == len(rows)
        return {row["account"]: row["secondary_used_percent"] for row in rows}


@pytest.fixture
def pool(tmp_path, proxy, collect):
    made = Pool(tmp_path, proxy, collect)
    yield made
    made.run.end()
    made.site.close()


def named(account_id: str, mail=MAIL, user="") -> str:
    return f"{mail} (#{app.short_tag(account_id, user)})"


ONE, TWO = named("id-1"), named("id-2")


def two_workspaces(pool) -> None:
    pool.file("one", "id-1")
    pool.file("two", "id-2")


def test_two_workspaces_in_a_container_are_mixed_by_nothing_and_told_apart_by_a_token(pool):
    told = json.loads(case("case-04-two-workspaces.json"))
    for file in told["files"]:
        pool.file(file["name"][:-5], file["account_id"], token=file["account_id"], plan=file["plan"])
    for file, reply in zip(sorted(app.find_account_files([pool.folder])[1], key=lambda file: file.name), told["wham"]):
        pool.site.store.save_reading(app.snapshot_of(file, reply, time.time() - 90))
    first, second = (named(file["account_id"]) for file in told["files"])
    line = json.loads(case("case-04-two-workspaces.jsonl"))
    pool.take(json.dumps(line))
    pool.read()
    (guess,) = pool.usage()
    assert guess not in (first, second) and guess.startswith(f"{MAIL} (#")
    assert pool.quota() == {first: 90, second: 20}
    pool.take(json.dumps({**line, "access_token_sha256": hash_of(told["files"][1]["account_id"])}))
    assert pool.usage() == {second: 2200} and pool.quota() == {first: 90, second: 21}


def test_workspace_that_takes_over_two_hours_later_is_another_account_also_before_any_file_tells(pool):
    two_workspaces(pool)
    pool.take(pool.event(ago=9000, used=100), pool.event(ago=1800, used=1, auth_index="b2", tokens=50))
    pool.read()
    assert sorted(pool.usage().values()) == [50, 1000] and not set(pool.usage()) & {ONE, TWO}
    assert set(pool.quota().values()) <= {None}
    pool.take(pool.event("token-two", 2, auth_index="b2", tokens=7), pool.event("token-one", 100, tokens=3))
    assert pool.usage() == {ONE: 1003, TWO: 57} and pool.quota() == {ONE: 100, TWO: 2}


@pytest.mark.parametrize("users", [("u1", "u2"), ("", "")])
def test_colleagues_in_one_workspace_are_two_accounts(pool, users):
    pool.file("one", "id-1", mail="a@x.com", user=users[0])
    pool.file("two", "id-1", mail="b@x.com", user=users[1])
    pool.take(pool.event(used=10, source="a@x.com"), pool.event(used=20, source="b@x.com", auth_index="b2", tokens=5))
    assert pool.usage() == {"a@x.com": 1000, "b@x.com": 5} and pool.quota() == {"a@x.com": 10, "b@x.com": 20}


def test_decision_outlives_the_file_and_a_restart(pool):
    two_workspaces(pool)
    pool.take(pool.event(auth_index="b2"))
    pool.take(pool.event("token-two", auth_index="b2"), pool.event("token-one"))
    (pool.folder / "two.json").unlink()
    pool.run.end()
    pool.start()
    pool.take(pool.event("token-of-two-renewed", 5, auth_index="b2", tokens=20), pool.event(auth_index="b2", tokens=1))
    assert pool.usage() == {ONE: 1000, TWO: 2021}


@pytest.mark.parametrize("restarts", [False, True])
def test_index_that_is_used_again_keeps_its_history_at_the_old_account(pool, restarts):
    pool.file("one", "id-1", mail="a@x.com")
    pool.take(pool.event("token-one", ago=900, source="a@x.com"), pool.event(ago=800, source="a@x.com", tokens=10))
    (pool.folder / "one.json").unlink()
    pool.file("two", "id-2", mail="b@x.com")
    if restarts:
        pool.run.end()
        pool.start()
    pool.take(pool.event("token-two", 30, source="b@x.com", tokens=2), pool.event("gone", source="", tokens=5, ago=20))
    assert pool.usage() == {"a@x.com": 1010, "b@x.com": 7} and pool.quota() == {"a@x.com": None, "b@x.com": 30}


def test_index_of_an_account_with_another_mail_is_the_one_of_that_mail_without_a_token_too(pool):
    pool.file("work", "id-1", mail="a@x.com")
    pool.take(used=10, source="a@x.com", ago=900)
    pool.read()
    pool.file("work", "id-2", mail="b@x.com", token="two")
    pool.take(used=50, source="b@x.com", tokens=7)
    assert pool.usage() == {"a@x.com": 1000, "b@x.com": 7} and pool.quota() == {"a@x.com": 10, "b@x.com": 50}


def test_history_of_an_index_with_two_mails_is_each_ones_own_where_both_have_files(pool):
    pool.take(pool.event(source="a@x.com", ago=900), pool.event(source="b@x.com", tokens=7))
    pool.file("one", "id-1", mail="a@x.com")
    pool.file("two", "id-2", mail="b@x.com")
    pool.take(pool.event("token-two", 20, source="b@x.com", tokens=1))
    assert pool.usage() == {"a@x.com": 1000, "b@x.com": 8}


def test_reading_without_a_token_belongs_to_the_account_that_had_its_index_last(pool):
    two_workspaces(pool)
    pool.take(pool.event("token-one", ago=5000), pool.event("token-two", 33, ago=4000))
    pool.take(pool.event("token-one", 44, ago=10, auth_index="b5"))
    pool.read()
    pool.take(pool.event(used=35, ago=100, tokens=1))
    assert pool.usage() == {ONE: 2000, TWO: 1001} and pool.quota() == {ONE: 44, TWO: 35}


def test_index_that_follows_from_a_path_decides_without_a_token(pool):
    two_workspaces(pool)
    example = "/root/.cli-proxy-api/codex-user@example.com-plus.json"  # the worked example of the wire facts
    assert app.auth_index_of(example) == "4fe05f631e37a3c5"
    index = app.auth_index_of(str((pool.folder / "two.json").absolute()))
    pool.take(pool.event(used=40, auth_index=index, plan="free"))  # the file's plan is old
    pool.read()
    assert pool.usage() == {f"{MAIL} (free)": 1000}
    assert pool.quota() == {f"{MAIL} (business)": None, f"{MAIL} (free)": 40}


@pytest.mark.parametrize(("account_ids", "decided"), [(("id-1", "id-1"), True), (("id-1", "id-2"), False)])
def test_two_files_with_one_token_decide_where_they_are_one_account(pool, account_ids, decided):
    for number, account_id in enumerate(account_ids):
        pool.file(f"copy{number}", account_id, token="same")
    pool.take(pool.event("same", 50))
    pool.read()
    assert sum(pool.usage().values()) == 1000 and (set(pool.usage()) == {MAIL}) == decided
    assert [used for used in pool.quota().values() if used] == [50] * decided


@pytest.mark.parametrize("first", ["no file", "another file", "the file"])
def test_account_that_changed_its_plan_file_and_index_stays_one(pool, first):
    lines = case("case-06-plan-upgrade.jsonl").splitlines()
    account_id = "44444444-0000-4000-8000-000000000001"
    if first == "another file":
        path = pool.file("codex-dddd0001-up@example.com-plus", account_id, mail="up@example.com", plan="plus")
    if first != "the file":
        pool.take(*lines[:2])
        pool.read()
    if first == "another file":
        path.unlink()
    pool.file("codex-dddd0001-up@example.com-pro", account_id, mail="up@example.com", plan="pro")
    pool.take(*lines[0 if first == "the file" else 2 :])
    assert pool.usage() == {"up@example.com": 15400} and pool.quota() == {"up@example.com": 4}


def test_account_that_changed_its_mail_stays_one_with_its_quota(pool):
    path = pool.file("one", "id-1", mail="old@x.com")
    pool.take(pool.event("token-one", 30, source="old@x.com", ago=900))
    pool.read()
    path.unlink()
    pool.file("other", "id-1", mail="new@x.com", token="new", listed=False)
    pool.take(pool.event("new", 40, source="new@x.com", auth_index="b2", tokens=1))
    assert pool.usage() == {"new@x.com": 1001} and pool.quota() == {"new@x.com": 40}


@pytest.mark.parametrize("then", ["colleague", "user", "id"])
def test_account_of_which_more_is_known_later_stays_one(pool, then):
    pool.file("one", "" if then == "id" else "id-1", mail="a@x.com")
    pool.take(pool.event("token-one", 10, source="a@x.com", ago=900))
    pool.run.wait_for(lambda: not pool.run.collector._readings._waiting)
    pool.take(pool.event("token-one", 15, source="a@x.com", ago=800, tokens=0))  # its reading waits meanwhile
    pool.file("one", "id-1", mail="a@x.com", user="u1" if then == "user" else "")
    if then == "colleague":
        pool.file("two", "id-1", mail="b@x.com")
    pool.take(pool.event("token-one", 20, source="a@x.com", tokens=5))
    assert pool.usage() == {"a@x.com": 1005} and pool.quota().pop("b@x.com", None) is None
    assert pool.quota()["a@x.com"] == 20 and len(pool.quota()) == 1 + (then == "colleague")


def test_event_that_waited_while_its_token_was_renewed_finds_its_account(pool):
    two_workspaces(pool)
    pool.take(pool.event("token-one"))
    for token in ("second", "third"):
        pool.file("one", "id-1", token=token)
        pool.take(pool.event(token, auth_index="b3", tokens=1))
    pool.take(pool.event("token-one", auth_index="b4", tokens=5), pool.event("second", auth_index="b5", tokens=7))
    assert pool.usage() == {ONE: 1014}


def test_file_whose_account_changes_in_place_gives_each_event_to_its_own(pool):
    pool.file("one", "id-1")
    pool.take(pool.event("token-one", 60))
    pool.file("one", "id-9", token="of-9")
    pool.take(pool.event("of-9", 5, tokens=30, ago=2), pool.event("token-one", tokens=4))
    pool.read()
    assert pool.usage() == {named("id-1"): 1004, named("id-9"): 30}
    assert {name: used for name, used in pool.quota().items() if used is not None}[named("id-9")] == 5


def test_reading_of_another_plan_than_the_files_is_taken_where_no_other_account_can_be_meant(pool):
    pool.file("one", "id-1", plan="plus")
    pool.take(used=10, plan="pro", ago=9000)  # the file's plan is old
    pool.read()
    pool.take(used=90, plan="team", auth_index="b2")  # perhaps of an account whose file is elsewhere
    assert pool.quota() == {MAIL: 10} and pool.usage() == {MAIL: 2000}
    pool.take(pool.event("token-one", 12, plan="pro"))  # certain, whatever the file's plan was
    assert pool.quota() == {MAIL: 12}


def test_codex_file_without_an_id_is_asked_beside_another_providers_of_its_mail(pool):
    pool.file("cx")
    pool.file("cl", odd={"type": "claude", "last_refresh": "2026-05-01T12:00:00Z"})
    assert [file.name for file in app.find_account_files([pool.folder])[1]] == ["cx.json"]


@pytest.mark.parametrize(("content", "provider", "name"), [
    ({"account_id": "id-1", "email": ""}, "codex", f"codex #{app.short_tag('id-1', '')}"),
    ({"email": ""}, "codex", "work"), ({"type": "claude", "email": None}, "claude", "work"),
])  # fmt: skip
def test_account_without_a_mail_is_named_by_its_file_and_never_by_a_clients_key(pool, content, provider, name):
    pool.file("work", odd=content)
    keys = [{"source": key, "api_key": key, "provider": provider} for key in ("sk-client-01-secret", "sk-2", "sk-3")]
    tokens = (None, "token-work", None)
    pool.take(*(pool.event(token, 20, tokens=1, **key) for token, key in zip(tokens, keys)))
    pool.read()
    assert pool.usage() == {name: 3}
    told = [(row["account"], row["email"]) for row in pool.site.json("/api/quota")["quotas"]]
    assert told == [(name, "work")] * (provider == "codex") and list(pool.quota().values()) == [20] * len(told)
    assert {row["source"] for row in pool.site.json("/api/requests")["requests"]} == {""}


@pytest.mark.parametrize("commit_s", [0, 1000])
def test_hash_of_a_token_is_on_no_disk(pool, commit_s):
    pool.run.end()
    pool.start(commit_s=commit_s)
    pool.file("one", "id-1")
    large = pool.event("token-one", filler="x" * 20_000, request_id="large", auth_index="b7")
    pool.proxy.push(pool.event("token-one", request_id="good"), pool.event("token-one", latency_ms="bad"), large)
    root = pool.folder.parent

    def written() -> bytes:
        return b"".join(path.read_bytes() for path in root.glob("usage.db*"))

    pool.run.wait_for(lambda: all(text in written() for text in (b"good", b"large", b"latency_ms")))
    assert hash_of("token-one").encode() not in written() + (root / "log").read_bytes() + pool.run.log.encode()
    pool.run.collector.journal.flush()
    assert pool.usage() == {MAIL: 2000}


def test_database_of_3_0_0_keeps_its_totals_and_joins_what_a_file_tells(tmp_path, open_store):
    former = "#" + app.short_tag("acc-1", "user1@example.com")
    run_sql(tmp_path / "usage.db", (DATA / "usage-3.0.0.sql").read_text(encoding="utf-8"))
    run_sql(tmp_path / "usage.db", f"""  -- one of another plan and index, and a client's key, as it was named
        UPDATE quota_accounts SET account_id_tag = '{former}';
        UPDATE identities SET source = 'user1@example.com' WHERE id = 1;
        UPDATE contexts SET api_key = 'sk-…1111 #4bdca8', alias = id WHERE identity_id = 2;
        UPDATE identities SET source = 'sk-…1111 #4bdca8' WHERE id = 2;""")
    store = open_store()
    before = store.usage(ALWAYS, 86400, 0)
    assert len(before.by("account")) == 3
    folder = write_account(tmp_path / "accounts").parent
    files = app.AccountFiles([folder])
    for _ in range(2):  # it can be done again
        files.look()
        store.decide_accounts(files.account_of)
        app.QuotaRefresher(app.Config(auth_dir=str(folder)), store, app.Log(), None).register_accounts()
    after = store.usage(ALWAYS, 86400, 0)
    assert (after.buckets, sums_by(after, "model")) == (before.buckets, sums_by(before, "model"))
    assert store.find_faults() == []
    sums = sums_by(after, "account")
    joined = [total for cell, total in before.cells.items() if cell.account.mail == "user1@example.com"]
    assert set(sums) == {"user1@example.com", "index 1234567890123e45"}
    assert sums["user1@example.com"] == app.add_sums(joined)
    (row,) = store.quotas()
    (file,) = files.by_tag.values()
    assert (row["account_id_tag"], row["primary_used_percent"] is not None) == (file.tag, True)


def test_tag_of_an_account_without_a_file_is_never_that_of_an_account_id(tmp_path):
    (tmp_path / "a.json").write_text('{"type": "codex", "account_id": "7", "access_token": "t"}')
    assert app.find_account_files([tmp_path])[1][0].tag != app.own_tag(7, "")
