from __future__ import annotations

import json
import random
import stat
import threading

import pytest
from support import ALWAYS, DATA, NOON, event, make_original, put, rows, run_sql, sums_by
from tools.bench import PACE_S, in_batches, payloads

import usage_dashboard as app

PARTS = ("account", "model", "key")
TOTALS_OF_300 = json.loads((DATA / "totals-3.0.0.json").read_text(encoding="utf-8"))


@pytest.fixture
def store_of_300(tmp_path, open_store):
    """A file of 3.0.0 whose older events its retention has deleted, opened by this version."""
    run_sql(tmp_path / "usage.db", (DATA / "usage-3.0.0.sql").read_text(encoding="utf-8"))
    return open_store()


def test_new_file_has_the_original_columns_first_and_is_private(store):
    columns, quota = ([row[1:3] for row in rows(store.path, f"PRAGMA table_info({table})")]
                      for table in ("events", "quota_snapshots"))  # fmt: skip
    original = """id INTEGER timestamp TEXT ts_epoch REAL auth_index INTEGER source TEXT model TEXT input_tokens INTEGER
        output_tokens INTEGER reasoning_tokens INTEGER total_tokens INTEGER latency_ms INTEGER failed INTEGER"""
    assert [word for column in columns[:12] for word in column] == original.split()
    added = "cached_tokens cache_write_tokens ttft_ms status_code error request_id context_id reason_id"
    assert {name for name, _ in columns[12:]} == set(added.split())
    original = """id timestamp ts_epoch email plan allowed limit_reached primary_used_percent
        primary_remaining_percent primary_reset_at secondary_used_percent secondary_remaining_percent
        secondary_reset_at credits_balance raw_json"""
    assert [name for name, _ in quota[:15]] == original.split()
    for name in ("usage.db", "usage.db-wal", "usage.db-shm"):
        assert stat.S_IMODE((store.path.parent / name).stat().st_mode) == 0o600


UNKNOWN = ("input_tokens", "output_tokens", "reasoning_tokens", "total_tokens", "latency_ms", "cached_tokens")
INDEXES = ("0000000000001234", "1234567890123e45", "9c1d0be2f4a76633", "9999999999999999", "3")


@pytest.mark.parametrize("changes", [dict.fromkeys(UNKNOWN), *({"auth_index": index} for index in INDEXES)])
def test_stored_event_is_read_back_as_it_was(store, changes):
    made = event(error="429 usage_limit_reached", failed=1, status_code=429, ttft_ms=640, **changes)
    put(store, made)
    row, expected = store.requests(10)[0], made._asdict()
    expected.update(expected.pop("context")._asdict())
    for name in ("plan", "quota_headers", "account"):  # they belong to the account, not to the event
        expected.pop(name)
    assert {name: row[name] for name in expected} == expected
    assert row["account"] == "an@example.com" and row["id"] == 1
    assert store.accounts()[0].auth_index == made.context.auth_index


def test_only_the_newest_thousand_rejects_are_kept(store):
    put(store, rejects=[app.Reject(f"reason {number}", 1, None) for number in range(1500)])
    kept = rows(store.path, "SELECT COUNT(*), MIN(reason), MAX(id) FROM rejected_events")
    assert kept == [(1000, "reason 1000", 1500)]
    assert store.counts["rejected"] == 1500


def test_original_database_opens_as_it_is_and_counts_at_once(tmp_path, open_store):
    make_original(tmp_path / "usage.db")
    lines = []
    store = open_store(announce=lines.append)
    usage = store.usage(ALWAYS, 3600, 0)
    assert sums_by(usage, "model") == {
        "gpt-5.4": (1, 0, 0, 100, 20, 5, 0, 0, 125),
        "gpt-5.5": (1, 1, 0, 7, 3, 0, 0, 0, 10),
        "unknown": (1, 0, 0, 0, 0, 0, 0, 0, 0),
    }
    counted = {name: sums[0] for name, sums in sums_by(usage, "account").items()}
    assert counted == {"an@example.com": 1, "b@example.com": 1, "unknown": 1}
    assert (store.event_count, store.find_faults()) == (3, [])
    assert [row["auth_index"] for row in store.requests(10)] == [None, "9c1d0be2f4a76633", "3"]
    quota = store.quotas()[0]
    assert (quota["email"], quota["state"], quota["primary_remaining_percent"]) == ("an@example.com", "ok", 60)
    assert len(lines) == 1 and lines[0].startswith("adopting 3 rows of usage.db, once")
    put(store, event(auth_index="3"), event(auth_index="3"))
    assert sums_by(store.usage(ALWAYS, 3600, 0), "account")["an@example.com"][0] == 3
    assert (store.event_count, store.find_faults()) == (5, [])


