"""The program as a subprocess, in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from sockets import PATIENCE_S, Watched
from support import KEY, free_port

ROOT = Path(__file__).resolve().parent.parent
STOP_S = 8  # three seconds, and what a busy machine adds: an answer that is waited for takes ten
COMPILED: dict[str, str | None] = {"PYTHONDONTWRITEBYTECODE": None}  # so that it keeps its compiled form


class Running(Watched):
    """The program while it runs; `lines` is what it has printed, both streams together."""

    port = 0

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, **options: Any) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._ended = False
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        self.process = subprocess.Popen(
            command, env=env, cwd=str(cwd), stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace", **options
        )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def processor_s(self) -> float:
        """The processor time used so far."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_mb(self) -> float:
        """The resident memory at its highest, in megabytes of 10^6 bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM"))

    def describe(self) -> str:
        return "the program printed:\n" + "\n".join(self.lines)

    def wait_for_line(self, text: str, timeout: float = PATIENCE_S) -> str:
        """Return the first line that contains the text."""

        def found() -> list[str]:
            return [line for line in self.lines if text in line]

        self.wait_for(lambda: found() or self._ended, timeout)
        assert found(), f"the program ended without printing {text!r}; {self.describe()}"
        return found()[0]

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Wait until it ends by itself, and return its exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def terminate(self, signum: int = signal.SIGTERM, timeout: float = PATIENCE_S) -> int:
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
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        for line in self.process.stdout or ():
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

    def start(self, *args: str | Path, env: Any = None, cwd: Path | None = None, **options: Any) -> Running:
        """Start it in the background; it is killed at the end of the test. Options go to Popen."""
        running = Running(self._command(args), self._environment(env), cwd or self.folder, **options)
        self._running.append(running)
        return running

    def run(self, *args: str | Path, env: Any = None, **options: Any) -> Any:
        """Run it to its end; stdout and stderr are kept apart."""
        return subprocess.run(
            self._command(args), env=self._environment(env), cwd=str(self.folder), timeout=PATIENCE_S,
            stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", check=False, **options,
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


def configure(program: Program, proxy: Any = None, **settings: Any) -> int:
    """Write the program's config, for a proxy and its key where one is given; return the port it is to serve on."""
    there = {} if proxy is None else {"cliproxy_port": proxy.port, "management_password": KEY}
    base = {"dashboard_host": "127.0.0.1", "dashboard_port": free_port(), "poll_interval_seconds": 0.1, **there}
    path = program.folder / "config.json"
    path.write_text(json.dumps({**base, **settings}), encoding="utf-8")
    path.chmod(0o600)
    return base["dashboard_port"]


def start(program: Program, port: int, *more: str, **where: Any) -> Running:
    """Start it on the port of its config, and return once it says that it serves there."""
    running = program.start("start", "--no-browser", *more, **where)
    running.wait_for_line(f"http://localhost:{port}")
    running.port = port
    return running


def get(port: int, path: str, timeout: float = PATIENCE_S) -> Any:
    """Return what a route of a dashboard answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=timeout) as reply:
        return json.loads(reply.read())
