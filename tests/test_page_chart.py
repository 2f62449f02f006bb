"""The chart: read from its pixels, the read-out, the table behind it, and what the API answers."""

from __future__ import annotations

import contextlib
import datetime

import pytest
from page_support import HOUR, LANGS, WORDS, tokens
from support import event, put

import usage_dashboard as app


def moments(*texts):
    return [app.parse_time(text)[0] for text in texts]


@contextlib.contextmanager
def zone(page, name):
    """Let the browser stand in another time zone."""
    page.cdp("Emulation.setTimezoneOverride", timezoneId=name)
    try:
        yield
    finally:
        page.cdp("Emulation.setTimezoneOverride", timezoneId="")


def highest(drawn, kind="cached"):
    """Return the index of the bar with the most of a kind, and how high that is."""
    heights = [bar.get(kind, 0) for bar in drawn["bars"]]
    return heights.index(max(heights)), max(heights)


def kinds_of(drawn):
    return {kind for bar in drawn["bars"] for kind in bar}


def test_bars_are_as_high_as_their_tokens(page, site):
    drawn = page.open().chart()
    assert kinds_of(drawn) == {"cached", "input", "output", "reasoning", "failed"}
    index, cached = highest(drawn)
    assert drawn["bars"][index]["input"] == pytest.approx(cached * 2_122 / 88_000, abs=1.6)
    assert cached == pytest.approx((drawn["base"] - drawn["top"]) * 88_000 / 100_000, abs=8)  # the grid shines through
    thin = drawn["bars"][index]
    assert min(thin["output"], thin["reasoning"]) >= 2  # about 1% of it: the largest kind makes room for them


@pytest.mark.parametrize("dark", [False, True])
def test_kinds_stand_out_from_the_ground_and_from_their_neighbours(page, empty, dark):
    put(empty.store, event(at=empty.now - 60, **tokens(5000, 2000, 4000, 2000, 9500)))
    page.emulate(dark=dark)
    page.open()
    css = "getComputedStyle(e).backgroundColor.match(/\\d+/g).map((n) => n / 255)"
    ground, *kinds = [sum(share * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
                          for share, c in zip((0.2126, 0.7152, 0.0722), colour)) + 0.05
                      for colour in page.all("body, #legend i", css)]  # fmt: skip
    contrast = [max(pair) / min(pair) for pair in (*((ground, kind) for kind in kinds), *zip(kinds[:4], kinds[1:5]))]
    assert len(contrast) == 10 and min(contrast) >= 3
    assert kinds_of(page.chart()) == {"cached", "input", "output", "reasoning", "other"}


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("dark", [False, True])
def test_canvas_is_sharp_and_drawn_in_the_colours_of_the_legend(page, empty, scale, dark):
    hour = int(empty.now) // HOUR * HOUR
    sums = tokens(5000, 2000, 4000, 2000, 9500)
    put(empty.store, event(at=hour - 1800, **sums), event(at=hour - 1800, failed=1, **sums))
    page.emulate(dark=dark)
    page.open()
    page.resize(1440, 900, scale)  # as on another screen
    page.wait_for("#chart", f"e.width === e.clientWidth * {scale}")
    width, height, room, rows = page.one("#chart", "[e.width, e.height, e.clientWidth, e.clientHeight]")
    assert (width, height) == (room * scale, rows * scale)
    colours = page.all("#legend i", "getComputedStyle(e).backgroundColor")
    assert len(set(colours)) == len(kinds_of(page.chart())) == 6


