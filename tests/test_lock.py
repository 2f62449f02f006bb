"""One process records into a database at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat

import pytest
from program import configure, start
from support import free_port, payload, rows

import usage_dashboard as app

SECOND = re.compile(r"usage\.db is in use by a dashboard that runs already \(process (\d+), port (\d+)\)")


def test_second_start_ends_with_1_names_the_first_and_pops_nothing(program, proxy):
    port = configure(program, proxy)
    first = start(program, port)
    first.wait_for_line("state=waiting")
    logins = proxy.auth_attempts
    for other in (port, free_port()):
        second = program.run("start", "--no-browser", "--port", str(other))
        assert second.returncode == 1 and "Traceback" not in second.stderr
        assert SECOND.search(second.stderr).groups() == (str(first.pid), str(port))
    assert proxy.auth_attempts == logins
    assert first.terminate() == 0


def test_two_starts_in_the_same_moment_leave_one(program, proxy):
    configure(program, proxy)
    both = [program.start("start", "--no-browser", "--port", str(free_port())) for _ in range(2)]
    loser = both[0].wait_for(lambda: next((one for one in both if one.process.poll() is not None), None))
    (winner,) = [one for one in both if one is not loser]
    assert loser.wait() == 1
    assert SECOND.search("\n".join(loser.lines)).group(1) == str(winner.pid)
    winner.wait_for_line("state=waiting")
    proxy.push(*(payload(number) for number in range(50)))
    proxy.wait_for(lambda: proxy.queued == 0)
    assert winner.terminate() == 0
    assert rows(program.folder / "usage.db", "SELECT COUNT(*), COUNT(DISTINCT request_id) FROM events") == [(50, 50)]


def test_start_goes_on_where_the_last_one_was_killed_just_now(program, proxy):
    port = configure(program, proxy)
    first = start(program, port)
    first.process.send_signal(signal.SIGKILL)
    second = start(program, port)  # while the first is still ending
    holder = json.loads((program.folder / "usage.db.lock").read_text(encoding="utf-8"))
    assert holder["pid"] == second.pid
    assert second.terminate() == 0


@pytest.mark.parametrize("left", [b"", b'{"pid": 1, "port": 8320}', b"\xff\x00[", b"[1, 2]"])
def test_lock_file_that_was_left_keeps_nobody_out(tmp_path, left):
    path = tmp_path / "usage.db.lock"
    path.write_bytes(left)
    app.lock_database(tmp_path / "usage.db", patience_s=0)
    app.name_holder(tmp_path / "usage.db", 8320)
    assert app.lock_holder(tmp_path / "usage.db")["pid"] == os.getpid()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_lock_is_refused_in_words_also_by_a_link_and_where_its_file_says_nothing(tmp_path):
    (tmp_path / "usage.db").touch()
    (tmp_path / "link.db").symlink_to(tmp_path / "usage.db")
    app.lock_database(tmp_path / "usage.db", patience_s=0)
    for name in ("usage.db", "link.db"):
        with pytest.raises(app.StoreError, match="process unknown, port unknown"):
            app.lock_database(tmp_path / name, patience_s=0)
    assert app.lock_holder(tmp_path / "usage.db") == {}
    app.name_holder(tmp_path / "usage.db", 8320)
    assert app.lock_holder(tmp_path / "usage.db") == {"pid": os.getpid(), "port": 8320}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_told_and_no_obstacle(tmp_path, code):
    def refuse(handle):
        raise OSError(code, os.strerror(code))

    fault = app.lock_database(tmp_path / "usage.db", refuse)
    assert os.strerror(code) in fault and "second start" in fault


def test_reading_commands_work_beside_the_dashboard_and_find_its_port(program, proxy):
    configure(program, proxy)
    port = free_port()
    running = start(program, port, "--port", str(port))
    running.wait_for_line("state=waiting")
    assert program.run("report").returncode == 0
    assert program.run("quota").returncode == 0
    logins = proxy.auth_attempts
    assert f"runs on port {port}" in program.run("check").stdout
    assert "no Codex account file" in program.run("quota", "--force").stderr
    assert any("found 0 auth files" in line for line in running.lines)  # it was asked of the running one
    assert proxy.auth_attempts == logins
    assert running.terminate() == 0
