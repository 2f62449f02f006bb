"""What a quota window is worth, and what became of those before it."""

from __future__ import annotations

import random

import pytest
from support import NOW, at, event, put, reading, rows, write_account

import usage_dashboard as app

AN = ("an@example.com", "#an")
HOUR = 3600


@pytest.fixture
def site(make_site):
    """An API over 1,000 tokens at each of the last 20 hours, of one account."""
    made = make_site()
    put(made.store, *(at(hours, total_tokens=1000, source=AN[0]) for hours in range(20, 0, -1)))
    return made


def limits(used=40, reset_in=1, hours=5):
    return {"used_percent": used, "limit_window_seconds": hours * HOUR, "reset_at": reset_in and NOW + reset_in * HOUR}


def read(store, *windows, when=0, account=AN, **more):
    """Save a reading, so many hours after NOW."""
    slots = dict(zip(("primary_window", "secondary_window"), windows))
    reply, taken_at = {"plan_type": "plus", "rate_limit": slots, **more}, NOW + when * HOUR
    store.save_reading(app.reading_row(app.parse_quota(reply, taken_at), account, "", taken_at))


def told(site, label="5h"):
    """Return (tokens, per percent, left), and of ended ones (hours after NOW, peak, tokens, per percent)."""
    windows = [window for row in site.json("/api/quota")["quotas"] for window in row["windows"]]
    (window,) = (window for window in windows if window["label"] == label)
    names = ("ended_at", "peak_percent", "tokens", "tokens_per_percent")
    ended = [[ended.pop(name) for name in names] for ended in window["history"]]
    assert not any(window["history"])
    history = [(round((app.parse_time(one[0])[0] - NOW) / HOUR, 2), *one[1:]) for one in ended]
    return tuple(window[name] for name in ("tokens", "tokens_per_percent", "tokens_left")), history


def test_window_is_worth_what_its_account_used_since_it_began(site):
    budget = {"individual_limit": limits(20, 2, 12)}
    extra = [{"limit_name": "Spark", "rate_limit": {"primary_window": limits()}}]
    read(site.store, limits(), limits(80, 1, 16), spend_control=budget, additional_rate_limits=extra)
    # The five hours began 4 h ago, the budget's twelve 10 h ago, and the sixteen 15 h ago.
    assert [told(site, label)[0] for label in ("5h", "budget", "16h", "Spark 5h")] == [
        (4000, 100, 6000), (10000, 500, 40000), (15000, 188, 3760), (None, None, None)]  # fmt: skip
    etag = site.ask("/api/quota")[0].headers["ETag"]
    put(site.store, at(4, total_tokens=8), at(4.0003, total_tokens=16), at(1, auth_index="b", source="b@example.com"))
    assert site.ask("/api/quota", If_None_Match=etag)[0].status == 200
    assert told(site)[0] == (4008, 100, 6000)


@pytest.mark.parametrize(("window", "outages", "worth"), [
    (limits(3), [], (4000, 1333, 129301)), (limits(100), [], (4000, 40, 0)), (limits(2), [], None),
    (limits(hours=20), [], (19000, 475, 28500)), (limits(hours=22), [], None),  # began before the first record
    (limits(), [(-5, -4), (-0.1, -0.09)], (4000, 100, 6000)),  # before, and too short to lose anything
    (limits(), [(-2, -1.9)], None), (limits(), [(-9, -3.9)], None), (limits(), [(-0.1, None)], None),
    (limits(hours=0), [], None), (limits(reset_in=None), [], None), (limits(None), [], None), (limits(2, -1), [], None),
])  # fmt: skip
def test_worth_is_unknown_where_it_cannot_be_estimated(site, window, outages, worth):
    read(site.store, window)
    read(site.store, limits(hours=6), account=("new@example.com", "#new"))  # nothing of it was ever recorded
    for start, end in outages:
        site.store.begin_outage(NOW + start * HOUR, "unreachable", is_measured=True)
        if end:
            site.store.end_outage(NOW + end * HOUR)
    assert told(site, app.window_label(window["limit_window_seconds"] or 5 * HOUR))[0] == (worth or (None, None, None))
    assert told(site, "6h")[0] == (None, None, None)


def test_what_was_used_long_after_a_reading_is_not_in_its_percentage(site):
    read(site.store, limits(20), when=-1.5)  # 3,000 by then
    assert told(site)[0] == (4000, 150, 12000)


