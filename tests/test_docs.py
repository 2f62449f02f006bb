"""The README and the unit file say what the program does: nothing missing, nothing invented."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest

import usage_dashboard as app

ROOT = app.BASE_DIR
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "usage-dashboard.html").read_text(encoding="utf-8")
SCRIPT = inspect.getsource(app)
UNIT = ROOT / "cliproxy-dashboard.service"
FOLDER = "/home/admin/cliproxyapi/usage-dashboard"
SECTIONS = [
    "Start", "What to switch on in CLIProxyAPI", "Configuration", "The page", "API", "As a service (systemd)", "Safety",
    "Troubleshooting", "What is stored, and what never is", "Limits", "Speed and size", "Development", "Changelog",
    "Support and licence", "Moving from the original", "Hướng dẫn tiếng Việt",
]  # fmt: skip
BLOCKS = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", README, re.S | re.M)
PROSE = re.sub(r"^ *```\w+\n.*?^ *```$", "", README, flags=re.S | re.M)


def blocks(language):
    return [content for name, content in BLOCKS if name == language]


def section(title):
    """Give the text below a heading, up to the next one of its level or above."""
    marks, _, rest = re.search(rf"^(#+) {re.escape(title)}( *)\n(.*)", README, re.S | re.M).groups()
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, flags=re.M)[0]


def table(text):
    """Give the rows of all tables in a text, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def quoted(text):
    """Give all that stands in `code` marks."""
    return re.findall(r"`([^`\n]+)`", text)


def help_of(capsys, *words):
    """Give what the program prints with --help."""
    with pytest.raises(SystemExit):
        app._parse_arguments([*words, "--help"])
    return capsys.readouterr().out


# ---- the README ------------------------------------------------------------------------------------------


def test_sections_stand_in_their_order():
    headings = re.findall(r"^## (.+)$", PROSE, re.M)
    assert headings == SECTIONS


def test_config_table_holds_every_key_with_its_default():
    rows = [row for row in table(section("Configuration")) if len(row) == 3 and row[0].startswith("`")]
    assert all(row[2] for row in rows)
    documented = [(row[0].strip("`"), json.loads(row[1].strip("`"))) for row in rows]
    assert documented == list(dataclasses.asdict(app.Config()).items())
    assert set(app._CHECKS) == {key for key, _ in documented}


def test_config_keys_in_examples_exist():
    known = {*app._CHECKS, *app._OTHER_NAMES}
    answers = section("API")
    shown = {key for block in blocks("json") if block not in answers for key in json.loads(block)}
    assert shown and shown <= known
    inline = set(re.findall(r'`"(\w+)": [^`]*`', PROSE.replace(answers, ""))) - {"refreshing"}
    assert inline and inline <= known
    worded = {word for word in quoted(PROSE) if re.match(r"(cliproxy|dashboard|management|poll|retention)_\w+\Z", word)}
    assert worded <= known | {"retention_seconds", "retention_short"}  # of the answers


def test_other_names_and_limits_of_keys_are_told():
    configuration = section("Configuration")
    assert all(f"`{name}`" in configuration for name in app._OTHER_NAMES)
    assert all(f'`"{mode}"`' in configuration for mode in app.COLLECT_MODES)


def test_environment_variables_are_told():
    read = {*app._ENVIRONMENT, *re.findall(r"""environ(?:\.get\(|\[)["'](\w+)""", SCRIPT)}
    read |= {"HTTPS_PROXY", "SSL_CERT_FILE"}  # read by the standard library
    of_tests = {"PYTHON", "VENV", *re.findall(r"\bDASHBOARD_\w+", (ROOT / ".ci/run").read_text(encoding="utf-8"))}
    told = {name for row in table(section("Environment") + section("Development")) for name in quoted(row[0])}
    assert read | of_tests <= told
    assert not {name for name in told if name.isupper()} - read - of_tests - {"NO_PROXY", "TZ"}