@pytest.mark.parametrize("feature, value", [("prefers-contrast", "more"), ("forced-colors", "active")])
def test_more_contrast_and_forced_colours_reach_text_and_canvas(page, site, feature, value):
    page.open()
    place = page.chart()
    pixel = f"getImageData({place['left'] + 5}, {place['base']}, 1, 1).data"
    axis = f"[...document.querySelector('#chart').getContext('2d').{pixel}].slice(0, 3).join()"
    before = page.js(axis)
    page.cdp("Emulation.setEmulatedMedia", media="", features=[{"name": feature, "value": value}])
    page.wait_until(f"matchMedia('({feature}: {value})').matches")
    ink = page.script("""
      const i = document.createElement('i'); document.body.append(i);
      i.style.cssText = 'forced-color-adjust: none; color: var(--ink)';
      const c = getComputedStyle(i).color; i.remove(); return c.match(/\\d+/g).slice(0, 3).join()""")
    page.wait_until(f"{axis} === '{ink}'")
    assert before != ink
    assert page.one(".kpi dt", "getComputedStyle(e).color.match(/\\d+/g).slice(0, 3).join()") == ink


def test_outages_that_lost_requests_look_and_read_otherwise_than_kept_ones(page, site, between):
    hour = int(site.now) // HOUR * HOUR
    put(site.store, event(at=hour - 60.5 * HOUR))
    between.changes["/api/summary"] = lambda body: body.update(outages=[
        {"from": hour - 20 * HOUR, "to": hour - 19 * HOUR, "reason": "stopped", "lost": True},
        {"from": hour - 10 * HOUR, "to": hour - 9 * HOUR, "reason": "unreachable", "lost": False},
        {"from": hour - 6 * HOUR, "to": hour - 5 * HOUR, "reason": "proxy_restarted"},
    ])  # fmt: skip
    page.open(server=between)
    drawn = page.chart()
    last = len(drawn["bars"]) - 1
    found = []
    for back in (20, 10, 6):
        # One row of pixels between two lines of the grid.
        x, y = drawn["left"] + (last - back) * drawn["slot"], drawn["top"] + 12
        found.append(page.script("""
          const c = document.querySelector('#chart').getContext('2d'), d = c.getImageData(...arguments, 1).data;
          let lines = 0, red = false;
          for (let i = 4; i < d.length; i += 4) {
            if (d[i + 3] > 24 && d[i - 1] <= 24) lines += 1;
            if (d[i + 3] > 24 && d[i] > d[i + 1] + 40) red = true;
          }
          return [lines, red];""", x, y, drawn["slot"]))  # fmt: skip
    (lost, lost_red), (kept, kept_red), (unknown, unknown_red) = found
    assert lost == unknown > kept >= 3
    assert (lost_red, kept_red, unknown_red) == (True, False, False)
    for back, told, why in ((20, "chart.lost", "outage.stopped"), (10, "chart.kept", "state.unreachable"),
                            (6, None, "outage.proxy_restarted")):  # fmt: skip
        text = page.hover(last - back)
        assert "not recording" in text and WORDS[why][0] in text
        assert [key for key in ("chart.lost", "chart.kept") if WORDS[key][0] in text] == ([told] if told else [])
        assert ("0 tokens" in text) is (back != 20)  # nobody knows of the hour that is lost
    assert page.buckets()[last - 20][1:] == (None, None, None) and page.buckets()[last - 10][1] == 0
    page.open("?range=7d", server=between, fresh=False)
    for n, lang in enumerate(LANGS):
        page.speak(lang)
        down, cut, running, lost, kept, yet = (WORDS[f"chart.{key}"][n].replace(" {t}", "") for key in (
            "down", "cut", "running", "lost", "kept", "yet"))  # fmt: skip
        told = [f"{cut} / {running}", f"{down}, {lost}", f"{down}, {kept}", down, yet]
        assert page.all("#legend .sign") == told
        assert WORDS["least"][n].replace("{n}", ("98.4k tokens", "98,4k token")[n]) in page.text("#chart-readout")
        assert page.text("#kpi-requests") == "≥ 4"
    between.changes.clear()
    page.open("?range=24h", server=between)
    assert page.all("#legend .sign") == ["partly shown / still running"] and page.text("#kpi-requests") == "3"


