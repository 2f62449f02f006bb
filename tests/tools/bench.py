"""Measure the dashboard side by side with the bare cost of the same work; needs only a redis-server.

    python3 tests/tools/bench.py [--events N] [--idle SECONDS] [--against SCRIPT]

`--against` compares the ingest with another version of the script, which lies beside its own page, as in a worktree.

Ratios within one run are worth more than the figures themselves, which differ from machine to machine. Most
figures are medians of several runs. `--events 1000000` takes some minutes, `10000000` most of an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import itertools
import json
import os
import platform
import random
import sqlite3
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, Iterator, NamedTuple

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

from program import COMPILED, Running, get  # noqa: E402
from redis_server import RedisServer  # noqa: E402
from sockets import comes_up  # noqa: E402
from support import free_port, rows  # noqa: E402

import usage_dashboard as app  # noqa: E402

DAY_S = 86400
HISTORY_S = 100 * DAY_S  # so that 90 days are really 90 days
PACE_S = 30 * DAY_S / 1_000_000  # between two events of the ingest: a million in a month
MOST_INGESTED = 100_000  # more would measure the same again, and fill the memory of redis-server
BATCH = 500
SCRIPT = ROOT / "usage_dashboard.py"
RANGES_S = {"24h": DAY_S, "7d": 7 * DAY_S, "30d": 30 * DAY_S, "90d": 90 * DAY_S, "all": 2 * HISTORY_S}


# ---- events as a proxy sends them ------------------------------------------------------------------------

CODEX_MODELS = ("gpt-5.5", "gpt-5.4", "gpt-5.4-mini", "gpt-5.3-codex")
CODEX = [("codex", f"dev.{number}@example.com", CODEX_MODELS, "POST /v1/responses") for number in range(8)]
OTHERS = [
    ("claude", "writer@example.com", ("claude-sonnet-4-6", "claude-opus-4-7"), "POST /v1/messages"),
    ("claude", "second@example.com", ("claude-sonnet-4-6",), "POST /v1/messages"),
    ("gemini", "AIzaSyFAKE-fake-fake-fake-fake-000000001", ("gemini-3-pro",), "POST /v1beta/models/*action"),
    ("openai", "sk-FAKE-provider-key-0000000001", ("qwen3-coder", "glm-5"), "POST /v1/chat/completions"),
]
SENDERS = CODEX + OTHERS
CLIENT_KEYS = [f"sk-client-{number:04d}-aaaa-bbbb-{number:04d}" for number in range(12)]
MODELS = [model for _, _, models, _ in SENDERS for model in models]
NO_LIMIT_LEFT = (
    '{"error":{"type":"usage_limit_reached","message":"The usage limit has been reached","plan_type":"plus",'
    '"resets_in_seconds":7404}}'
)


@functools.lru_cache(maxsize=None)
def clients_at(hour: int) -> list[tuple[str, str]]:
    """Return the four clients that work in this hour, as (key, the model that it asks for)."""
    dice = random.Random(hour)
    return [(CLIENT_KEYS[number], MODELS[number * 7 % len(MODELS)]) for number in dice.sample(range(12), 4)]


@functools.lru_cache(maxsize=None)
def senders_of(model: str) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Return the accounts of the pool that serve a model, of which the proxy takes one in turn."""
    return [sender for sender in SENDERS if model in sender[2]]


