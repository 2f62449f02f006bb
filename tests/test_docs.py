"""README, docs/ and the unit file say what the program does: nothing missing, nothing invented."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from program import get
from sockets import PATIENCE_S
from support import free_port

import usage_dashboard as app

ROOT = app.BASE_DIR
SCRIPT = inspect.getsource(app)
FILES = {name: (ROOT / name).read_text(encoding="utf-8") for name in
         ("README.md", "docs/api.md", "docs/performance.md", "docs/development.md", "docs/vi.md",
          "docs/proxies.md", "docs/operations.md")}  # fmt: skip
README, API, DEVELOPMENT, VIETNAMESE = (FILES[name] for name in
                                        ("README.md", "docs/api.md", "docs/development.md", "docs/vi.md"))  # fmt: skip
FOR_USERS = pytest.mark.parametrize("name", ["README.md", "docs/vi.md"])
UNIT = ROOT / "cliproxy-dashboard.service"
FOLDER = "/home/admin/cliproxyapi/usage-dashboard"
FENCE = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.S | re.M)
FLAG = re.compile(r"--[a-z]+(?:-[a-z]+)*")


def blocks(text, language):
    """Return the contents of all fenced blocks of a language."""
    return [content for name, content in FENCE.findall(text) if name == language]


def section(text, title):
    """Return the text below a heading, up to the next one of its level or above."""
    marks, rest = re.search(rf"^(#+) {re.escape(title)} *\n(.*)", text, re.S | re.M).groups()
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, flags=re.M)[0]


def table(text):
    """Return the rows of all tables in a text, as lists of cells."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def quoted(text):
    """Return all that stands in `code` marks."""
    return re.findall(r"`([^`\n]+)`", text)


def coded_rows(text, columns):
    """Return first cell → other cells, of the table rows that begin with one code and have so many columns."""
    rows = [row for row in table(text) if len(row) == columns and re.fullmatch(r"`[^`]+`", row[0])]
    return {row[0].strip("`"): row[1:] for row in rows}


# ---- configuration, commands, states ---------------------------------------------------------------------


@FOR_USERS
def test_config_table_holds_every_key_with_its_default(name):
    documented = {key: json.loads(default.strip("`")) for key, (default, meaning) in coded_rows(FILES[name], 3).items()
                  if re.fullmatch(r'`(".*"|[\d.]+|true|false|\{\}|\[\])`', default) and meaning}  # fmt: skip
    assert documented == dataclasses.asdict(app.Config())
    (_, meaning) = coded_rows(FILES[name], 3)["collect_mode"]
    assert {word.strip('"') for word in quoted(meaning)} == set(app.COLLECT_MODES)


@FOR_USERS
def test_config_keys_in_examples_exist(name):
    known = {*dataclasses.asdict(app.Config()), "management_key"}
    shown = {key for block in blocks(FILES[name], "json") for key in json.loads(block)}
    shown |= set(re.findall(r'`"(\w+)": [^`]*`', FENCE.sub("", FILES[name])))
    assert {"dashboard_password", "dashboard_port", "collect_mode"} <= shown <= known


