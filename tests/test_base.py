from __future__ import annotations

import dis
import io
import re
import threading
import types
from datetime import datetime, timezone
from pathlib import Path
from typing import Iterator

import pytest

import usage_dashboard as app


@pytest.mark.parametrize(("text", "utc"), [
    ("2026-05-03T09:14:22.048103557+08:00", "2026-05-03T01:14:22.048103Z"),
    ("2026-07-25T14:10:00.1200345+07:00", "2026-07-25T07:10:00.120034Z"),
    ("2026-05-12T06:30:00.5Z", "2026-05-12T06:30:00.500000Z"),
    ("2026-01-02T03:04:05.123456789-03:30", "2026-01-02T06:34:05.123456Z"),
    ("2026-04-25T00:00:00Z", "2026-04-25T00:00:00.000000Z"),
    ("2024-02-29T23:59:59+05:45", "2024-02-29T18:14:59.000000Z"),
    ("2020-01-01T00:30:00Z", "2020-01-01T00:30:00.000000Z"),
])  # fmt: skip
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


def test_log_event_is_one_line_with_spaces_in_quotes():
    stream = io.StringIO()
    app.Log(stream).event("collector", state="waiting", why="nothing to pop\nyet")
    assert stream.getvalue() == 'collector state=waiting why="nothing to pop\\nyet"\n'


def test_log_to_a_closed_stream_is_no_fault():
    stream = io.StringIO()
    stream.close()
    app.Log(stream).line("anything")


def test_console_that_nobody_reads_delays_nobody_and_hears_later_how_many_lines_were_dropped(full_pipe):
    reading, writing = full_pipe
    with open(reading, "rb", closefd=False) as stream, open(writing, "w") as console:
        log = app.Log(console)
        logging = threading.Thread(target=lambda: [log.line(f"line {number}") for number in range(50)], daemon=True)
        logging.start()
        logging.join(10)
        assert not logging.is_alive()
        assert stream.read(20_000)
        log.line("one more")
        log.line("and another")
        console.close()
        assert stream.read().decode().lstrip("-").splitlines() == ["log dropped=50", "one more", "and another"]


BANNER = re.compile(r"^# -{20} (\w+: .+)$", re.M)


def test_banners_and_development_notes_tell_the_same_sections_in_the_same_order():
    notes = (app.BASE_DIR / "docs" / "development.md").read_text(encoding="utf-8").partition("## The page")[0]
    told = [f"{name}: {holds}" for name, holds in re.findall(r"^\| (\w+) \| (.+) \|$", notes, re.M)]
    assert told[1:] == BANNER.findall(Path(app.__file__).read_text(encoding="utf-8")) and len(told) == 18


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield all that a piece of the module looks up in it."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names(part)


def test_each_section_uses_only_those_above_it():
    later: set[str] = set()
    for source in reversed(BANNER.split(Path(app.__file__).read_text(encoding="utf-8"))[2::2]):
        code = compile(source, app.__file__, "exec", annotations.compiler_flag)
        looked_up = set(_names(code))
        assert len(looked_up) > 9 and looked_up & later == set()
        later |= {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_NAME"}
