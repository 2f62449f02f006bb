"""Fixtures: the stand-ins, the real servers, and the program as a subprocess."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Iterator

import pytest
from collecting import QuickStop, Run, config_of
from fake_chatgpt import FakeChatGPT
from fake_proxy import FakeProxy
from page_support import PAGE, Between, Page, fill
from program import Program, configure
from redis_server import RedisServer
from sockets import PATIENCE_S
from support import KEY, Site
from webdriver import Browser, find_browser

import usage_dashboard as app



def has_fonts():
    """Say whether the two fonts are there that texts are measured in."""
    names = ("DejaVu Sans", "Liberation Sans")
    return shutil.which("fc-match") and all(
        name in subprocess.run(["fc-match", name], stdout=subprocess.PIPE, check=False).stdout.decode() for name in names
    )


REQUIRE = "DASHBOARD_TESTS_REQUIRE"
# What a developer's shell may hold and would change what the program does, in this process and as a subprocess.
PRIVATE_ENVIRONMENT = (
    "CLIPROXY_MANAGEMENT_PASSWORD", "MANAGEMENT_PASSWORD", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
    "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "PYTHONUNBUFFERED", "PYTHONPATH",
)  # fmt: skip
PARTS = {
    "redis": (lambda: shutil.which("redis-server"), "redis-server is not installed"),
    "fonts": (has_fonts, "fc-match does not find DejaVu Sans and Liberation Sans"),
    "browser": (lambda: find_browser() and shutil.which("chromedriver"), "chromium or chromedriver is not installed"),
}

for name in PRIVATE_ENVIRONMENT:
    os.environ.pop(name, None)
# A shell lets what it starts beside ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


class TlsSocket(ssl.SSLSocket):
    """Close what CPython before 3.13 leaves open where the peer resets the connection before the handshake.

    Else the garbage collector warns of it, in whichever test it runs.
    """

    def __del__(self) -> None:
        if not hasattr(self, "_connected"):
            self.close()
        super().__del__()


ssl.SSLContext.sslsocket_class = TlsSocket


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a part that may be absent, so that `-m "not browser"` leaves it out."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "browser" in fixtures:
            item.add_marker("browser")
        if "redis_server" in fixtures or "redis_with_password" in fixtures:
            item.add_marker("redis")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs an absent part; fail it where the environment says that the part must be there."""
    required = [name.strip() for name in os.environ.get(REQUIRE, "").split(",")]
    for part, (find, reason) in PARTS.items():
        if item.get_closest_marker(part) is None or find():
            continue
        if part in required:
            pytest.fail(f"{reason}, and {REQUIRE} asks for {part}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    program.close()


@pytest.fixture
def call(program, monkeypatch, capsys):
    """Run a command in this process, on the config, the database and the home of the program."""
    monkeypatch.setenv("HOME", str(program.home))
    configure(program)
    files = [f"--config={program.folder}/config.json", f"--db={program.folder}/usage.db"]

    def call_one(command, *words):
        try:
            code = app.main([command, *files, *map(str, words)])
        except SystemExit as ended:
            code = ended.code
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return call_one


@pytest.fixture
def open_store(tmp_path):
    """Open stores on tmp_path/usage.db; all are closed at the end."""
    opened = []

    def open_one(busy_timeout_s=0.05, **options):
        opened.append(app.Store(tmp_path / "usage.db", busy_timeout_s, **options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()


@pytest.fixture
def collect(store):
    """Run collectors; a proxy or a redis-server, a config or the keys of one say where.

    Each has come to a state, `until`, or to so many events, `stored`, where that is asked for.
    """
    runs = []

    def start(where=None, stop=None, on=None, until=None, stored=None, **keys):
        options = {name: keys.pop(name) for name in ("ahead_s", "commit_s", "load", "config_path") if name in keys}
        config = where if isinstance(where, app.Config) else config_of(where, **keys)
        run = Run(config, on or store, stop or QuickStop(), **options)
        runs.append(run)
        if until is not None:
            run.wait_for_state(until)
        if stored is not None:
            run.wait_for_events(stored)
        return run

    yield start
    for run in runs:
        run.stop.set()
    for run in runs:
        run.thread.join(PATIENCE_S)
        assert not run.thread.is_alive()


@pytest.fixture
def make_site(tmp_path):
    """Serve the API over a store in tmp_path."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(Site(tmp_path, **options)))


@pytest.fixture
def full_pipe():
    """A pipe that is full, of a reader that does not read: (end to read, end to write)."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for size in (1000, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"-" * size)
    os.set_blocking(writing, True)
    yield reading, writing
    os.close(reading)


@pytest.fixture
def proxy() -> Iterator[FakeProxy]:
    """A CLIProxyAPI of the newest version."""
    with FakeProxy() as proxy:
        yield proxy


@pytest.fixture
def chatgpt() -> Iterator[FakeChatGPT]:
    with FakeChatGPT() as chatgpt:
        yield chatgpt


@pytest.fixture
def chatgpt_here(chatgpt: FakeChatGPT, monkeypatch: pytest.MonkeyPatch) -> FakeChatGPT:
    """The quota endpoint, for the calls of this process."""
    for name, value in chatgpt.environment.items():
        monkeypatch.setenv(name, value)
    return chatgpt


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_with_password() -> Iterator[RedisServer]:
    with RedisServer(KEY) as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests."""
    with Browser() as browser:
        yield browser


# ---- of the page -----------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path):
    """A dashboard in this process without a request, at the time of now, whose collector records."""
    made = Site(tmp_path, PAGE)
    made.now = time.time()
    made.status.update(
        state="recording", last_event=made.now - 4, endpoint="127.0.0.1:8317", mode="pop", events=3, rejected=0,
        ignored=0, publishing=True, since=made.now - 100, until=None,
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def site(empty):
    """The same with known requests and quotas."""
    fill(empty)
    return empty


@pytest.fixture
def between(empty):
    """What stands between the browser and the site."""
    made = Between(empty)
    yield made
    made.close()


@pytest.fixture
def page(browser, empty):
    """The page of the site, in English; console errors and requests to another host fail the test."""
    browser.resize(1440, 900, 1)
    browser.emulate(dark=False, print=False)
    browser.goto("about:blank")
    browser.console_errors()
    browser.requested_urls()
    made = Page(browser, empty)
    yield made
    made.check()
    browser.goto("about:blank")  # so that nothing asks on while the servers close