def test_table_and_words_behind_the_canvas_hold_the_same_numbers(page, site):
    page.open()
    told = site.json("/api/summary?range=24h&bucket=auto&tz_offset=0")
    nothing = (None, None, None)  # nobody counted before the first record
    sums = [(h["requests"], h["total_tokens"], h["failed"]) for h in told["hours"]]
    starts = [h["start"] for h in told["hours"]]
    early = [start + HOUR <= told["first_record"] for start in starts]
    assert [row[1:] for row in page.buckets()] == [nothing if no else own for no, own in zip(early, sums)]
    assert [row[0].endswith(", not recorded yet") for row in page.buckets()] == early and sum(early) > 20
    assert page.one("#chart", "e.getAttribute('aria-valuetext')").startswith("Last 24 hours, 98.3k tokens")
    assert page.hover(0) == page.buckets()[0][0]


@pytest.mark.parametrize("start, end, expected", [
    # Berlin, autumn: 26 October 2025 has 25 hours, and October as seen from winter lies in summer time.
    ("2025-10-20T00:00:00+02:00", "2025-11-02T00:00:00+01:00",
     {"2025-10-25T23:30:00+02:00": 5, "2025-10-26T00:30:00+02:00": 6,
      "2025-10-26T23:30:00+01:00": 6, "2025-10-27T00:30:00+01:00": 7}),
    # Spring: 30 March 2025 has 23 hours.
    ("2025-03-24T00:00:00+01:00", "2025-04-06T00:00:00+02:00",
     {"2025-03-29T23:30:00+01:00": 5, "2025-03-30T00:30:00+01:00": 6,
      "2025-03-30T23:30:00+02:00": 6, "2025-03-31T00:30:00+02:00": 7}),
    # Wholly in the other half of the year than most of the days on which this test runs.
    ("2025-07-01T00:00:00+02:00", "2025-07-14T00:00:00+02:00",
     {"2025-07-02T00:30:00+02:00": 1, "2025-07-02T23:30:00+02:00": 1, "2025-07-03T00:10:00+02:00": 2}),
    ("2025-01-01T00:00:00+01:00", "2025-01-14T00:00:00+01:00",
     {"2025-01-02T00:30:00+01:00": 1, "2025-01-02T23:30:00+01:00": 1, "2025-01-03T00:10:00+01:00": 2}),
])  # fmt: skip
def test_days_begin_at_local_midnight_also_over_a_change_of_the_clocks(page, empty, start, end, expected):
    first, last = moments(start, end)
    put(empty.store, *[event(at=at) for at in [first - HOUR, *moments(*expected)]])
    with zone(page, "Europe/Berlin"):
        rows = page.open(f"?range=7d&start={first:.0f}&end={last:.0f}").buckets()
    day = datetime.date.fromisoformat(start[:10])
    days = [day + datetime.timedelta(n) for n in range(13)]
    assert [label for label, *_ in rows] == [f"{day:%a} {day.day} {day:%b}" for day in days]
    assert [row[1] for row in rows] == [list(expected.values()).count(n) for n in range(13)]


def test_days_begin_at_local_midnight_also_where_only_the_middle_has_another_time(page, empty):
    put(empty.store, *[event(at=at) for at in moments("2024-07-01T00:00:00Z", "2025-07-01T23:30:00-04:00",
                                                      "2025-07-02T00:30:00-04:00")])  # fmt: skip
    first, last, winter = moments("2025-01-01T00:00:00-05:00", "2025-12-01T00:00:00-05:00", "2025-12-15T00:00:00-05:00")
    with page.before_load(f"Date.now = () => {winter * 1000:.0f}"), zone(page, "America/New_York"):
        rows = page.open(f"?range=all&start={first:.0f}&end={last:.0f}").buckets()
        page.speak("vi")
        assert page.buckets()[0][0] == "1/1 – 2/1"
    assert len(rows) > 100 and rows[0][0] == "1 Jan – 2 Jan"
    assert [row[:2] for row in rows if row[1]] == [("30 Jun – 1 Jul", 1), ("2 Jul – 3 Jul", 1)]


