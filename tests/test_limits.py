"""The program as a subprocess, with less of something than it would like to have."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress

from support import KEY, Watched, free_port, payloads


class Dashboard(Watched):
    """The program on a free port; options go to Popen."""

    def __init__(self, program, port, **options):
        super().__init__()
        self.port = port
        command = [sys.executable, str(program.script), "start", "--no-browser"]
        env = {**os.environ, "HOME": str(program.home)}
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, **options)

    @property
    def answers(self):
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, path, timeout=30):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=timeout) as reply:
            return json.loads(reply.read())

    @property
    def processor_s(self):
        with open(f"/proc/{self.process.pid}/stat") as stream:
            fields = stream.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_mib(self):
        with open(f"/proc/{self.process.pid}/status") as stream:
            return next(int(line.split()[1]) / 1024 for line in stream if line.startswith("VmHWM"))

    def stop(self):
        """Ask it to stop, and return its exit code; it must not take longer than three seconds."""
        self.process.terminate()
        return self.process.wait(3)


@contextmanager
def dashboard(program, proxy, **options):
    port = free_port()
    settings = {"dashboard_host": "127.0.0.1", "dashboard_port": port, "poll_interval_seconds": 0.1,
                "cliproxy_port": proxy.port, "management_password": KEY}  # fmt: skip
    (program.folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    running = Dashboard(program, port, **options)
    try:
        running.wait_for(lambda: running.answers)
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def test_console_that_nobody_reads_has_no_effect(program, proxy):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"-")
    os.set_blocking(writing, True)
    proxy.push(*payloads(100))
    try:
        with dashboard(program, proxy, stdout=writing, stderr=writing) as running:
            running.wait_for(lambda: running.get("/api/health")["collector"]["events"] == 100)
            assert running.stop() == 0
    finally:
        os.close(writing)
        os.close(reading)