def test_new_and_current_files_open_without_a_word(open_store):
    lines = []
    for _ in range(2):
        put(open_store(announce=lines.append), event())
    assert lines == []


@pytest.mark.parametrize("name", list(TOTALS_OF_300))
def test_database_of_3_0_0_keeps_every_total_also_below_the_retention_floor(store_of_300, name):
    """The totals were answered by 3.0.0 itself from the same file; below the floor single events are gone."""
    told = TOTALS_OF_300[name]
    window, filters = app.Window(*told["window"]), app.Filters(**told["filters"])
    usage = store_of_300.usage(window, told["bucket_s"], told["offset_s"], filters)
    new = ("rate_limited", "cache_write_tokens")  # 3.0.0 did not tell them apart
    parts = (row for part in ("model", "account") for row in sums_by(usage, part).items())
    known = [[key, [count for name, count in zip(app.SUM_NAMES, sums) if name not in new]] for key, sums in
             (*sorted(usage.buckets.items()), *parts)]  # fmt: skip
    assert known[: len(usage.buckets)] == told["buckets"]
    assert sorted(known[len(usage.buckets) :], key=str) == sorted(told["models"] + told["accounts"], key=str)


def test_database_of_3_0_0_keeps_its_readings_outages_rejects_and_counts(store_of_300):
    assert store_of_300.find_faults() == []
    counts = {"stored": 480, "rejected": 2, "ignored": 3, "adopted": 0, "deleted": 187, "sequence": 1}
    assert store_of_300.counts == counts
    assert store_of_300.event_count == len(store_of_300.requests(500))
    assert len(store_of_300.outages(ALWAYS, NOON)) == 1
    assert [row["primary_remaining_percent"] for row in store_of_300.quotas()] == [70]
    assert store_of_300.quotas()[0]["ts_epoch"] == NOON - 300  # when it was last true
    put(store_of_300, event(at=NOON), sequence=2)
    assert store_of_300.find_faults() == []
    reasons = rows(store_of_300.path, "SELECT status_code, error FROM reasons WHERE id > 1")
    assert reasons == [(429, "429 usage_limit_reached: try again in …")]


def test_database_of_3_0_0_without_its_number_as_a_dump_leaves_it_keeps_its_quota_accounts(tmp_path, open_store):
    made = (DATA / "usage-3.0.0.sql").read_text(encoding="utf-8")
    run_sql(tmp_path / "usage.db", f"{made} UPDATE quota_accounts SET account_id_tag = ''; PRAGMA user_version = 0")
    store = open_store()
    assert [(row["email"], row["state"]) for row in store.quotas()] == [("user1@example.com", "ok")]
    assert store.find_faults() == []


def test_reasons_leave_out_what_differs_and_are_limited(store):
    errors = [f"503 upstream {number}: down" for number in range(50)]
    put(store, *[event(at=NOON, failed=1, status_code=503, error=error) for error in errors])
    assert rows(store.path, "SELECT status_code, error FROM reasons WHERE id > 1") == [(503, "503 upstream …: down")]
    words = ["".join(chr(97 + int(digit)) for digit in str(number)) for number in range(2100)]
    put(store, *[event(at=NOON, failed=1, status_code=500, error=f"500 {word}") for word in words])
    assert rows(store.path, "SELECT COUNT(*) FROM reasons")[0][0] == 2001
    (other,) = rows(store.path, "SELECT SUM(q.requests) FROM usage_by_quarter q JOIN reasons r ON r.id = q.reason_id "
                                "WHERE r.error = 'other' AND r.status_code = 500")  # fmt: skip
    assert other[0] == 2100 - (2000 - 2)
    assert store.find_faults() == []


