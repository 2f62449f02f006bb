"""The program as a subprocess, with less of something than it would like to have."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

from program import COMPILED, STOP_S, configure, get
from sockets import PATIENCE_S, comes_up, deaf_client, ended
from support import event, payloads, put

import usage_dashboard as app


def start(program, proxy, **options):
    """Start the program, whatever becomes of its output; what it takes to compile itself would count."""
    port = configure(program, proxy)
    running = program.start("start", "--no-browser", env=COMPILED, **options)
    running.port = port
    assert comes_up(running.process, lambda: get(port, "/api/health"), PATIENCE_S)
    return running


def test_console_that_nobody_reads_has_no_effect(program, proxy, full_pipe):
    _, writing = full_pipe
    proxy.push(*payloads(100))
    running = start(program, proxy, stdout=writing, stderr=writing)
    os.close(writing)
    running.wait_for(lambda: get(running.port, "/api/health")["collector"]["events"] == 100)
    assert running.terminate(timeout=STOP_S) == 0


def limit_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))


def test_clients_beyond_the_descriptors_cost_no_processor_time_and_nobody_the_page(program, proxy):
    running = start(program, proxy, stdout=subprocess.DEVNULL, preexec_fn=limit_descriptors)
    with ExitStack() as clients:
        for _ in range(100):
            clients.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=10))
        before_s, began = running.processor_s, time.monotonic()
        running.wait_for(lambda: time.monotonic() > began + 1.5)
        assert running.processor_s - before_s < 0.6
        assert get(running.port, "/api/health")["version"]


def test_wide_questions_at_once_and_answers_that_nobody_takes_stay_within_90_mb(program, proxy):
    now = time.time()
    with closing(app.Store(program.folder / "usage.db")) as store:
        for first in range(0, 10_000, 2000):
            put(store, *(event(now - 9000 * (number % 1000), model=f"model-{number:05d}")
                         for number in range(first, first + 2000)))  # fmt: skip
    running = start(program, proxy, stdout=subprocess.DEVNULL)
    wide = [f"/api/summary?start={now - 2900 * 3600 + number:.0f}" for number in range(28)]
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda path: get(running.port, path), wide[:8]))
    assert [len(answer["hours"]) // 100 for answer in asked] == [29] * 8 and len(asked[0]["models"]) > 9000
    with ExitStack() as stack:
        deaf = [stack.enter_context(deaf_client(running.port, path)) for path in wide[8:]]
        running.wait_for(lambda: len(ended(deaf)) == 20)
        assert get(running.port, "/api/summary?range=24h")["summary"]["requests"] > 0
    assert running.peak_mb < 90