def test_commands_and_flags_are_told(capsys):
    names = re.findall(r"^    (\w+) ", help_of(capsys), re.M)
    assert names[:2] == ["start", "demo"]
    flags = {name: set(re.findall(r"--[a-z]+(?:-[a-z]+)*", help_of(capsys, name))) for name in names}
    told = section("Commands")
    assert all(f"`python3 usage_dashboard.py {name}`" in told for name in names)
    rows = {}
    for row in table(told):
        for flag in re.findall(r"--[a-z]+(?:-[a-z]+)*", row[0]):
            rows[flag] = set(names) if row[1] == "all" else set(row[1].split(", "))
    assert rows == {flag: {name for name in names if flag in flags[name]} for flag in set().union(*flags.values())}
    ranges = re.search(r"a range may follow: (.*)\|", told).group(1)
    assert quoted(ranges) == list(app.RANGE_NAMES)


def test_every_command_line_shown_is_understood():
    shown = re.findall(r"python3 usage_dashboard\.py((?: [\w./-]+)*)", README)
    assert len(shown) > 10
    for line in shown:
        words = line.split()
        if words != ["--version"]:
            assert callable(app._parse_arguments(words).run)


def test_routes_are_told():
    told = [row[0] for row in table(section("API")) if row[0].startswith("`GET /")]
    assert {re.sub(r"\?.*", "", cell.strip("`")) for cell in told} == {"GET /", *(f"GET {path}" for path in app.ROUTES)}
    assert all(re.search(rf"^### `{re.escape(path)}`$", README, re.M) for path in app.ROUTES)


def test_parameters_are_told():
    read = set(re.findall(r"""(?:query\.get\(|_(?:choice|whole|moment)\(query, )"(\w+)""", SCRIPT)) | {"force"}
    told = {re.split(r"\W", word)[0] for word in quoted(section("API")) if re.match(r"\w+(=|\Z)", word)}
    assert {"range", "before", "limit"} <= read <= told | {"force"}
    assert "force=1" in section("API")


def test_error_example_is_the_real_one():
    with pytest.raises(app.ApiError) as raised:
        app._whole({"limit": "0"}, "limit", 1, 500, 100)
    example = next(json.loads(block) for block in blocks("json") if '"error"' in block.split("\n")[0])
    assert example == {"error": str(raised.value), "code": raised.value.code}


@pytest.fixture
def answers(tmp_path):
    """The routes over a database with one request, one outage, and readings enough for a forecast."""
    store = app.Store(tmp_path / "usage.db")
    line = (ROOT / "tests/data/events.jsonl").read_text(encoding="utf-8").splitlines()[0]
    store.store_batch(app.parse_events([line.encode()]), 1, 1_800_000_000.0)
    store.begin_outage(1_777_700_000.0, "unreachable")
    file = app.AccountFile("codex-a.json", "a@example.com", "id", "plus", "token", False, "", "")
    now = time.time()
    for used, at in ((20, now - 1200), (22, now - 600), (23, now)):
        window = {"used_percent": used, "limit_window_seconds": 18000, "reset_at": int(now) + 7200}
        reply = {"plan_type": "plus", "rate_limit": {"allowed": True, "limit_reached": False, "primary_window": window}}
        store.save_reading(app.snapshot_of(file, reply, at))
    config = app.Config()
    stop = threading.Event()
    log = app.Log(io.StringIO())
    collector = app.Collector(config, store, log, stop)
    refresher = app.QuotaRefresher(config, store, log, stop)
    yield app.App(config, store, refresher, collector.status)
    store.close()


def shape(value):
    """Give the keys of an answer all the way down; lists are known by their first item."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else None


def covers(shown, real):
    """Tell whether an example has the answer's keys; one with "…" leaves some out."""
    if isinstance(shown, list) and isinstance(real, list):
        return covers(shown[0], real[0])
    if not isinstance(shown, dict) or not isinstance(real, dict):
        return not isinstance(shown, (dict, list)) and not isinstance(real, (dict, list))
    keys = set(shown) - {"…"}
    whole = keys == set(real) or ("…" in shown and keys < set(real))
    return whole and all(covers(shown[key], real[key]) for key in keys)


