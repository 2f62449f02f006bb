"""Fixtures: the stand-ins, the real servers, and the program as a subprocess."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Iterator

import pytest
from fake_chatgpt import FakeChatGPT
from fake_proxy import FakeProxy
from redis_server import RedisServer
from support import KEY, QuickStop, Run, Watched, config_of
from webdriver import Browser, find_browser

import usage_dashboard as app

ROOT = Path(__file__).resolve().parent.parent
REQUIRE = "DASHBOARD_TESTS_REQUIRE"
# What a developer's shell may hold and would change what the program does, in this process and as a subprocess.
PRIVATE_ENVIRONMENT = (
    "CLIPROXY_MANAGEMENT_PASSWORD", "MANAGEMENT_PASSWORD", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
    "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "PYTHONUNBUFFERED", "PYTHONPATH",
)  # fmt: skip
PARTS = {
    "redis": (lambda: shutil.which("redis-server"), "redis-server is not installed"),
    "browser": (lambda: find_browser() and shutil.which("chromedriver"), "chromium or chromedriver is not installed"),
}

for name in PRIVATE_ENVIRONMENT:
    os.environ.pop(name, None)
# A shell lets what it starts beside ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


# ---- the program -----------------------------------------------------------------------------------------


class Running(Watched):
    """The program while it runs; `lines` is what it has printed, both streams together."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._ended = False
        self.process = subprocess.Popen(
            command, env=env, cwd=str(cwd), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        )  # fmt: skip
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def describe(self) -> str:
        return "the program printed:\n" + "\n".join(self.lines)

    def wait_for_line(self, text: str, timeout: float = 10) -> str:
        """Return the first line that contains the text."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        self.wait_for(lambda: found() or self._ended, timeout)
        assert found(), f"the program ended without printing {text!r}; {self.describe()}"
        return found()[0]

    def wait(self, timeout: float = 10) -> int:
        """Wait until it ends by itself, and return its exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def terminate(self, signum: int = signal.SIGTERM, timeout: float = 10) -> int:
        """Ask it to stop, and return its exit code."""
        self.process.send_signal(signum)
        return self.wait(timeout)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.process.kill()
        self.wait()

    def close(self) -> None:
        """Make sure that nothing of it is left."""
        self.kill()
        self.process.stdout.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self.change():
                self.lines.append(line.rstrip("\n"))
        with self.change():
            self._ended = True


class Program:
    """Runs a copy of the program in a folder of its own, so that no real config or database is touched.

    `folder` is where the script lies, `home` the home directory it sees. In `env`, None removes a variable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "dashboard"
        self.home = folder / "home"
        self.folder.mkdir()
        self.home.mkdir()
        for name in ("usage_dashboard.py", "usage-dashboard.html", "config.example.json"):
            if (ROOT / name).exists():
                shutil.copy(str(ROOT / name), str(self.folder / name))
        self.script = self.folder / "usage_dashboard.py"
        self._running: list[Running] = []

    def start(self, *args: str | Path, env: dict[str, str | None] | None = None, cwd: Path | None = None) -> Running:
        """Start it in the background; it is killed at the end of the test."""
        running = Running(self._command(args), self._environment(env), cwd or self.folder)
        self._running.append(running)
        return running

    def run(
        self, *args: str | Path, env: dict[str, str | None] | None = None, timeout: float = 30, **options: Any
    ) -> Any:
        """Run it to its end; stdout and stderr are kept apart."""
        return subprocess.run(
            self._command(args), env=self._environment(env), cwd=str(self.folder), timeout=timeout,
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False,
            **options,
        )  # fmt: skip

    def close(self) -> None:
        """Kill what still runs."""
        for running in self._running:
            running.close()

    def _command(self, args: tuple[str | Path, ...]) -> list[str]:
        return [sys.executable, str(self.script), *map(str, args)]

    def _environment(self, changes: dict[str, str | None] | None) -> dict[str, str]:
        env = {**os.environ, "HOME": str(self.home), **(changes or {})}
        return {name: value for name, value in env.items() if value is not None}


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    program.close()


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
    """Run collectors; a proxy or a redis-server, a config or the keys of one say where."""
    runs = []

    def start(where=None, stop=None, on=None, load=None, config_path=None, ahead_s=0.0, commit_s=0.0, **keys):
        config = where if isinstance(where, app.Config) else config_of(where, **keys)
        options = {"ahead_s": ahead_s, "commit_s": commit_s, "load": load, "config_path": config_path}
        runs.append(Run(config, on or store, stop or QuickStop(), **options))
        return runs[-1]

    yield start
    for run in runs:
        run.stop.set()
    for run in runs:
        run.thread.join(10)
        assert not run.thread.is_alive()


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
