from __future__ import annotations

import io
import stat
from datetime import datetime, timezone

import pytest

import usage_dashboard as app


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-05-03T09:14:22.048103557+08:00", "2026-05-03T01:14:22.048103Z"),
        ("2026-07-25T14:10:00.1200345+07:00", "2026-07-25T07:10:00.120034Z"),
        ("2026-05-12T06:30:00.5Z", "2026-05-12T06:30:00.500000Z"),
        ("2026-01-02T03:04:05.123456789-03:30", "2026-01-02T06:34:05.123456Z"),
        ("2026-04-25T00:00:00Z", "2026-04-25T00:00:00.000000Z"),
        ("2024-02-29T23:59:59+05:45", "2024-02-29T18:14:59.000000Z"),
        ("2020-01-01T00:30:00Z", "2020-01-01T00:30:00.000000Z"),
    ],
)
def test_parse_time_of_any_offset_and_precision_gives_utc(text, utc):
    epoch, shown = app.parse_time(text)
    assert shown == utc
    expected = datetime.strptime(utc, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()
    assert epoch == pytest.approx(expected, abs=1e-5)


NO_TIMES = [
    "", "now", "2026-05-03", "2026-05-03T09:14:22", "2026-02-30T00:00:00Z", "2026-05-03T25:00:00Z",
    "2026-05-03T09:14:22.0123456789Z", "2026-05-03T09:14:61Z", "2026-05-03T09:14:22+24:00", "0001-01-01T00:00:00Z",
    "2019-12-31T23:59:59Z", "2020-01-01T00:30:00+01:00", "2100-01-01T00:00:00Z", "２０２６-05-03T09:14:22Z",
    "2026-05-03T09:14:22Z\n",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_TIMES)
def test_parse_time_of_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        app.parse_time(text)


def test_backoff_doubles_up_to_its_limit_and_starts_again():
    waits = app.Backoff(first_s=1, limit_s=60, chance=lambda: 0.0)
    assert [waits.next() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    waits.reset()
    assert waits.next() == 1
    assert app.Backoff(first_s=8, chance=lambda: 1.0).next() == 6


def test_make_private_closes_a_file_that_others_could_read(tmp_path):
    path = tmp_path / "usage.db"
    path.write_text("kept")
    path.chmod(0o644)
    app.make_private(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "kept"


def test_log_event_is_one_line_with_spaces_in_quotes():
    stream = io.StringIO()
    app.Log(stream).event("collector", state="waiting", why="nothing to pop\nyet")
    assert stream.getvalue() == 'collector state=waiting why="nothing to pop\\nyet"\n'


def test_log_to_a_closed_stream_is_no_fault():
    stream = io.StringIO()
    stream.close()
    app.Log(stream).line("anything")