@pytest.mark.parametrize("path", sorted(app.ROUTES))
def test_example_of_an_answer_has_its_real_keys(answers, path):
    heading = rf"^### `{re.escape(path)}`$.*?```json\n(.*?)```"
    shown = json.loads(re.search(heading, README, re.S | re.M).group(1))
    real = app.ROUTES[path].answer(answers, {"range": "all"})
    assert covers(shape(shown), shape(real)), (shape(shown), shape(real))


def test_states_are_told_with_a_remedy():
    rows = table(section("Troubleshooting"))
    told = {name: row for row in rows for name in quoted(row[0])}
    assert set(app.STATE_REMEDIES) <= set(told)
    assert all(len(told[state]) == 3 and told[state][2] for state in app.STATE_REMEDIES)
    assert {"ok", "limited", "reset_due", "no_windows", *app.QUOTA_MESSAGES} == set(told) - set(app.STATE_REMEDIES)


def test_links_and_pictures_exist():
    targets = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", PROSE)
    headings = re.findall(r"^#+ (.+)$", PROSE, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors
        elif "://" not in target:
            assert (ROOT / target).is_file(), target
    assert {"docs/light.png", "docs/dark.png"} <= set(targets)


def test_files_named_in_commands_exist():
    for name in re.findall(r"\b(usage_dashboard\.py|usage-dashboard\.html|tests/[\w.]+|[\w.-]+\.service)\b", README):
        assert (ROOT / name).exists(), name


def test_switches_of_the_proxy_are_told():
    told = section("What to switch on in CLIProxyAPI")
    for words in ("usage-statistics-enabled: true", "redis-usage-queue-retention-seconds: 3600", "8317", "secret-key"):
        assert words in told


def test_version_and_licence_are_told():
    assert f"**{app.__version__.rsplit('.', 1)[0]}**" in section("Changelog")
    for words in (
        "Developed by TTAI Solutions Software, <https://ttaisolutions.com>.",
        "Copyright 2025 CLIProxyAPI Usage Dashboard. Proprietary software. All rights reserved.",
    ):
        assert words in section("Support and licence")


def test_worked_example_still_fits_the_program(answers):
    function, route = blocks("python")
    names = dict(vars(app))
    exec("from __future__ import annotations\n" + function, names)
    busiest = names["api_busiest"](answers, {"range": "all"})
    assert busiest["requests"] == 1 and busiest["start"] % 900 == 0
    assert names["api_busiest"](answers, {"range": "1h"}) == {"start": None}
    assert eval("{" + route + "}", names)["/api/busiest"].answer is names["api_busiest"]
    anchors = ['<span id="version"></span>', "async function loadHealth()", "function renderAll() {", "loadRequests()]",
               "function loadUsage() {", "const zoneOffset", "const clientNow", "function params("]  # fmt: skip
    for anchor in anchors:
        assert PAGE.count(anchor) == 1, anchor


# ---- the unit file ---------------------------------------------------------------------------------------


def unit_values():
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    return [line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#")]


def test_unit_has_its_values():
    expected = {
        "Description": "CLIProxyAPI Usage Dashboard",
        "After": "network.target",
        "Type": "simple",
        "User": "admin",
        "WorkingDirectory": FOLDER,
        "ExecStart": f"/usr/bin/python3 {FOLDER}/usage_dashboard.py start --no-browser",
        "Restart": "always",
        "RestartSec": "10",
        "RestartPreventExitStatus": str(app.ConfigError.exit_code),
        "SyslogIdentifier": "usage-dashboard",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ReadWritePaths": FOLDER,
        "PrivateTmp": "yes",
        "WantedBy": "multi-user.target",
    }
    values = dict(unit_values())
    assert {name: values.get(name) for name in expected} == expected
    assert len(values) == len(unit_values())
    assert values.get("ProtectHome", "no") in ("no", "read-only")


def test_unit_leaves_the_program_time_to_stop():
    assert 3 < int(dict(unit_values())["TimeoutStopSec"]) <= 30


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy, python = tmp_path / UNIT.name, tmp_path / "python3"
    python.symlink_to(sys.executable)  # a path without a space in it
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/usr/bin/python3", str(python)), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace", timeout=60, check=False,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if UNIT.name in line]
    assert (done.returncode, said) == (0, []), done.stdout