@pytest.mark.parametrize(("bucket_s", "offset_s"), [(3600, 19800), (900, 0), (300, 0), (86400, 20700)])
@pytest.mark.parametrize("filters", [app.Filters(), app.Filters(status="failed"),
                                     app.Filters(account="user1@x.com", model="m1")])  # fmt: skip
def test_deleted_events_stay_in_every_total_whatever_its_steps_and_zone(store, bucket_s, offset_s, filters):
    put_days(store, days=2, each=6)
    window = app.Window(DAY, DAY + 2 * 86400)
    whole = store.usage(window, bucket_s, offset_s, filters)
    while store.delete_some(DAY + 86400 + 5000, rows=100):
        pass
    assert store.event_count == 2 * 96 * 6 - 25 * 4 * 6  # up to the full hour before
    assert store.find_faults() == []
    usage = store.usage(window, bucket_s, offset_s, filters)
    assert all(sums_by(usage, part) == sums_by(whole, part) for part in PARTS)
    assert app.add_sums(usage.buckets.values()) == app.add_sums(whole.buckets.values())
    for start in (DAY + 5000, DAY + 7300):  # ten minutes, where whole quarters are all that is known
        cut = store.usage(app.Window(start, start + 600), bucket_s, offset_s, filters)
        assert app.add_sums(cut.buckets.values()) == app.add_sums(cut.cells.values())


def test_counts_of_two_threads_that_write_are_all_kept(store):
    put_days(store, days=1, each=20)

    def delete() -> None:
        while store.delete_some(DAY + 86400, rows=7):
            pass

    thread = threading.Thread(target=delete)
    stored = store.counts["stored"]
    thread.start()
    while thread.is_alive():
        put(store, event(at=DAY + 90000))
        stored += 1
    ((counted, kept),) = rows(store.path, "SELECT COUNT(*), (SELECT value FROM meta WHERE key = 'stored') FROM events")
    assert (store.event_count, store.counts["stored"], stored) == (counted, kept, kept)


def test_write_ahead_log_stays_small_while_answers_are_given(store):
    for _ in range(80):
        put(store, *[event(at=NOON + number, error="x" * 150) for number in range(500)])
        store.usage(ALWAYS, 3600, 0)
        store.requests(10)
        store.quotas()
    assert store.path.stat().st_size > 8_000_000
    assert (store.path.parent / "usage.db-wal").stat().st_size < 6_000_000


def test_file_of_a_newer_version_is_not_touched(tmp_path, open_store):
    open_store().close()
    run_sql(tmp_path / "usage.db", "PRAGMA user_version = 99")
    with pytest.raises(app.StoreError, match="newer version"):
        open_store()


CLIENT_KEYS = ["", "sk-…1111 #4bdca8", "… #4bdca8", "AIz…0001 #3f9a2c"]


def random_events(dice, count):
    for _ in range(count):
        yield event(
            at=round(NOON + dice.uniform(0, 86400 * 4), 3), auth_index=dice.choice(["aa", "bb", "", "00000000000012"]),
            failed=dice.choice([0, 0, 1]), status_code=dice.choice([None, 429, 500]),
            error=dice.choice([None, "busy", "busy 17 times"]), api_key=dice.choice(CLIENT_KEYS),
            source=dice.choice(["a@x.com", "b@x.com", "sk-…1111 #4bdca8"]),
            model=dice.choice(["m1", "m2", "m3"]), input_tokens=dice.randrange(1000),
            output_tokens=dice.choice([None, 0, 50]), total_tokens=dice.randrange(9999),
            cache_write_tokens=dice.choice([None, 0, 9]),
        )  # fmt: skip


def sums_of(events):
    limited = sum(one.failed and one.status_code == 429 for one in events)
    counts = {name: sum(getattr(one, name, 0) or 0 for one in events) for name in app.SUM_NAMES}
    return tuple({**counts, "requests": len(events), "rate_limited": limited}.values())


def fullest_key(one) -> str:
    return CLIENT_KEYS[1] if one.context.api_key == CLIENT_KEYS[2] else one.context.api_key