def payload(dice: random.Random, at: float) -> bytes:
    """Write one event of 350 to 900 bytes in a shape of an older or a newer proxy."""
    key, model = dice.choice(clients_at(int(at) // 3600))
    if dice.random() < 0.1:
        model = dice.choice(MODELS)
    provider, source, _, endpoint = dice.choice(senders_of(model))
    failed = dice.random() < 0.03
    fresh, cached, output = (0 if failed else dice.randrange(most) for most in (9000, 200_000, 4000))
    reasoning, total = output // 3, fresh + cached + output
    event = {
        "timestamp": f"{app.utc_text(at)[:-1]}.{dice.randrange(10**9):09d}Z", "latency_ms": dice.randrange(300, 60000),
        "ttft_ms": dice.randrange(200, 4000), "source": source, "auth_index": f"{app.short_tag(source)}0123456789",
        "tokens": {"input_tokens": fresh + cached, "output_tokens": output, "reasoning_tokens": reasoning,
                   "cached_tokens": cached, "total_tokens": total}, "failed": failed,
    }  # fmt: skip
    if dice.random() < 0.6:  # newer proxies say more
        event.update({
            "client_ip": "172.18.0.1", "user_agent": "codex_cli_rs/0.130.0", "generate": True,
            "fail": {"status_code": 429 if failed else 200, "body": NO_LIMIT_LEFT if failed else ""},
            "accounting_version": 2, "token_breakdown": {
                "schema_version": 2, "quality": "complete", "total_tokens": total,
                "input": {"total_tokens": fresh + cached, "uncached_tokens": fresh, "cache_read_tokens": cached,
                          "cache_write_tokens": 0},
                "output": {"total_tokens": output, "non_reasoning_tokens": output - reasoning,
                           "reasoning_tokens": reasoning}, "unclassified_tokens": 0,
            }, "alias": model, "reasoning_effort": dice.choice(("low", "high", "")), "service_tier": "auto",
        })  # fmt: skip
    event.update(provider=provider, model=model, endpoint=endpoint, auth_type="oauth", api_key=key)
    event["request_id"] = f"{dice.getrandbits(32):08x}"
    return json.dumps(event, separators=(",", ":")).encode()


def payloads(count: int, end: float, span_s: float = HISTORY_S) -> Iterator[bytes]:
    """Return events spread evenly over a span, in the order of their ends: up to a minute out of order."""
    dice = random.Random(1)
    for number in range(count):
        yield payload(dice, end - 61 - span_s * (1 - number / count) + dice.uniform(0, 60))


def in_batches(items: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    """Return a stream of events cut into lists."""
    return iter(lambda: list(itertools.islice(items, size)), [])


# ---- the table -------------------------------------------------------------------------------------------


class Table:
    """Print measurements as they come, as rows of a Markdown table."""

    def section(self, name: str, other: str = "compared with") -> None:
        """Begin a group of rows; `other` says what the third column holds."""
        print(f"\n| {name} | dashboard | {other} | ratio |\n|---|--:|--:|--:|", flush=True)

    def row(self, name: str, ours: float, unit: str, other: float | None = None) -> None:
        """Print a figure, beside what it is compared with where there is such a thing."""
        compared = ("", "") if other is None else (_figure(other, unit), f"{ours / other:.3g}" if other else "")
        print(f"| {name} | {_figure(ours, unit)} | {compared[0]} | {compared[1]} |", flush=True)


def _figure(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 20 else 2
    return f"{value:,.{digits}f} {unit}"


class Cost(NamedTuple):
    """What some events cost: how many a second on the clock, and microseconds of this process's time for each."""

    rate: float
    processor_us: float


def cost_of(work: Callable[[], Any], events: int) -> Cost:
    """Measure some work on so many events."""
    processor_s = time.process_time()
    seconds = timed(work)
    return Cost(events / seconds, (time.process_time() - processor_s) / events * 1e6)


def timed(work: Callable[..., Any], *args: Any) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def median_ms(work: Callable[..., Any], *args: Any, runs: int = 7) -> float:
    """Return the median of several calls in milliseconds; slow ones are made less often, but once at least."""
    times: list[float] = []
    while len(times) < runs and sum(times) < 2.0:
        times.append(timed(work, *args))
    return median(times) * 1000


# ---- the program -----------------------------------------------------------------------------------------


class Dashboard(Running):
    """The real program on a database in a folder of its own; a context manager."""

    def __init__(self, folder: Path, redis: RedisServer, script: Path = SCRIPT, **settings: Any) -> None:
        self.database, self.port, config = folder / "usage.db", free_port(), folder / "config.json"
        own = {"cliproxy_port": redis.port, "dashboard_host": "127.0.0.1", "dashboard_port": self.port,
               "database": str(self.database), "auth_dir": str(folder / "no-accounts"), **settings}  # fmt: skip
        config.write_text(json.dumps(own))
        self.stored = 0
        if self.database.exists():
            ((self.stored,),) = rows(self.database, "SELECT value FROM meta WHERE key = 'stored'")
        command = [sys.executable, str(script), "start", "--no-browser", "--config", str(config)]
        env = {name: value for name, value in os.environ.items() if name not in COMPILED}
        super().__init__(command, env, folder)

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()
        self.close()

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection once the program has given an answer."""
        if not comes_up(self.process, lambda: get(self.port, "/api/summary?range=24h"), 120, every_s=0.005):
            raise SystemExit(f"the dashboard does not answer; {self.describe()}")
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def written_kb(self) -> float:
        """Return how much it has had written to the disk so far; 0 in a file system that is in memory."""
        lines = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes")) / 1000


def ask(connection: http.client.HTTPConnection, path: str, etag: str = "") -> str:
    """Ask a question on a kept connection and return the answer's tag."""
    connection.request("GET", path, headers={"Accept-Encoding": "gzip", "If-None-Match": etag})
    reply = connection.getresponse()
    reply.read()
    if reply.status not in (200, 304):
        raise SystemExit(f"{path}: {reply.status}")
    return reply.headers.get("ETag") or ""


def seconds_to_answer(database: Path, redis: RedisServer) -> float:
    """Start the program on a database, and return how long its first answer takes."""
    started = time.perf_counter()
    with Dashboard(database.parent, redis) as dashboard:
        dashboard.connect().close()
        return time.perf_counter() - started


def drain_rate(dashboard: Dashboard, count: int) -> float:
    """Watch so many events being stored, and return how many that were a second; start-up is not in the rate."""
    dashboard.wait_for_line("CLIProxyAPI Usage Dashboard", 120)  # then the database is there
    before, dashboard.stored = dashboard.stored, dashboard.stored + count
    seen: list[tuple[float, int]] = []
    while not seen or seen[-1][1] < dashboard.stored:
        stored = get(dashboard.port, "/api/health")["collector"]["events"]  # what waits for a reader is stored first
        if stored > before:
            seen.append((time.perf_counter(), stored))
        time.sleep(0.02)
    return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])


def fill(folder: Path, count: int, end: float, span_s: float = HISTORY_S) -> Path:
    """Make a database of so many events by the program's own functions, without a queue."""
    with contextlib.closing(app.Store(folder / "usage.db")) as store:
        for number, batch in enumerate(in_batches(payloads(count, end, span_s), 5000), start=1):
            store.store_batch(app.parse_events(batch), number, end)
    return folder / "usage.db"


def folder_bytes(folder: Path) -> int:
    """Return the size of a database with everything that belongs to it."""
    return sum(file.stat().st_size for file in folder.glob("usage.db*"))


# ---- ingest ----------------------------------------------------------------------------------------------

STORED_COLUMNS = app._EVENT_COLUMNS


def bare_cost(events: list[bytes], folder: Path) -> Cost:
    """Do the least that could be called storing: json.loads and executemany of all columns, a time index, FULL."""
    db = sqlite3.connect(str(folder / "bare.db"), isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"CREATE TABLE events(id INTEGER PRIMARY KEY, {', '.join(STORED_COLUMNS)})")
    db.execute("CREATE INDEX events_by_time ON events(timestamp)")
    insert = f"INSERT INTO events({', '.join(STORED_COLUMNS)}) VALUES ({', '.join('?' * len(STORED_COLUMNS))})"

    def store_all() -> None:
        for first in range(0, len(events), 1000):
            decoded = map(json.loads, events[first : first + 1000])
            table = [tuple(map({**event, **event["tokens"]}.get, STORED_COLUMNS)) for event in decoded]
            db.execute("BEGIN")
            db.executemany(insert, table)
            db.execute("COMMIT")

    with contextlib.closing(db):
        return cost_of(store_all, len(events))


def pop_cost(redis: RedisServer, events: list[bytes]) -> Cost:
    """Take events off the queue by the program's own client, and do nothing with them."""
    redis.push("usage", *events)
    source = app.PopSource(lambda: app.connect_tcp(redis.host, redis.port), "", "usage")
    source.open()

    def pop_all() -> None:
        while source.take(source.largest_batch).full:
            pass

    cost = cost_of(pop_all, len(events))
    source.close()
    return cost


def ingest_rate(redis: RedisServer, events: list[bytes], folder: Path, script: Path = SCRIPT) -> tuple[float, float]:
    """Let the real program empty a full queue into a new database; also return the bytes an event then takes."""
    redis.push("usage", *events)
    with Dashboard(folder, redis, script) as dashboard:
        rate = drain_rate(dashboard, len(events))
    return rate, folder_bytes(folder) / len(events)


def microseconds_by_step(events: list[bytes], folder: Path) -> dict[str, float]:
    """Return the processor time that each step of the collector costs an event, one after the other in one thread."""
    store, spool = app.Store(folder / "usage.db"), app.Spool(folder / "usage.db.spool")
    spent = {"parse and mask": 0.0, "spool": 0.0, "store with roll-ups, commit": 0.0}

    def add(step: str, work: Callable[..., Any], *args: Any) -> Any:
        started = time.process_time()
        result = work(*args)
        spent[step] += time.process_time() - started
        return result

    for number, batch in enumerate(in_batches(iter(events), BATCH), start=1):
        parsed = add("parse and mask", app.parse_events, batch)
        add("spool", spool.append, number, parsed)
        add("store with roll-ups, commit", store.store_batch, parsed, number, time.time())
        add("spool", spool.clear)
    store.close()
    return {step: seconds / len(events) * 1e6 for step, seconds in spent.items()}


def measure_ingest(table: Table, redis: RedisServer, count: int, scratch: Path, against: Path | None) -> None:
    """Compare the whole way of an event with the bare cost on the same payloads."""
    events = list(payloads(count, time.time(), count * PACE_S))
    bares, drains, others = [], [], []
    for _ in range(3):
        bares.append(bare_cost(events, new_folder(scratch)))
        drains.append(ingest_rate(redis, events, new_folder(scratch)))
        if against is not None:
            others.append(ingest_rate(redis, events, new_folder(scratch), against)[0])
    pops = [pop_cost(redis, events) for _ in range(3)]
    steps = {"pop": median(pop.processor_us for pop in pops), **microseconds_by_step(events, new_folder(scratch))}
    rate = median(rate for rate, _ in drains)
    table.section(f"ingest, {count:,} events of {len(b''.join(events)) / count:.0f} bytes", "json.loads + executemany")
    table.row("end to end: redis-server → program → SQLite", rate, "events/s", median(bare.rate for bare in bares))
    table.row("pops alone", median(pop.rate for pop in pops), "events/s")
    bare_us = median(bare.processor_us for bare in bares)
    table.row("processor time of an event", sum(steps.values()), "µs", bare_us)
    for step, cost in steps.items():
        table.row(f"of it: {step}", cost, "µs")
    table.row("disk, the whole directory", median(size for _, size in drains), "bytes/event")
    if others:
        table.section("ingest, end to end", "the other version")
        table.row("redis-server → program → SQLite", rate, "events/s", median(others))


# ---- queries ---------------------------------------------------------------------------------------------

FILTERS: dict[str, dict[str, str]] = {
    "": {}, " by account": {"account": "dev.1@example.com"}, " by model": {"model": "gpt-5.4"},
    " by account and model": {"account": "dev.1@example.com", "model": "gpt-5.4"}, " by status": {"status": "failed"},
}  # fmt: skip


def summary_ms(store: app.Store, span_s: float, end: float) -> float:
    """Ask for a fresh summary as the page does, past every cache."""
    bucket_s = 3600 if span_s <= 2 * DAY_S else 3 * 3600 if span_s <= 8 * DAY_S else DAY_S
    return median_ms(store.usage, app.Window(end - span_s, end), bucket_s, 7 * 3600)


def measure_queries(table: Table, small: Path, large: Path, count: int, end: float) -> None:
    """Compare fresh summaries with those of a tenth of the data."""
    with contextlib.closing(app.Store(small)) as tenth, contextlib.closing(app.Store(large)) as store:
        table.section(f"fresh summary, {count:,} events in {HISTORY_S // DAY_S} days", f"{count // 10:,} events")
        for name, span_s in RANGES_S.items():
            table.row(name, summary_ms(store, span_s, end), "ms", summary_ms(tenth, span_s, end))
        table.row("newest 100 requests", median_ms(store.requests, 101), "ms")


def measure_zones(table: Table, count: int, end: float, scratch: Path) -> None:
    """Ask for hourly summaries of a month's events in zones off the hour."""
    table.section(f"hourly summary, {count:,} events in 30 days")
    zones, periods = (("UTC+7", 25200), ("UTC+5:30", 19800), ("UTC+5:45", 20700)), ("24h", "7d", "30d")
    with contextlib.closing(app.Store(fill(new_folder(scratch), count, end, 30 * DAY_S))) as store:
        for (zone, offset_s), period, name in itertools.product(zones, periods, FILTERS):
            window, filters = app.Window(end - RANGES_S[period] + 77, end - 33.5), app.Filters(**FILTERS[name])
            table.row(f"{zone}, {period}{name}", median_ms(store.usage, window, 3600, offset_s, filters), "ms")


# ---- serving ---------------------------------------------------------------------------------------------

PAGE_LOAD = ("/api/summary?range=7d&tz_offset=420", "/api/requests?limit=100", "/api/quota", "/api/health")


def measure_serving(table: Table, redis: RedisServer, large: Path, idle_s: float) -> None:
    """Start the program on the large database and load its page, idle and under load."""
    starts = [seconds_to_answer(large, redis) * 1000 for _ in range(3)]
    table.section("serving the same database")
    table.row("start to the first answer", median(starts), "ms")
    with Dashboard(large.parent, redis) as dashboard:
        connection = dashboard.connect()
        before, started = dashboard.processor_s, time.perf_counter()
        time.sleep(idle_s)
        busy = (dashboard.processor_s - before) / (time.perf_counter() - started)
        table.row(f"processor while idle, {idle_s:g} s", busy * 100, "%")
        tag = ask(connection, PAGE_LOAD[0])
        table.row("summary, unchanged (304)", median_ms(ask, connection, PAGE_LOAD[0], tag, runs=200), "ms")
        connection.close()


def measure_writes(table: Table, redis: RedisServer, large: Path, watched_s: float) -> None:
    """Let single events come, and nothing, while a page is open, and read what is written to the disk."""
    table.section(f"written to the disk, {watched_s:g} s each, a page open")
    for name, pause_s in (("1 event a second", 1.0), ("an event in 5 seconds", 5.0), ("nothing", 0.0)):
        count = int(watched_s / pause_s) if pause_s else 0
        coming = payloads(count, time.time(), watched_s)
        with Dashboard(large.parent, redis) as dashboard:
            connection = dashboard.connect()
            time.sleep(5)  # a start writes when it last stood still, and what else it found
            before, loaded_at = dashboard.written_kb(), time.monotonic()
            for _ in range(int(watched_s / (pause_s or 1.0))):
                redis.push("usage", *itertools.islice(coming, 1))
                time.sleep(pause_s or 1.0)
                if time.monotonic() - loaded_at >= 30:
                    loaded_at += 30
                    for path in PAGE_LOAD:
                        ask(connection, path)
            kilobytes = dashboard.written_kb() - before
        table.row(name, kilobytes / max(1, count), "KB an event" if count else "KB")


def eight_clients(dashboard: Dashboard, seconds: float, pause_s: float) -> list[float]:
    """Load the page's data over and over on eight kept connections, and return each answer's milliseconds."""
    ended = time.monotonic() + seconds

    def load(_: int) -> list[float]:
        times = []
        with contextlib.closing(dashboard.connect()) as connection:
            while time.monotonic() < ended:
                times += [timed(ask, connection, path) * 1000 for path in PAGE_LOAD]
                time.sleep(pause_s)
        return times

    with ThreadPoolExecutor(8) as pool:
        return list(itertools.chain(*pool.map(load, range(8))))


def measure_both(table: Table, redis: RedisServer, events: list[bytes], large: Path) -> None:
    """Let eight clients poll twice a second while the program empties a full queue into the large database."""
    alone, _ = ingest_rate(redis, events, large.parent)
    redis.push("usage", *events)
    with Dashboard(large.parent, redis) as dashboard:
        with ThreadPoolExecutor(1) as pool:
            clients = pool.submit(eight_clients, dashboard, max(2.0, len(events) / alone), pause_s=0.5)
            together, answers = drain_rate(dashboard, len(events)), clients.result()
        table.section("eight clients, twice a second, and a full ingest", "alone")
        table.row("ingest", together, "events/s", alone)
        table.row("an answer, median", median(answers), "ms")
        table.row("an answer, 99 of 100 within", quantiles(answers, n=100)[98], "ms")
        table.row("memory, highest", dashboard.peak_mb, "MB")
        table.row("write-ahead log, largest", Path(f"{large}-wal").stat().st_size / 1e6, "MB")


# ---- all of it -------------------------------------------------------------------------------------------


def new_folder(scratch: Path) -> Path:
    """Make a folder of its own within the scratch folder."""
    return Path(tempfile.mkdtemp(dir=str(scratch)))


def machine() -> str:
    """Name what the figures were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"


def main() -> None:
    """Measure everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000, help="size of the large database (%(default)s)")
    parser.add_argument("--against", type=Path, help="another version of the script, beside its page")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds to watch the idle program (%(default)s)")
    parser.add_argument("--writes", type=float, default=60.0, help="seconds to watch the disk, thrice (%(default)s)")
    options = parser.parse_args()
    ingested = min(options.events, MOST_INGESTED)
    table, end = Table(), time.time()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="dashboard-bench-") as folder, RedisServer() as redis:
        scratch = Path(folder)
        measure_ingest(table, redis, ingested, scratch, options.against)
        small = fill(new_folder(scratch), options.events // 10, end)
        large = fill(new_folder(scratch), options.events, end)
        measure_queries(table, small, large, options.events, end)
        measure_zones(table, options.events, end, scratch)
        measure_serving(table, redis, large, options.idle)
        measure_writes(table, redis, large, options.writes)
        measure_both(table, redis, list(payloads(ingested, time.time(), ingested * PACE_S)), large)


if __name__ == "__main__":
    main()