def test_hours_of_a_week_are_cut_by_the_wall_clock_over_a_change_of_the_clocks(page, empty):
    put(empty.store, *[event(at=at) for at in moments("2025-10-01T00:00:00Z", "2025-10-24T05:59:00+02:00",
                                                      "2025-10-28T06:00:00+01:00")])  # fmt: skip
    first, last = moments("2025-10-22T00:00:00+02:00", "2025-10-29T00:00:00+01:00")
    page.resize(2560, 1000)
    with zone(page, "Europe/Berlin"):
        rows = page.open(f"?range=7d&start={first:.0f}&end={last:.0f}").buckets()
        marks = page.chart()["marks"]
    hours = [f"{hour:02}:00" for hour in range(0, 24, 3)]
    assert [row[0].split(", ")[1] for row in rows] == [f"{a}–{b}" for a, b in zip(hours, hours[1:] + hours[:1])] * 7
    assert [row[0] for row in rows if row[1]] == ["Fri 24 Oct, 03:00–06:00", "Tue 28 Oct, 06:00–09:00"]
    assert marks == list(range(0, 56, 4))  # at midnight and noon


def test_today_is_told_by_the_hour_from_its_first_minute_to_midnight(page, site, between):
    put(site.store, event(at=site.now - 30 * HOUR))
    page.open("?range=today", server=between)
    assert all("bucket=" not in path for path in between.asked if path.startswith("/api/summary"))
    assert page.buckets()[0][0].endswith("00:00–01:00")
    midnights = page.js("[0, 24].map((hour) => new Date().setHours(hour, 0, 0, 0) / 1000)")
    assert len(page.chart()["bars"]) == (midnights[1] - midnights[0]) / HOUR


def test_chart_is_read_out_by_the_keyboard(page, site):
    page.open()
    before = page.text("#chart-readout")
    page.script("document.querySelector('#chart').focus()")
    page.press("End")
    page.wait_for_text("#chart-readout", "–")
    last = page.text("#chart-readout")
    page.press("ArrowLeft")
    page.wait_for("#chart-readout", f"e.textContent !== {last!r}")
    page.press("Escape")
    page.wait_for("#chart-readout", f"e.textContent === {before!r}")


def test_legend_isolates_a_kind_and_rescales(page, site):
    page.open()
    room = page.chart()["base"] - page.chart()["top"]
    assert highest(page.chart(), "reasoning")[1] < room / 10
    page.click("#legend [data-kind=reasoning]")
    page.wait_for_text("#chart-title", "Reasoning tokens")
    drawn = page.chart()
    assert kinds_of(drawn) == {"reasoning", "failed"} and highest(drawn, "reasoning")[1] > room * 0.6
    page.click("#legend [data-kind=reasoning]")
    page.wait_for("#chart-title", "!e.textContent.includes('Reasoning')")
    assert len(kinds_of(page.chart())) == 5


@pytest.mark.parametrize("query, width, words, requests, more", [
    ("range=24h", 1440, "13:00–14:00, from 13:57", 3, "still running"),
    ("range=7d", 1440, "12:00–15:00, from 13:57", 63, "still running"),
    ("range=90d", 320, "2 Jan – 3 Jan, from 2 Jan 13:57", 300, "still running"),
    ("range=7d&start=1774524000&end=1774541400", 1440, "11:15–11:30, from 11:20", 10, "16:00–16:15, until 16:10"),
])  # fmt: skip
def test_bar_that_the_window_cuts_is_told_drawn_and_narrowed_to_as_what_it_covers(
    page, empty, query, width, words, requests, more
):
    [empty.now] = moments("2026-04-02T13:57:00Z")
    put(empty.store, *[event(at=empty.now - day * 24 * HOUR + 60 * n) for day in (1, 7, 90) for n in range(-300, 300)])
    page.resize(width, 900)
    with zone(page, "UTC"):
        drawn = page.open(f"?{query}").chart()
        last = len(drawn["bars"]) - 1
        assert more in page.hover(last) and words in page.hover(0)
        assert drawn["faint"] == [i for i in (0, last) if drawn["bars"][i]]
        assert words in page.buckets()[0][0] and page.buckets()[0][1] == requests
        page.press_mouse()
        page.wait_for_requests(requests)