def failures_of(events, name_of):
    """Return (requests, last quarter hour, accounts) of each (status, reason)."""
    reasons = {None: None, "busy": "busy", "busy 17 times": "busy … times"}
    groups = app.by_key(((one.status_code, reasons[one.error]), one) for one in events if one.failed)
    return {reason: (len(members), int(max(one.ts_epoch for one in members)) // 900 * 900, set(map(name_of, members)))
            for reason, members in groups.items()}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_totals_of_random_windows_and_filters_equal_a_plain_sum_in_python(store, seed):
    dice = random.Random(seed)
    events = list(random_events(dice, 600))
    for start in range(0, 600, 150):
        put(store, *events[start : start + 150])
    names = {(row["auth_index"] or "", row["source"]): row["account"] for row in store.requests(1000)}
    account = dice.choice(sorted(set(names.values())))

    def name_of(one) -> str:
        return names[(one.context.auth_index, one.context.source)]

    def is_of(one) -> bool:
        return name_of(one) == account

    for filters, belongs in [
        *[(app.Filters(), lambda one: True)] * 10,
        (app.Filters(account=account), is_of),
        (app.Filters(model="m2"), lambda one: one.model == "m2"),
        (app.Filters(status="failed"), lambda one: one.failed),
        (app.Filters(status="ok", model="m1"), lambda one: not one.failed and one.model == "m1"),
        (app.Filters(account=account, model="m3"), lambda one: one.model == "m3" and is_of(one)),
        (app.Filters(status="429"), lambda one: one.failed and one.status_code == 429),
        (app.Filters(status="500", model="m1"), lambda one: one.failed and (one.status_code, one.model) == (500, "m1")),
        (app.Filters(account="nobody"), lambda one: False),
        (app.Filters(key="#4bdca8"), lambda one: one.context.api_key.endswith("#4bdca8")),
        (app.Filters(key=CLIENT_KEYS[3], status="failed"), lambda one: one.failed and one.context.api_key[:1] == "A"),
    ]:
        start = NOON + dice.uniform(-5000, 86400 * 2)
        window = app.Window(start, start + dice.choice([1, 400, 900, 3600, 20000, 200000, 400000]))
        bucket_s, offset_s = dice.choice([300, 900, 3600, 86400]), 900 * dice.randrange(-48, 57)
        inside = [one for one in events if window.start <= one.ts_epoch < window.end and belongs(one)]
        usage = store.usage(window, bucket_s, offset_s, filters)
        for part, part_of in (("model", lambda one: one.model), ("account", name_of), ("key", fullest_key)):
            groups = app.by_key((part_of(one), one) for one in inside)
            assert sums_by(usage, part) == {name: sums_of(members) for name, members in groups.items()}
        assert {(row["status_code"], row["error"]): (row["requests"], row["last_at"], set(row["accounts"]))
                for row in usage.failures} == failures_of(inside, name_of)  # fmt: skip
        assert sum(row["requests"] for row in usage.failures) == sums_of(inside)[1]
        cut = {}
        for one in inside:
            cut.setdefault((int(one.ts_epoch) + offset_s) // bucket_s * bucket_s - offset_s, []).append(one)
        assert usage.buckets == {key: sums_of(members) for key, members in cut.items()}
        assert app.add_sums(usage.cells.values()) == sums_of(inside)
        assert app.add_sums(sums for _, sums in store.sums_by("model", window, filters)) == sums_of(inside)
        assert len(store.requests(1000, window, filters)) == len(inside)


def put_days(store, days, each):
    """Store as many events in every quarter of an hour, of three accounts and two models in turn."""
    put(store, *[
        event(at=DAY + number * 900 / each, source=f"user{number % 3}@x.com", auth_index=str(number % 3),
              model=f"m{number // 3 % 2}", failed=int(number % 4 == 0), status_code=(None, 500, 429)[number % 3])
        for number in range(days * 96 * each)
    ])  # fmt: skip


DAY = 1_779_926_400.0  # midnight UTC
def test_event_takes_few_bytes_with_its_index_and_sums(open_store):
    sizes = []
    batches = list(in_batches(payloads(40_000, NOON, 40_000 * PACE_S), 500))
    for half in (batches[:40], batches[40:]):  # accounts, models and contexts are known in the second
        store = open_store()
        for batch in half:
            assert store.store_batch(app.parse_events(batch), store.counts["sequence"] + 1, NOON)
        store.close()
        sizes.append(store.byte_count)
    assert 100 < (sizes[1] - sizes[0]) / 20_000 <= 175


@pytest.mark.parametrize(("column", "other"), [
    ("key_id", 0), ("identity_id", 9), ("model_id", 9), ("reason_id", 1), ("total_tokens", 121), ("rate_limited", 1),
])  # fmt: skip
@pytest.mark.parametrize("table", ["usage_by_quarter", "usage_by_hour", "usage_by_day"])
def test_find_faults_notices_sums_that_are_off_or_stand_in_another_cell(store, table, column, other):
    put(store, event())
    run_sql(store.path, f"UPDATE {table} SET {column} = {other}")
    told = "usage_by_quarter does not add up to the events" if "quarter" in table else f"{table} does not add up to"
    assert told in store.find_faults()[0]


def test_text_search_takes_its_letters_literally(store):
    put(store, event(model="a_b%c"), event(model="axbyc"), event(error="rate % hit", failed=1))
    assert [row["model"] for row in store.requests(9, filters=app.Filters(text="a_b%"))] == ["a_b%c"]
    assert len(store.requests(9, filters=app.Filters(text="% hit"))) == 1


def test_outage_shorter_than_the_proxys_memory_is_forgotten(store):
    store.begin_outage(1000, "unreachable")
    store.begin_outage(1010, "closed")
    store.end_outage(1030)
    assert store.outages(ALWAYS, 1030) == []
    store.begin_outage(2000, "unreachable")
    assert store.outages(ALWAYS, 2059) == [{"from": 2000.0, "to": None, "reason": "unreachable", "lost": False}]
    store.end_outage(2500)
    ended = {"from": 2000.0, "to": 2500.0, "reason": "unreachable", "lost": True}
    assert store.outages(app.Window(2499, 3000), 3000) == [ended]
    assert store.outages(app.Window(2500, 3000), 3000) == []


@pytest.mark.parametrize(("retention_s", "now", "lost"), [(None, 2061, True), (3600, 2061, False), (3600, 5601, True)])
def test_open_outage_is_a_loss_once_it_lasts_longer_than_the_queue_remembers(store, retention_s, now, lost):
    store.put_meta("retention_s", retention_s)
    store.begin_outage(2000, "unreachable")
    assert [outage["lost"] for outage in store.outages(ALWAYS, now)] == [lost]
    store.end_outage(now)
    store.put_meta("retention_s", None)  # what was learnt later changes nothing of the past
    assert [outage["lost"] for outage in store.outages(ALWAYS, now)] == [lost]


@pytest.mark.parametrize(("ended_at", "shown"), [(2010, (2000.0, 2010.0)), (1000, (1000.0, 1000.0))])
def test_proxy_that_did_not_publish_lost_all_however_short_it_was(store, ended_at, shown):
    store.put_meta("retention_s", 3600)
    store.begin_outage(2000, "publishing_off")
    store.end_outage(ended_at)
    (outage,) = store.outages(ALWAYS, ended_at)
    assert (outage["from"], outage["to"], outage["lost"]) == (*shown, True)


YEAR = 365 * 86400.0


@pytest.mark.parametrize(("events", "begin", "end", "more", "mended_at", "spans"), [
    ([0], -86000, 600, [], None, [(0, 600)]),  # a clock behind: it begins with the last event
    ([0], YEAR, 600, [], None, [(0, 600)]),  # begun a year ahead: so does this one
    ([0], 10, YEAR, [20, 900], 1000, [(10, 20)]),  # ended a year ahead: with the first event in it
    ([], YEAR, YEAR + 600, [], 0, []),  # all in the future: forgotten
    ([0, YEAR], 10, 600, [], None, [(10, 600)]),  # an event of another year moves none
], ids=["behind", "begun ahead", "ended ahead", "all ahead", "odd event"])  # fmt: skip
def test_outages_of_a_clock_that_was_wrong_are_mended(store, events, begin, end, more, mended_at, spans):
    for number in events:
        put(store, event(at=NOON + number))
    store.begin_outage(NOON + begin, "unreachable")
    store.end_outage(NOON + end)
    for number in more:
        put(store, event(at=NOON + number))
    if mended_at is not None:
        store.mend_outages(NOON + mended_at)
    found = store.outages(app.Window(0, 9e9), NOON)
    assert [(outage["from"] - NOON, outage["to"] - NOON) for outage in found] == spans
    assert not any(outage["lost"] for outage in found if outage["to"] - outage["from"] < 60)