@pytest.mark.parametrize(("readings", "history"), [  # (when, used, reset), all in hours after NOW
    # Its reset passed: from 7 h ago to 2 h ago. Nobody has read anything since, or the next one has as much.
    ([(-4, 30, -2), (-2.1, 50, -2)], [(-2, 50, 5000, 100)]), ([(-2.1, 50, -2), (-1, 50, 4)], [(-2, 50, 5000, 100)]),
    ([(-2.1, 50, -2), (-1, 60, 4), (0, 5, 5)], [(0, 60, 1000, 17), (-2, 50, 5000, 100)]),
    # Given back early, from 4 h ago on, with a new reset or without one.
    ([(-1.1, 80, 1), (-1, 0, 4)], [(-1, 80, 3000, 38)]), ([(-1.1, 80, 1), (-1, 30, 1)], [(-1, 80, 3000, 38)]),
    # It goes on: its reset moves, its percentage by a rounded point, a reading leaves it out; or it never began.
    ([(-2, 40, 1), (-1, 40, 2), (0, 41, 3)], []), ([(-2, 41, 1), (-1, 40, 1), (0, 41, 1)], []),
    ([(-2, 40, 1), (-1, None, None), (0, 45, 1)], []), ([(-9, 0, -4), (-3, 0, 2)], []),
    ([(-2.1, 50, -2.01), (-2.005, 50, -2), (-1, 50, 4)], [(-2, 50, 5000, 100)]),
    ([(-4, 2, -2), (-1, 9, 4)], [(-2, 2, None, None)]), ([(-16.1, 50, -16), (-1, 9, 4)], [(-16, 50, None, None)]),
])  # fmt: skip
def test_window_ends_where_its_reset_passes_or_its_percentage_falls(site, open_store, readings, history):
    for when, used, reset in readings:
        main = [] if used is None else [limits(used, reset)]
        read(open_store(), limits(10, 25, 168), *main, when=when)  # each after a restart
    assert (told(site)[1], told(site, "7d")[1]) == (history, [])


def test_ended_window_counts_what_comes_late_and_moves_with_its_account(site, tmp_path):
    (file,) = app.find_account_files([write_account(tmp_path / "accounts", email=AN[0]).parent])[1]
    read(site.store, limits(50, -2), when=-2.01, account=(AN[0], min(file.former_tags)))
    for late, tokens in ((30, 5500), (20, 6000), (10, 6500)):
        put(site.store, event(at=NOW - 2 * HOUR - late, total_tokens=500, source=AN[0]))
        assert told(site)[1] == [(-2, 50, tokens, tokens / 50)]
    site.store.register_quota_accounts([file], app.QUOTA_MESSAGES, NOW)
    assert told(site)[1] == [(-2, 50, 6500, 130)]


def test_history_keeps_the_eight_newest_of_each_window(site):
    for number in range(20, 0, -1):
        read(site.store, limits(0, -0.3 - number), when=-0.4 - number)  # of which nothing is used
        read(site.store, limits(30 + number, 0.1 - number), limits(50 + number, 0.1 - number, 168), when=-number)
    peaks = [[ended[1] for ended in told(site, label)[1]] for label in ("5h", "7d")]
    assert peaks == [[*range(31, 39)], [*range(51, 59)]]
    assert rows(site.store.path, "SELECT COUNT(*) FROM quota_window_history") == [(18,)]


def test_tokens_of_three_hundred_accounts_are_those_of_their_rows_in_any_span(store):
    chance, names = random.Random(7), [f"u{number}@example.com" for number in range(300)]
    sent = [(name, NOW + chance.uniform(-9e4, 0), chance.randrange(9999)) for name in chance.choices(names, k=1500)]
    put(store, *(event(at=ts, source=name, auth_index=name, total_tokens=count) for name, ts, count in sent))
    for index in range(0, 300, 3):
        store.save_reading(reading(email=names[index], account_id_tag=f"#{index}"))
    first = store.span()[0]
    edges = (first, NOW - 900, NOW - 86400 + 0.5, NOW, *(chance.uniform(first, NOW) for _ in range(6)))
    spans = [(one, *sorted(chance.sample(edges, 2))) for one in store.accounts() if one.identity_ids for _ in range(6)]
    assert len(spans) > 1500
    wanted = [sum(n for source, ts, n in sent if source == one.mail and start <= ts < end) for one, start, end in spans]
    assert store.tokens(spans, NOW) == wanted