def test_click_on_a_bar_narrows_everything_to_it_and_back_undoes_it(page, site):
    page.open()
    index, _ = highest(page.chart())
    bar = site.json("/api/summary?range=24h&bucket=auto&tz_offset=0")["hours"][index]
    requests, start = bar["requests"], int(bar["start"])
    assert 0 < requests < 3
    page.hover(index)
    assert page.one("#chart-readout b", "e.title") == f"{bar['total_tokens']:,}"
    page.press_mouse()
    page.wait_for_requests(requests)
    assert page.js("location.search").endswith(f"start={start}&end={start + HOUR}")
    page.wait_for_rows(requests)
    assert page.text("#narrowed").startswith("Time: ")
    page.script("history.back()")
    page.wait_for_requests(3)
    assert page.one("#narrowed", "e.hidden")


def test_drag_reads_its_span_out_escape_gives_it_up_and_letting_go_narrows_to_it(page, site):
    page.open()
    drawn, (left, top) = page.chart(), page.one("#chart", "[e.getBoundingClientRect().x, e.getBoundingClientRect().y]")
    before, last = page.text("#chart-readout"), len(drawn["bars"]) - 1

    def drag():
        for kind, index in (("mousePressed", last), ("mouseMoved", last - 3)):
            place = {"x": left + drawn["left"] + (index + 0.5) * drawn["slot"], "y": top + 30}
            page.cdp("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **place)
        page.wait_for_text("#chart-readout", " · 98.3k tokens · 3 requests · 1 failed")
        assert page.text("#chart-readout") != before
        return lambda: page.cdp("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **place)

    let_go = drag()
    page.press("Escape")
    page.wait_for("#chart-readout", f"e.textContent === {before!r}")
    let_go()
    assert "start=" not in page.js("location.search") and page.text("#live") == ""
    drag()()
    page.wait_until("location.search.includes('start=')")
    page.wait_for("#live", "e.textContent === '98.3k tokens, 3 requests'")
    page.script("document.querySelector('#live').textContent = ''")
    put(site.store, event(at=site.now - 30))
    page.click("#refresh")
    page.wait_for_requests(4)
    assert page.text("#live") == ""  # only what its reader asked for is announced


def test_side_panel_stands_as_high_as_the_chart_and_on_a_phone_shows_eight_rows_first(page, empty):
    put(empty.store, *[event(at=empty.now - 60 - n, model=f"m{n:02}", total_tokens=900 - n) for n in range(24)])
    page.open()
    bottoms = page.all("#reading, #panel", "Math.round(e.getBoundingClientRect().bottom)")
    assert bottoms[0] == bottoms[1] and len(page.all("#entries li")) == 24 and page.one("#panel-all", "e.hidden")
    page.resize(390, 844)
    page.wait_until("document.querySelectorAll('#entries li').length === 8")
    assert page.text("#panel-all") == "Show all 24"
    page.click("#panel-all")
    assert len(page.all("#entries li")) == 24 and page.one("#panel", "e.scrollHeight <= e.clientHeight")
    assert page.js("document.activeElement.parentNode.dataset.row") == "m08"


def test_finger_reads_a_bar_first_and_narrows_with_the_second_tap(page, site):
    page.open()
    drawn = page.chart()
    index, _ = highest(drawn)
    requests = page.buckets()[index][1]
    place = ("#chart", drawn["left"] + (index + 0.5) * drawn["slot"], drawn["base"] - 20)
    page.tap(*place)
    page.wait_for_text("#chart-readout", "–")
    assert "start=" not in page.js("location.search")
    page.tap(*place)
    page.wait_until("location.search.includes('start=')")
    page.wait_for_requests(requests)
    page.wait_for_rows(requests)
