"""The program as a subprocess, with less of something than it would like to have."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, contextmanager, suppress

from support import KEY, Watched, event, free_port, payloads, put

import usage_dashboard as app


class Dashboard(Watched):
    """The program on a free port; options go to Popen."""

    def __init__(self, program, port, **options):
        super().__init__()
        self.port = port
        command = [sys.executable, str(program.script), "start", "--no-browser"]
        env = {**os.environ, "HOME": str(program.home)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # what it takes to compile itself would count
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
    def peak_mb(self):
        with open(f"/proc/{self.process.pid}/status") as stream:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in stream if line.startswith("VmHWM"))

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


def limit_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))


def test_clients_beyond_the_descriptors_cost_no_processor_time_and_nobody_the_page(program, proxy):
    with dashboard(program, proxy, stdout=subprocess.DEVNULL, preexec_fn=limit_descriptors) as running:
        clients = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(100)]
        try:
            before_s, began = running.processor_s, time.monotonic()
            running.wait_for(lambda: time.monotonic() > began + 1.5)
            assert running.processor_s - before_s < 0.6
            assert running.get("/api/health", timeout=20)["version"]
        finally:
            for client in clients:
                client.close()


def test_wide_questions_at_once_and_answers_that_nobody_takes_stay_within_90_mb(program, proxy):
    now = time.time()
    with closing(app.Store(program.folder / "usage.db")) as store:
        for first in range(0, 30_000, 3000):
            put(store, *(event(now - 9000 * (number % 1000), model=f"model-{number % 10_000:05d}")
                         for number in range(first, first + 3000)))  # fmt: skip
    asked = []

    def ask(number):
        asked.append(running.get(f"/api/summary?start={now - 2900 * 3600 + number:.0f}", timeout=60))

    with dashboard(program, proxy, stdout=subprocess.DEVNULL) as running:
        before = ""
        for _ in range(20):
            before = "&before=" + running.get(f"/api/requests?limit=500{before}")["next"]
        asking = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert [len(answer["hours"]) // 100 for answer in asked] == [29] * 40 and len(asked[0]["models"]) > 9000
        deaf = [socket.socket() for _ in range(40)]
        try:
            for number, client in enumerate(deaf):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", running.port))
                wide = f"/api/summary?start={now - 2800 * 3600 + number:.0f}"
                client.sendall(f"GET {wide} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            running.wait_for(lambda: len(select.select(deaf, [], [], 0)[0]) == 40, 30)
            assert running.get("/api/summary?range=24h")["summary"]["requests"] > 0
        finally:
            for client in deaf:
                client.close()
        assert running.peak_mb < 90
