from __future__ import annotations

import dataclasses
import json

import pytest

import usage_dashboard as app


def load(tmp_path, content, env=None, flags=None):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return app.load_config(path, env or {}, flags)


def test_example_file_holds_every_key_with_its_default():
    example = json.loads((app.BASE_DIR / "config.example.json").read_text(encoding="utf-8"))
    assert example == dataclasses.asdict(app.Config())
    assert list(example) == [field.name for field in dataclasses.fields(app.Config)]


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    content = {"management_password": "from-file", "dashboard_port": 9000, "cliproxy_host": "10.0.0.5"}
    env = {"MANAGEMENT_PASSWORD": "second", "CLIPROXY_MANAGEMENT_PASSWORD": "first"}
    config, warnings = load(tmp_path, content, env, flags={"dashboard_port": 9001, "dashboard_host": None})
    assert (config.management_password, config.dashboard_port) == ("first", 9001)
    assert (config.cliproxy_host, config.dashboard_host, warnings) == ("10.0.0.5", "0.0.0.0", [])


def test_second_environment_name_other_key_name_and_a_byte_order_mark_are_taken(tmp_path):
    assert load(tmp_path, {}, env={"MANAGEMENT_PASSWORD": "x"})[0].management_password == "x"
    assert load(tmp_path, {"management_key": "y"})[0].management_password == "y"
    assert load(tmp_path, {"management_key": "y"}, env={"MANAGEMENT_PASSWORD": ""})[0].management_password == "y"
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"dashboard_port": 1234}')  # with a byte order mark
    assert app.load_config(tmp_path / "config.json", {})[0].dashboard_port == 1234


def test_all_faults_are_told_in_one_message_without_the_secret(tmp_path):
    wrong = {
        "cliproxy_port": "8317", "cliproxy_tls": "yes", "collect_mode": "push", "poll_interval_seconds": 0,
        "cliproxy_host": "http://proxy", "dashboard_host": "localhost:8320", "retention_days": True,
        "management_password": "hunter2\n", "queue_key": "",
    }  # fmt: skip
    with pytest.raises(app.ConfigError) as raised:
        load(tmp_path, wrong)
    message = str(raised.value)
    assert all(f'"{key}"' in message for key in wrong)
    assert raised.value.exit_code == 2 and len(raised.value.faults) == len(wrong)
    assert "hunter2" not in message


@pytest.mark.parametrize(("prices", "said"), [
    *((prices, 'must be of the form {"gpt-5.4": {"input": 2.5, ') for prices in (None, "gpt-5.4", [], 3)),
    *(({"a": price}, 'for "input" of "a", "output" of "a"; the form is {') for price in (3, None, [1, 2], {})),
    ({"a": {"input": 1}, "b": {"output": 1, "input": 2}}, 'for "output" of "a"; the form is {"gpt-5.4": {"input": '),
    *(({"b\n": {"input": usd, "output": 1}}, r'for "input" of "b\n"; the form')
      for usd in ("2.5", -1, 1e7, 10**400, True, float("nan"), float("inf"), None, [])),
    ({"a": {"input": 1, "output": 2, "cached": "0", "reasoning": 3}}, 'for "cached" of "a", "reasoning" of "a"; '),
])  # fmt: skip
def test_odd_price_is_named_with_its_model_kind_and_the_form(tmp_path, prices, said):
    with pytest.raises(app.ConfigError) as raised:
        load(tmp_path, {"prices": prices})
    assert len(raised.value.faults) == 1 and '"prices" ' in raised.value.faults[0] and said in raised.value.faults[0]


@pytest.mark.parametrize("key", ["database", "auth_dir", "cliproxy_host", "dashboard_host", "queue_key"])
@pytest.mark.parametrize("letter", ["\0", "\n", "\x1b", "\ud800"])
def test_text_with_letters_that_no_system_takes_is_a_fault(tmp_path, key, letter):
    with pytest.raises(app.ConfigError, match=f'"{key}" must not hold line breaks or other control characters'):
        load(tmp_path, {key: f"a{letter}b"})


@pytest.mark.parametrize(("names", "said"), [
    ([], "must be an object"), ({"AnLaptop": "An"}, 'has "AnLaptop", which must be a key\'s tag ("#3f9a2c")'),
    ({"#3f9a2": "An"}, 'has "#3f9a2", which'), ({"ops@example.org #12": "Ops"}, 'has "ops@example.org #12", which'),
    *(({"#3f9a2c": name}, 'must give "#3f9a2c" a name of 1 to 60 letters') for name in (7, "", " ", "a\nb", "x" * 61, "\x9b1m")),
    ({"#3f9a2c": "a\u202eb"}, "on one line"),
    ({"#3f9a2c": "Ops", "ops@example.org": "ops "}, 'has "ops" twice'),
    ({"#3f9a2c": "An", "#3F9A2C": "Bo"}, 'has "#3f9a2c" twice'), ({"#3f9a2c": "#aaaaaa", "#aaaaaa": "Bo"}, "twice"),
    ({"x": "An", "#3f9a2c": 7}, 'double quotes, on one line'),
])  # fmt: skip
def test_fault_in_names_is_told_with_its_value_and_what_is_allowed(tmp_path, names, said):
    with pytest.raises(app.ConfigError) as told:
        load(tmp_path, {"names": names})
    assert '"names" ' in str(told.value) and said in str(told.value)


def test_unknown_key_is_a_warning_with_the_nearest_name(tmp_path):
    config, warnings = load(tmp_path, {"dashbord_port": 1, "zzz": 2})
    assert config == app.Config()
    assert 'did you mean "dashboard_port"?' in warnings[0]
    assert '"zzz" is unknown' in warnings[1] and "did you mean" not in warnings[1]


@pytest.mark.parametrize(("content", "said"), [
    *((content, "JSON") for content in (b"", b"{", b"[1]", b'{"a": 1,}', b"nul", b"[" * 100_000)),
    (b'{"queue_key": "\xff"}', "UTF-8"), (None, "does not exist"),
])  # fmt: skip
def test_file_that_is_missing_or_no_json_object_is_named(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(app.ConfigError, match=f"config.json.*{said}"):
        app.load_config(tmp_path / "config.json", {})


def test_secrets_stay_out_of_the_printed_form(tmp_path):
    config, _ = load(tmp_path, {"management_password": "hunter2", "dashboard_password": "hunter3"})
    assert "hunter" not in repr(config)