@FOR_USERS
def test_environment_variables_are_told(name):
    read = set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)""", SCRIPT))
    read |= set(re.findall(r'"([A-Z_]+_PASSWORD)"', SCRIPT)) | {"HTTPS_PROXY", "SSL_CERT_FILE", "NO_PROXY", "TZ"}
    told = {word for row in table(FILES[name]) for word in quoted(row[0]) if re.fullmatch(r"[A-Z_]+", word)}
    assert "CLIPROXY_MANAGEMENT_PASSWORD" in read and told == read


def test_environment_of_the_tests_is_told():
    runner = (ROOT / "tests/run").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{([A-Z]+):-", runner))
    used |= set(re.findall(r"\bDASHBOARD_\w+", (ROOT / ".ci/run").read_text(encoding="utf-8")))
    assert "VENV" in used and used == set(coded_rows(section(DEVELOPMENT, "Tests"), 2)) & used


@pytest.fixture
def flags(capsys, monkeypatch):
    """Every command with the flags that its --help prints."""

    def help_of(*words):
        with pytest.raises(SystemExit):
            app.main([*words, "--help"])
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "300")
    return {name: set(FLAG.findall(help_of(name))) for name in re.findall(r"^    ([a-z-]+)\b", help_of(), re.M)}


@FOR_USERS
def test_commands_and_flags_are_told(name, flags):
    assert {"start", "check"} <= set(flags)
    told = coded_rows(FILES[name], 2)
    commands = {f"python3 usage_dashboard.py {command}" for command in flags}
    assert {command for command in told if "usage_dashboard.py" in command} == commands
    ranges = told["python3 usage_dashboard.py report"][0]
    assert [word for word in quoted(ranges) if word in app.RANGE_NAMES] == list(app.RANGE_NAMES)
    of = {}
    for row in table(FILES[name]):
        for flag in FLAG.findall(row[0]):
            words = set(re.findall(r"[a-z-]+", row[1]))
            of[flag] = words if words <= set(flags) else set(flags)
    assert of == {flag: {c for c in flags if flag in flags[c]} for flag in set().union(*flags.values())}


def test_every_command_line_shown_is_understood(flags):
    shown = [line.split() for text in FILES.values() for line in
             re.findall(r"python3 usage_dashboard\.py((?: [\w./-]+)*)", text)]  # fmt: skip
    assert len(shown) > 20
    for words in shown:
        if words not in ([], ["--version"]):
            known = flags[words[0]] | {*app.RANGE_NAMES, *app.EXPORT_FORMATS}
            assert not [word for word in words[1:] if word not in known and not re.search(r"\w[./]\w|^/", word)], words


def test_states_say_what_the_program_says():
    told = coded_rows(section(API, "States of the collector"), 2)
    assert {state: text for state, (text,) in told.items()} == app.STATE_REMEDIES
    of_accounts = section(API, "States of an account")
    told = coded_rows(of_accounts, 2)
    assert {state: told[state][0] for state in app.QUOTA_MESSAGES} == app.QUOTA_MESSAGES
    states = {word for row in table(of_accounts) for word in quoted(row[0])}
    assert states - set(app.QUOTA_MESSAGES) == {"ok", "limited", "reset_due", "no_windows"}
    told = {word: row[1:] for row in table(VIETNAMESE) for word in quoted(row[0])}
    assert all(all(told[state]) for state in app.STATE_REMEDIES)


@FOR_USERS
def test_what_a_user_needs_first_and_one_of_the_original_needs_is_told(name):
    text, start = FILES[name], "Start" if name == "README.md" else "Khởi động"
    for words in ("usage-statistics-enabled: true", "secret-key:"):
        assert 0 < text.index(words) < text.index("usage_dashboard.py start")
    for tool in ("sqlite3 usage.db", "lsof -i"):
        assert tool in text and f"apt install {tool.split()[0]}" in text
    moving = section(text, "Moving from the original" if name == "README.md" else "Chuyển từ bản cũ")
    for words in ("rm usage-dashboard.py", "pkill -f usage-dashboard.py", "pkill -f usage_dashboard.py", "queue_key"):
        assert words in moving
    shell = "".join(blocks(text, "sh"))
    for words in (f"cp {UNIT.name} ", "daemon-reload", "enable", "start", "status", "stop"):
        assert words in shell, words
    assert "8320" in section(text, start) and FOLDER in text and "`admin`" in text


def test_readme_is_short_and_tells_version_and_licence():
    assert len(README.encode()) <= 20 * 1024
    assert f"**{app.__version__.rsplit('.', 1)[0]}**" in section(README, "Changelog")
    licence = section(README, "Support and licence")
    assert "Developed by TTAI Solutions Software, <https://ttaisolutions.com>." in licence
    assert "Copyright 2025 CLIProxyAPI Usage Dashboard. Proprietary software. All rights reserved." in licence


# ---- links and files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FILES))
def test_links_lead_somewhere(name):
    prose = FENCE.sub("", FILES[name])
    targets = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", prose)
    for target in [target for target in targets if "://" not in target]:
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+?) *$", FENCE.sub("", file.read_text(encoding="utf-8")), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target
    if name == "README.md":
        assert {"docs/light.png", "docs/dark.png", *FILES} - {"README.md"} <= set(targets)


def test_files_named_in_the_docs_exist():
    named = r"\b(usage_dashboard\.py|usage-dashboard\.html|config\.example\.json|tests/[\w./]+\w|[\w-]+\.service)\b"
    names = {name for text in FILES.values() for name in re.findall(named, text)}
    assert len(names) > 6
    assert not [name for name in names if not (ROOT / name).exists()]


# ---- the API ---------------------------------------------------------------------------------------------


def served(program, command):
    """Start the program, and return its port once it serves there."""
    port = free_port()
    running = program.start(command, "--no-browser", "--host", "127.0.0.1", "--port", str(port))
    running.wait_for_line(f":{port}")
    return port


def test_routes_are_told():
    told = [row[0].strip("`") for row in table(API) if row[0].startswith("`GET /")]
    assert {re.sub(r"\?.*", "", route) for route in told} == {"GET /", *(f"GET {path}" for path in app.ROUTES)}
    assert all(re.search(rf"^## `{re.escape(path)}`$", API, re.M) for path in app.ROUTES)


def keys_in(value, path=()):
    """Return the path of every key in an answer, all the way down."""
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = [("[]", item) for item in value]
    return {path}.union(*(keys_in(item, (*path, key)) for key, item in items))


def differences(shown, real):
    """Return the keys that one of two answers lacks; "…" stands for more keys, and a null that came tells no more."""
    shown, real = keys_in(shown), keys_in(real)
    known = {path[:-1] for path in real}
    too_many = [path for path in shown - real if path[-1] != "…" and path[:-1] in known]
    return too_many + [path for path in real - shown if path[:-1] in shown and (*path[:-1], "…") not in shown]


def example(path):
    return json.loads(blocks(section(API, f"`{path}`"), "json")[0])


def test_examples_of_answers_have_the_real_keys(program, proxy):
    (program.folder / "config.json").write_text(json.dumps({"cliproxy_port": proxy.port, "management_password": "no"}))
    demo, started = served(program, "demo"), served(program, "start")
    for path in ("/api/summary", "/api/quota", "/api/requests", "/api/health"):
        real = get(started if path == "/api/health" else demo, path + "?range=7d")
        assert differences(example(path), real) == [], path


def test_parameters_and_errors_are_told(make_site):
    site = make_site()
    told = {word for row in table(API) for word in quoted(row[0]) if re.fullmatch(r"[a-z_]+", word)}
    read = set(re.findall(r"""(?:query|self)\.(?:get|choice|whole|moment)\(["'](\w+)["']""", SCRIPT))
    assert {"range", "limit", "account"} <= read <= told | {"bucket", "force"}
    for name in "range start end tz_offset status bucket limit before".split():
        route = "requests" if name in ("end", "limit", "before") else "summary"
        assert name in API and site.error(f"/api/{route}?{name}=%2E", 400)["code"] == f"bad_{name}"
    assert site.error("/api/requests?limit=0", 400) == json.loads(blocks(section(API, "Errors"), "json")[0])
    codes = {code for row in table(section(API, "Errors")) for cell in row for code in quoted(cell)}
    raised = set(re.findall(r"""ApiError\(\d+, ["']([a-z_]+)["']""", SCRIPT))
    raised = {code for code in raised if not code.startswith("bad_")} | {app.StoreError.code}
    assert "not_found" in raised and raised <= codes


# ---- the worked example ----------------------------------------------------------------------------------


def put_in(path, *steps):
    """Insert each text behind (or before) the one place that its pattern finds."""
    text = path.read_text(encoding="utf-8")
    for pattern, where, insertion in steps:
        found = list(re.finditer(pattern, text, re.M))
        assert len(found) == 1, pattern
        at = found[0].end() if where == "behind" else found[0].start()
        text = text[:at] + insertion + text[at:]
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def example_site(program):
    """The demo, with the steps of the worked example carried out on its copy of the two files."""
    steps = section(DEVELOPMENT, "Example: a new route and its use on the page")
    function, entry = blocks(steps, "python")
    (place,), (word,) = blocks(steps, "html"), blocks(steps, "text")
    (source,) = blocks(steps, "js")
    put_in(program.script, (r"^ROUTES\b", "before", function + "\n\n"), (r"^ROUTES\b.*\n", "behind", entry))
    put_in(program.folder / "usage-dashboard.html", (r'<span id="version">', "before", place.strip()),
           (r'<script type="text/plain" id="i18n">\n', "behind", word),
           (r"^ *const SOURCES = \{\n", "behind", source))  # fmt: skip
    return served(program, "demo")


def test_worked_example_answers(example_site):
    hours = get(example_site, "/api/summary?range=7d")["hours"]
    busiest = get(example_site, "/api/busiest?range=7d")["busiest"]
    assert busiest["total_tokens"] >= max(hour["total_tokens"] for hour in hours[:-1]) > 0
    assert get(example_site, "/api/busiest?start=1000000000&end=1000003600") == {"busiest": None}


def test_worked_example_shows_on_the_page(example_site, browser):
    browser.goto(f"http://127.0.0.1:{example_site}/?range=7d")
    browser.click("#lang-en")
    english = browser.wait_until("/^Busiest hour: .*\\d\\d:00$/.exec(document.getElementById('busiest').textContent)")
    browser.click("#lang-vi")
    browser.wait_until("document.getElementById('busiest').textContent.startsWith('Giờ cao điểm: ')")
    assert english and browser.text("#busiest").endswith(english[0][-5:])


# ---- the unit file ---------------------------------------------------------------------------------------


def test_unit_has_its_values_and_leaves_the_program_time_to_stop():
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#")]
    expected = {
        "Description": "CLIProxyAPI Usage Dashboard", "After": "network.target", "Type": "simple", "User": "admin",
        "WorkingDirectory": FOLDER, "ExecStart": f"/usr/bin/python3 {FOLDER}/usage_dashboard.py start --no-browser",
        "Restart": "always", "RestartSec": "10", "RestartPreventExitStatus": str(app.ConfigError.exit_code),
        "SyslogIdentifier": "usage-dashboard", "NoNewPrivileges": "yes", "ProtectSystem": "strict",
        "ReadWritePaths": FOLDER, "PrivateTmp": "yes", "MemoryMax": "256M", "MemoryDenyWriteExecute": "yes",
        "ProtectProc": "invisible", "RemoveIPC": "yes", "WantedBy": "multi-user.target",
    }  # fmt: skip
    values = dict(pairs)
    assert {name: values.get(name) for name in expected} == expected
    assert len([name for name, _ in pairs if name != "SystemCallFilter"]) == len(values) - 1
    assert values.get("ProtectHome", "no") in ("no", "read-only") and 3 < int(values["TimeoutStopSec"]) <= 30


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    copy, python = tmp_path / UNIT.name, tmp_path / "python3"
    python.symlink_to(sys.executable)  # a path without a space in it
    copy.write_text(UNIT.read_text(encoding="utf-8").replace("/usr/bin/python3", str(python)), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", errors="replace", timeout=PATIENCE_S, check=False)  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if UNIT.name in line]
    assert (done.returncode, lines) == (0, []), done.stdout
