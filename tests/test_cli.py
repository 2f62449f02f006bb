from __future__ import annotations

import json
import marshal
import os
import py_compile
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from collecting import Answering
from program import COMPILED, STOP_S, configure, get, start
from support import (
    KEY,
    QUOTA_BY_NAME,
    SAMPLES,
    event,
    free_port,
    make_original,
    payloads,
    put,
    rows,
    stored_ids,
    write_account,
)  # fmt: skip

import usage_dashboard as app

STORED = 7  # one of the eight samples is a warm-up
# Sums over the seven stored samples, added up by hand from the token rules.
EXPECTED = {
    "requests": 7, "failed": 1, "rate_limited": 0, "input_tokens": 342_872, "output_tokens": 12_163, "reasoning_tokens": 6_350,
    "cached_tokens": 332_962, "cache_write_tokens": 2_044, "total_tokens": 355_035, "unpriced_tokens": 1_420,
    "cost_usd": 0.4112075,  # in millionths, request by request: 15,844.5 + 49,764 + 72,620 + 20,167 + 252,812
}  # fmt: skip


def shifted(minutes_ago: float = 10):
    """Return the samples with all their times moved to shortly before now, as the proxy would have written them."""
    when = (datetime.now(timezone.utc) - timedelta(minutes=minutes_ago)).isoformat()
    return [json.dumps({**json.loads(raw), "timestamp": when}).encode() for raw in SAMPLES]


def recent(count):
    return payloads(count, timestamp=datetime.now(timezone.utc).isoformat())


def opened(program):
    return closing(app.Store(program.folder / "usage.db"))


@pytest.fixture
def serve(program, proxy):
    """Run a dashboard of the proxy, by default with the right key; what still runs at the end must end well."""
    started = []

    def start_one(env=None, cwd=None, **settings):
        started.append(start(program, configure(program, proxy, **settings), env=env, cwd=cwd))
        return started[-1]

    yield start_one
    for running in started:
        if running.process.poll() is None:
            assert running.terminate(timeout=STOP_S) == 0
        assert not any("Traceback" in line for line in running.lines), "\n".join(running.lines)


def wait_for_events(running, count):
    running.wait_for(lambda: get(running.port, "/api/health")["collector"]["events"] == count)


