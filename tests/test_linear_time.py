from __future__ import annotations

import time

import pytest
from support import Site

import usage_dashboard as app

# What makes a pattern try every place of a text with every length, where it is not careful.
UNITS = ("a", "1", "-", "a-", ".", "a.a", "@", "a@", "a@.", "a@a.", "@.aa1", ":", "a:", "0:", "1.", "sk-", "sk-a",
         "eyJ", " ", '"', "'", ",", "gzip;q=0", "gzip ", "W/", "é", "\ud800", "_1-", "h", "//", "[", "127.",
         "://")  # fmt: skip


def taken_s(work, text) -> float:
    """Return the least processor time of several runs: what it takes when nothing else is in the way."""

    def once() -> float:
        began = time.process_time()
        for _ in range(3):
            work(text)
        return time.process_time() - began

    return min(once() for _ in range(3))


def assert_linear(work, unit, length) -> None:
    """Assert that a text of eight times the length takes about eight times as long, and not 64 times."""
    short, long = (unit * length)[:length], (unit * length * 8)[: length * 8]

    def ratio() -> float:
        return taken_s(work, long) / max(0.0004, taken_s(work, short))  # what is quicker cannot be compared

    measured = ratio()
    if measured > 20:  # the machine may have been busy with something else
        measured = ratio()
    assert measured <= 20, f"{measured:.0f} times as long for {unit!r}"


@pytest.mark.parametrize("unit", UNITS)
def test_text_from_outside_takes_linear_time(unit):
    for work in (app.without_secrets, app.looks_like_mail, lambda text: app.failure_kind(429, text)):
        assert_linear(work, unit, 500)
        assert_linear(work, "a" + unit, 500)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.close()


HEADERS = ("If-None-Match", "Accept-Encoding", "Host", "Origin", "Authorization", "Content-Length")


@pytest.mark.parametrize("name", HEADERS)
def test_header_takes_linear_time(site, name):
    for unit in UNITS:
        if unit.isascii():
            assert_linear(lambda text: site.ask("/api/quota?force=1", **{name: text}), unit, 1_500)


def test_query_takes_linear_time(site):
    for name in ("range", "start", "limit", "before", "tz_offset", "account", "q", "status"):
        for unit in ("a", "1", "%25", "_", "%00", "%ff", "1.1", "1_", "%ED%A0%80"):
            assert_linear(lambda text, name=name: site.ask(f"/api/requests?{name}={text}"), unit, 1_500)