def check_numbers(program, port):
    """Compare all five ranges and the database with what was sent."""
    for name in ("today", "1h", "5h", "24h", "7d"):
        midnight_passed = name == "today" and time.localtime().tm_hour == 0
        summary = get(port, f"/api/summary?range={name}")["summary"]
        if not midnight_passed:
            assert summary == EXPECTED
    counted = rows(program.folder / "usage.db", "SELECT COUNT(*), SUM(total_tokens), SUM(failed) FROM events")
    assert counted == [(7, 355_035, 1)]
    for path in program.folder.glob("usage.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_program_from_redis_with_password_to_number(serve, program, redis_with_password):
    redis_with_password.push("usage", *shifted())
    running = serve(cliproxy_port=redis_with_password.port)
    wait_for_events(running, STORED)
    check_numbers(program, running.port)
    redis_with_password.stop()
    running.wait_for_line("state=unreachable")
    redis_with_password.start()
    redis_with_password.push("usage", *shifted(), b"garbage")
    wait_for_events(running, 2 * STORED)
    assert get(running.port, "/api/health")["collector"]["rejected"] == 1
    assert running.terminate(signal.SIGINT) == 0


def test_program_runs_from_its_compiled_form_where_that_can_be_kept(serve, program):
    running = serve(env=COMPILED)
    (compiled,) = program.folder.glob("__pycache__/usage_dashboard.*.pyc")
    words = Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")
    assert b"-c" in words and os.fsencode(str(program.script)) in words  # pkill -f usage_dashboard.py finds it
    assert running.terminate() == 0
    program.script.write_text(program.script.read_text(encoding="utf-8").replace('"stopped"', '"ended"'), "utf-8")
    os.utime(str(compiled), (1, 1))
    running = serve(env=COMPILED)
    assert running.terminate() == 0 and running.lines[-1] == "ended"  # a new version is compiled again


@pytest.mark.parametrize("keeps_compiled", [True, False])
def test_program_takes_no_module_from_the_folder_it_is_started_in(serve, program, keeps_compiled):
    elsewhere = program.folder.parent / "elsewhere"
    elsewhere.mkdir()
    for name in ("argparse", "sqlite3", "http"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('taken from the wrong place')")
    if not keeps_compiled:
        (program.folder / "__pycache__").write_text("in the way")
    serve(env=COMPILED, cwd=elsewhere)


@pytest.mark.parametrize(("left", "zeroed"), [(0, False), (3000, False), (3000, True)])
def test_program_starts_from_a_compiled_form_that_a_power_cut_has_damaged(serve, program, left, zeroed):
    compiled = Path(py_compile.compile(str(program.script), quiet=2, doraise=True))
    whole = compiled.read_bytes()
    compiled.write_bytes(whole[:left].ljust(len(whole) * zeroed, b"\0"))
    running = serve(env=COMPILED)
    assert b"-c" in Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")
    assert running.terminate() == 0 and marshal.loads(compiled.read_bytes()[16:])


def write_accounts(program, count=3):
    for number in range(count):
        folder = write_account(program.home / ".cliproxyapi", number).parent
    return folder


def test_forced_quota_refresh_prints_the_original_lines_and_no_secret(serve, program, chatgpt):
    folder = write_accounts(program)
    (folder / "codex-broken.json").write_text('{"type": "codex", "access_tok')
    for number in range(3):
        chatgpt.answer(f"tok-secret-{number}", body=QUOTA_BY_NAME["plus_5h_7d"]["body"])
    running = serve(env=chatgpt.environment)
    answer = get(running.port, "/api/quota?force=1")
    assert [row["primary_remaining_percent"] for row in answer["quotas"]] == [77, 77, 77]
    assert "tok-" not in json.dumps(answer) and "acc-" not in json.dumps(answer)
    running.wait_for_line("saved quota for user2")
    printed = "\n".join(running.lines)
    for line in ("found 3 auth files", "fetching quota for user0***@example.com...",
                 "saved quota for user2***@example.com", "codex-broken.json is skipped"):  # fmt: skip
        assert f"refresh_quota: {line}" in printed
    for secret in ("tok-secret", "acc-", "user0@", "secret-key", "sample@"):
        assert secret not in printed
    stored = b"".join(path.read_bytes() for path in program.folder.glob("usage.db*"))
    assert b"tok-secret" not in stored and b"secret-key" not in stored and b"sample@example" not in stored


def test_quota_command_asks_the_running_dashboard_and_shares_its_cool_down(serve, program, chatgpt):
    write_accounts(program, 1)
    chatgpt.answer("tok-secret-0", body=QUOTA_BY_NAME["plus_5h_7d"]["body"])
    serve(env=chatgpt.environment, dashboard_password="open sesame")
    unreachable = {"HTTPS_PROXY": "http://127.0.0.1:9"}  # but for the dashboard
    first = program.run("quota", "--force", env=unreachable)
    assert first.returncode == 0 and re.search(r"user0@example.com\s+plus\s+77 %", first.stdout)
    second = program.run("quota", "--force", "--json")
    assert second.returncode == 1 and "try again in" in second.stderr
    assert json.loads(second.stdout)["quotas"][0]["secondary_remaining_percent"] == 59
    assert len(chatgpt.requests) == 1


def test_quota_command_refreshes_itself_where_no_dashboard_runs(call, program, chatgpt_here):
    write_accounts(program, 2)
    configure(program)
    chatgpt_here.answer("tok-secret-0", body=QUOTA_BY_NAME["limit_reached_plus"]["body"])
    done = call("quota", "--force", "--json")
    rows = json.loads(done.stdout)["quotas"]
    assert done.returncode == 0 and [row["state"] for row in rows] == ["limited", "expired"]
    assert "refresh_quota: found 2 auth files" in done.stderr
    again = call("quota", "--force")
    assert again.returncode == 1 and "try again in" in again.stderr and len(chatgpt_here.requests) == 2
    assert call("quota").returncode == 0


def test_forced_quota_without_account_files_says_so(serve, program):
    alone = program.run("quota", "--force")
    serve()
    for done in (alone, program.run("quota", "--force")):
        assert (done.returncode, done.stdout) == (1, "")
        assert "no Codex account file" in done.stderr and '"auth_dir"' in done.stderr
    assert json.loads(program.run("quota", "--force", "--json").stdout)["quotas"] == []
    assert "quota --force" in program.run("quota").stdout


def test_quota_table_calls_a_reset_that_has_passed_due(call, program):
    window = {"used_percent": 100, "limit_window_seconds": 18000, "reset_at": int(time.time()) - 60}
    reading = app.parse_quota({"plan_type": "plus", "rate_limit": {"primary_window": window}}, time.time() - 120)
    with opened(program) as store:
        store.save_reading(app.reading_row(reading, ("an@example.com", "#abc"), "", time.time() - 120))
    shown = call("quota").stdout
    assert re.search(r"an@example.com\s+plus\s+—\s+reset due\s+—\s+—\s+reset due.*from a request", shown)


def test_quota_table_says_what_is_left_in_tokens_where_that_is_known(call, program):
    now = time.time()
    windows = {"primary_window": {"used_percent": 40, "limit_window_seconds": 18000, "reset_at": int(now) + 3600},
               "secondary_window": {"used_percent": 2, "limit_window_seconds": 36000, "reset_at": int(now) + 3600}}
    reading = app.parse_quota({"plan_type": "plus", "rate_limit": windows}, now)
    with opened(program) as store:
        put(store, *(event(now - ago, total_tokens=8_660_000, source="an@example.com") for ago in (36000, 60)))
        store.save_reading(app.reading_row(reading, ("an@example.com", "#abc"), "", now))
    assert re.search(r"plus\s+60 % ≈ 13\.0M left\s+\w+ [\d:]+\s+—", call("quota").stdout)


def test_report_prints_the_totals_of_a_range(call, program):
    with opened(program) as store:
        store.store_batch(app.parse_events(shifted()), 1, 0.0)
    table = call("report", "24h")
    assert table.returncode == 0 and re.search(r"total\s+7\s+1\s.*\s355,035", table.stdout)
    assert "gpt-5.3-codex" in table.stdout and "writer@example.com" in table.stdout
    assert re.search(r"total .* at least \$0.4112\n", table.stdout)
    assert re.search(r"gpt-5.5 .*  \$0.2528\n(.*\n)*gemini-3-pro-preview .* -\n", table.stdout)
    assert json.loads(call("report", "7d", "--json").stdout)["summary"] == EXPECTED
    (of_models,) = re.findall(r"\n(model .*?)\n\n", table.stdout, re.S)
    assert call("report", "24h", "--by", "model").stdout.endswith(f"\n\n{of_models}\n\n")


def test_report_by_key_account_or_failure_has_names_where_there_are_some(call, program):
    configure(program, names={"#4bdca8": "An's laptop", "an@example.com": "Ops"})
    failed = {"failed": 1, "status_code": 500, "error": "500 overloaded"}
    with opened(program) as store:
        then = time.time() - 9
        put(store, event(at=then, api_key="… #4bdca8", total_tokens=999),
            event(at=then, api_key="", source="bo@x.com", auth_index="b", **failed))  # fmt: skip
    of = {by: call("report", "1h", "--by", by).stdout.splitlines()[2:] for by in ("key", "account", "failure")}
    assert [line.split("  ")[0] for line in of["key"]] == ["key", "-----------", "An's laptop", "no key", "total", ""]
    assert [line.split("  ")[0] for line in of["account"]] == ["account", "--------", "Ops", "bo@x.com", "total", ""]
    last = app.local_minute(then // 900 * 900)
    assert re.split("  +", of["failure"][2]) == ["500 overloaded", "500", "1", last, "bo@x.com"]


@pytest.mark.parametrize(("words", "first", "hours"), [
    (["2025-11-02"], 24, 25), (["2025-11-01", "2025-11-02"], 0, 49),
])  # fmt: skip
def test_report_of_dates_has_whole_local_days(program, words, first, hours):
    begin = 1_761_969_600  # 2025-11-01 in New York, the day before one of 25 hours
    with opened(program) as store:
        put(store, *[event(at=begin + 3600 * hour, model=f"m{hour:03}") for hour in range(-30, 100)])
    answer = json.loads(program.run("report", *words, "--json", env={"TZ": "America/New_York"}).stdout)
    start, end = (begin + 3600 * number for number in (first, first + hours))
    assert (answer["range"], answer["start"], answer["end"]) == (None, start, end)
    assert sorted(row["model"] for row in answer["models"]) == [f"m{first + hour:03}" for hour in range(hours)]
    shown = program.run("report", *words, env={"TZ": "America/New_York"}).stdout
    assert shown.startswith(f"Usage, {' to '.join(words)}: {words[0]} 00:00 to ")
    assert re.search(rf"\ntotal\s+{hours}\s", shown)


@pytest.mark.parametrize(("words", "said"), [
    ("foo", "foo is no day"), ("2026-02-30", "2026-02-30 is no day"), ("2026-11-01 today", "today is no day"),
    ("2026-11-07 2026-11-01", "2026-11-01 is before 2026-11-07"), ("9999-12-31", "9999-12-31 is not from 2020 to "),
    ("2019-12-31", "2019-12-31 is not from"), ("2026-11-01 2026-11-02 2026-11-03", "2026-11-03 is a third date"),
    ("--by colour", "'key', 'model', 'account', 'failure'"),
])  # fmt: skip
def test_report_of_no_range_ends_with_2_and_names_the_word_and_what_is_allowed(call, program, words, said):
    opened(program).thing.close()
    done = call("report", *words.split())
    assert done.returncode == 2 and said.replace("'", "") in done.stderr.replace("'", "")
    assert "--by" in words or "today, yesterday, 1h, 5h, 24h, 7d, 30d, 90d, all; or one or two dates" in done.stderr


def lose(store, hours_ago, hours, reason="unreachable"):
    """Record an outage that lasted longer than the queue remembers."""
    store.begin_outage(time.time() - 3600 * hours_ago, reason)
    store.end_outage(time.time() - 3600 * (hours_ago - hours))


def test_report_names_the_losses_in_its_range(call, program):
    with opened(program) as store:
        lose(store, 100, 2, "publishing_off")
        lose(store, 3, 1)
    shown = call("report", "7d").stdout.partition("requests were lost:\n")[2]
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - 3 * 3600))[:-3]
    assert re.fullmatch(r"  .* \(publishing off\)\n  " + begun + r":\d\d to .* \(unreachable\)\n", shown)
    assert "lost" not in call("report", "1h").stdout


@pytest.mark.parametrize("command", ["report", "check", "quota"])
def test_command_on_a_terminal_that_takes_ascii_only_ends_well(program, command):
    with opened(program) as store:
        store.store_batch(app.parse_events(payloads(1, source="ông@example.com", model="mô-hình")), 1, 0.0)
    no_utf8 = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = program.run(command, env={"LC_ALL": "C", "LANG": None, **no_utf8})
    assert done.stderr == "" and done.stdout.isascii() and done.stdout


@pytest.mark.parametrize("command", ["report", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_command_whose_output_nobody_reads_ends_well(program, command, unbuffered):
    opened(program).thing.close()
    words = [sys.executable, str(program.script), command]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("command", ["report", "quota"])
def test_command_without_a_database_says_what_to_do(call, program, command):
    done = call(command)
    assert done.returncode == 1 and "does not exist yet; start the dashboard once" in done.stderr
    assert not (program.folder / "usage.db").exists()


def test_wrong_configuration_ends_with_2_and_names_every_fault(program):
    configure(program, cliproxy_port="8317", collect_mode="push", management_password=7, dashbord_port=1)
    checked = program.run("check")
    assert checked.returncode == 1 and 'did you mean "dashboard_port"?' in checked.stdout
    assert [line[:5] for line in checked.stdout.splitlines() if line[0] != " "] == ["fault"] * 4
    done = program.run("start", "--no-browser")
    assert done.returncode == program.run().returncode == 2 and "Traceback" not in done.stderr
    for text in ("cliproxy_port", "collect_mode", "management_password", 'did you mean "dashboard_port"?'):
        assert text in done.stderr


def test_port_that_is_taken_ends_with_1_before_anything_is_popped(program, proxy):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        configure(program, cliproxy_port=proxy.port, management_password="secret-key", dashboard_port=port)
        done = program.run("start", "--no-browser")
    assert done.returncode == 1 and f"port {port} is in use" in done.stderr
    assert f'"dashboard_port": {port + 1}' in done.stderr
    assert proxy.connections == 0 and "Traceback" not in done.stderr


def test_folder_that_cannot_be_written_ends_with_1_and_says_so(program):
    configure(program, database="/proc/usage.db")
    done = program.run("start", "--no-browser")
    assert done.returncode == 1 and "/proc/usage.db cannot be opened" in done.stderr and "Traceback" not in done.stderr


def test_who_can_open_the_page_is_said_on_the_console(serve, program):
    serve(dashboard_host="0.0.0.0").wait_for_line('"dashboard_password"')
    demo = program.start("demo", "--no-browser", "--port", str(free_port()))
    assert "--host 127.0.0.1" in demo.wait_for_line("Everyone who reaches this machine can open it")
    assert demo.terminate() == 0


def test_closed_terminal_ends_the_program_unless_it_was_started_with_nohup(serve, proxy):
    assert serve().terminate(signal.SIGHUP) == 0
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a new process inherits, as from nohup
    try:
        running = serve()
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.kill(running.pid, signal.SIGHUP)
    proxy.push(*shifted())
    wait_for_events(running, STORED)


@pytest.mark.parametrize("commands", [("start", "start", "check"), ("check", "check", "start")])
def test_wrong_key_is_sent_once_whatever_is_called(program, proxy, commands):
    port = configure(program, cliproxy_port=proxy.port, management_password="wrong")
    for command in commands:
        if command == "check":
            checked = program.run("check")
            assert checked.returncode == 1 and "wrong_password" in checked.stdout
            assert "management_password" in checked.stdout
        else:
            running = start(program, port)
            running.wait_for_line("state=wrong_password")
            assert running.terminate() == 0
    assert (proxy.auth_attempts, proxy.failures) == (1, 1)


def test_logins_of_all_commands_together_are_limited_and_check_counts_them(program, tmp_path):
    with Answering(b"\x00rubbish\r\n") as server:
        port = configure(program, cliproxy_port=server.port, management_password=KEY)
        first = program.run("check").stdout
        assert re.search("^warning [12] of 3 logins within 30 minutes are used", first, re.M)
        for _ in range(2):
            running = start(program, port)
            running.wait_for_line("state=not_resp")
            running.wait_for(lambda: len(program.run("check").stdout) > 0)
            assert running.terminate() == 0
        last = program.run("check").stdout
        assert re.search("^warning 3 of 3 logins .*\n +→ the next goes out after 20", last, re.M)
        assert server.logins == 3


def test_check_without_a_key_tells_a_redis_from_a_proxy(call, program, proxy, redis_server):
    configure(program, cliproxy_port=redis_server.port)
    assert f"127.0.0.1:{redis_server.port} is a Redis server, used without a password" in call("check").stdout
    configure(program, cliproxy_port=proxy.port)
    assert re.search("^fault   no management key is set, and the proxy needs one$", call("check").stdout, re.M)
    assert proxy.failures == 0


def test_check_without_a_key_takes_a_port_that_lets_nobody_in_for_no_redis(call, program):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as waiting:
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        configure(program, cliproxy_port=full.getsockname()[1])
        shown = call("check").stdout
    assert "cannot be reached: no answer in time" in shown and "Redis" not in shown


@pytest.mark.parametrize("answer", [b"+OK\r\n", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", b"rubbish\r\n"])
def test_check_without_a_key_names_a_strange_server(call, program, answer):
    with Answering(answer) as server:
        configure(program, cliproxy_port=server.port)
        done = call("check")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^fault", done.stdout, re.M)


def test_corrected_key_is_noticed_without_a_restart(serve, program, proxy):
    proxy.push(*shifted())
    running = serve(management_password="wrong")
    running.wait_for_line("state=wrong_password")
    configure(program, cliproxy_port=proxy.port, management_password=KEY, dashboard_port=running.port)
    running.wait_for(lambda: get(running.port, "/api/health")["collector"]["events"] == STORED)
    assert (proxy.auth_attempts, proxy.failures) == (2, 1)


PART_THAT_DIES = """
import sys
import usage_dashboard as app
app.{part} = lambda *_: None
sys.exit(app.main(["start", "--no-browser"]))
"""


@pytest.mark.parametrize("part", ["Collector.run", "keep_house"])
def test_part_that_ended_by_itself_ends_the_program_with_1(program, proxy, part):
    configure(program, cliproxy_port=proxy.port, management_password=KEY)
    (program.folder / "start.py").write_text(PART_THAT_DIES.format(part=part), encoding="utf-8")
    program.script = program.folder / "start.py"
    ended = program.run()
    assert ended.returncode == 1 and "had ended by itself" in ended.stdout


def test_signals_until_the_very_end_leave_the_exit_code_0(serve):
    running = serve()
    running.wait_for_line("state=waiting")
    deadline = time.monotonic() + STOP_S
    while running.process.poll() is None and time.monotonic() < deadline:
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGINT)
    assert running.process.poll() == 0, running.describe()


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to make what is root's")
def test_what_root_makes_belongs_to_the_owner_of_its_folder(program, proxy):
    configure(program, cliproxy_port=proxy.port, management_password="wrong")
    os.chown(str(program.folder), 12345, 12346)
    assert program.run("check").returncode == 1
    running = start(program, json.loads((program.folder / "config.json").read_text())["dashboard_port"])
    assert running.terminate() == 0
    owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in program.folder.glob("usage.db*")}
    assert {"usage.db", "usage.db.lock"} <= set(owners) and set(owners.values()) == {(12345, 12346)}


def test_stop_while_the_proxy_is_silent_does_not_wait_for_it(serve, proxy):
    running = serve()
    running.wait_for_line("state=waiting")
    proxy.dribble(60)  # from now on every reply takes for ever
    assert running.terminate(timeout=STOP_S) == 0


@pytest.mark.parametrize("moment", ["it waits for the lock", "it has said so"])
def test_stop_while_the_database_is_locked_keeps_what_was_popped(serve, program, proxy, moment):
    running = serve()
    running.wait_for_line("state=waiting")
    with closing(sqlite3.connect(str(program.folder / "usage.db"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        proxy.push(*recent(2000))
        proxy.wait_for(lambda: len(proxy.handed_over) >= 16)
        if moment == "it has said so":
            running.wait_for_line("state=storage_error")
        assert running.terminate(timeout=STOP_S) == 0
        assert len(proxy.handed_over) < 2000  # a full batch at most
    wait_for_events(serve(), 2000)
    assert stored_ids(program.folder / "usage.db") == [f"r{number}" for number in range(2000)]


def test_start_on_a_damaged_database_says_so_and_leaves_it_as_it_is(call, serve, program, proxy):
    proxy.push(*recent(100))
    running = serve()
    wait_for_events(running, 100)
    assert running.terminate() == 0
    path = program.folder / "usage.db"
    whole = path.read_bytes()
    proxy.push(*recent(1))
    for content in (b"not a database at all, really not one" * 40, whole[: len(whole) // 2], whole[:4096], whole[:700]):
        path.write_bytes(content)
        done = program.run("start", "--no-browser")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "damaged or no SQLite database; move it away (it is not overwritten)" in done.stderr
        checked = call("check")
        assert checked.returncode == 1 and "damaged or no SQLite database" in checked.stdout
        assert path.read_bytes() == content and proxy.queued == 1


def test_check_is_well_with_a_good_set_up(call, program, proxy):
    write_accounts(program)
    for path in (program.home / ".cliproxyapi").iterdir():
        path.chmod(0o600)
    configure(program, cliproxy_port=proxy.port, management_password="secret-key")
    proxy.push(*shifted())
    done = call("check")
    assert done.returncode == 0, done.stdout
    for text in ("account files: 3", "proxy v7.2.140", "the proxy's clock and this machine's agree",
                 "publishes its usage", "remembers for 60 s and is asked every 0.1 s"):  # fmt: skip
        assert text in done.stdout
    assert proxy.queued == len(SAMPLES)  # nothing was popped
    with opened(program) as store:  # the dashboard that runs beside it may be recording
        assert store.outages(app.Window(0.0, 4e9), time.time()) == []


def test_check_names_what_is_wrong(call, program, proxy):
    proxy.publishing = False
    configure(program, cliproxy_port=proxy.port, management_password="secret-key", poll_interval_seconds=45)
    os.chmod(str(program.folder / "config.json"), 0o644)
    done = call("check")
    assert done.returncode == 1
    for text in ("usage-statistics-enabled: true", "chmod 600", "auth_dir", '"poll_interval_seconds": 2'):
        assert text in done.stdout


def test_check_names_accounts_that_need_a_person(call, program, chatgpt_here):
    folder = write_accounts(program, 5)
    for number, changes in ((3, {"access_token": ""}), (4, {"disabled": True})):
        path = folder / f"codex-{number}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    configure(program)
    chatgpt_here.answer("tok-secret-0", body=QUOTA_BY_NAME["plus_5h_7d"]["body"])
    chatgpt_here.answer("tok-secret-1", 401, body={"error": {"code": "token_invalidated"}})
    chatgpt_here.answer("tok-secret-2", 402, body={"detail": {"code": "deactivated_workspace"}})
    call("quota", "--force")
    done = call("check")
    assert done.returncode == 1
    again = "sign in again in the proxy"
    for number, state, remedy in ((1, "relogin", again), (2, "deactivated", "deactivated"), (3, "no token", again)):
        told = f"^warning user{number}@example.com.*: {state}\n +→ .*{remedy}"
        assert re.search(told, done.stdout, re.M), done.stdout
    assert f"account files: 5 in {folder}" in done.stdout


def test_two_workspaces_under_one_mail_are_told_apart_in_the_terminal(call, program, chatgpt_here):
    folder = write_accounts(program, 2)
    for path in folder.iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "email": "pair@example.com"}))
    configure(program)
    chatgpt_here.answer(None, 401, body={"error": {"code": "token_invalidated"}})
    done = call("quota", "--force")
    tags = {tag for tag in re.findall(r"fetching quota for \S+ \((#\w{6})\)\.\.\.", done.stdout + done.stderr)}
    check = call("check").stdout
    assert len(tags) == 2 and all(f"pair@example.com ({tag})" in done.stdout for tag in tags)
    assert all(f"warning pair@example.com ({tag}): relogin" in check for tag in tags)


def test_check_names_the_losses_of_the_last_day(call, program):
    configure(program)
    with opened(program) as store:
        lose(store, 30, 2)
    assert "no losses are known of in the last 24 hours" in call("check").stdout
    with opened(program) as store:
        lose(store, 3, 1)
        store.begin_outage(time.time() - 600, "publishing_off")
    lines = call("check").stdout.splitlines()
    over, going_on = [number for number, line in enumerate(lines) if "requests were lost" in line]
    assert "(unreachable)" in lines[over] and "redis-usage-queue-retention-seconds: 3600" in lines[over + 1]
    assert "to now (publishing off)" in lines[going_on] and "usage-statistics-enabled: true" in lines[going_on + 1]


@pytest.mark.parametrize("days, told", [(0.9, True), (1.1, False)])
def test_check_says_for_a_day_that_the_file_went_under_the_dashboard(call, program, days, told):
    configure(program)
    with opened(program) as store:
        store.path.unlink()
        assert "was deleted" in store.follow_file(0)
        store.put_meta("file_changed_at", store.get_meta("file_changed_at") - days * 86400)
    shown = call("check").stdout
    assert bool(re.search("^warning usage.db was deleted or replaced under .*\n +→ ", shown, re.M)) is told


@pytest.mark.parametrize(("management", "key"), [(False, ""), (False, KEY), (True, KEY)])
def test_check_names_the_template_keys_of_the_proxy(call, program, proxy, management, key):
    proxy.example_page, proxy.management, proxy.answer_http_only = True, management, not management
    configure(program, cliproxy_port=proxy.port, management_password=key)
    shown = call("check").stdout
    assert re.search(f"^fault .*\n +→ .*{re.escape(app.STATE_REMEDIES['example_keys'])}$", shown, re.M)
    assert proxy.failures == 0


def test_check_before_the_first_start_says_how_many_events_are_taken_in(call, program):
    configure(program)
    path = program.folder / "usage.db"
    make_original(path)
    before = path.read_bytes()
    done = call("check")
    assert "3 events of an earlier version will be taken in" in done.stdout and path.read_bytes() == before
    shown = call("report", "7d")
    assert "adopting 3 rows" in shown.stderr and "adopting" not in shown.stdout
    assert re.search("^ok      database: 3 events", call("check").stdout, re.M)


def test_check_shows_no_control_letters_of_file_names(call, program):
    folder = write_accounts(program, 1)
    (folder / "codex-0.json").rename(folder / "a\x1b[31m\rb.json")
    (folder / "c\x1b[32m.json").write_text("{ broken")
    configure(program)
    done = call("check")
    assert "can be read by other users" in done.stdout and "is skipped" in done.stdout
    assert all(letter.isprintable() for letter in done.stdout.replace("\n", ""))


def test_check_names_a_dashboard_that_refuses_or_is_another_program(call, serve, program, proxy):
    port = serve(dashboard_password="a").port
    configure(program, cliproxy_port=proxy.port, dashboard_port=port, dashboard_password="b")
    done = call("check")
    assert done.returncode == 1 and re.search(f"port {port} answers: .*\n +→ correct dashboard_password", done.stdout)


def test_demo_lives_without_a_proxy_and_leaves_no_file(program):
    port = free_port()
    (program.folder / "config.json").write_text("{ broken")
    assert "port 99999 is no port" in program.run("demo", "--port", "99999").stderr
    running = program.start("demo", "--no-browser", "--host", "127.0.0.1", "--port", str(port))
    running.wait_for_line("Demo with made-up data")
    assert not any("Everyone" in line for line in running.lines)
    assert get(port, "/api/health")["demo"] is True
    assert get(port, "/api/summary?range=7d")["summary"]["failed"] > 20
    assert {"limited", "relogin", "ok"} <= {row["state"] for row in get(port, "/api/quota")["quotas"]}
    assert running.terminate() == 0
    left = {path.name for path in program.folder.iterdir() if not path.name.startswith("__")}
    assert left == {"config.example.json", "config.json", "usage-dashboard.html", "usage_dashboard.py"}
