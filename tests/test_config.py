"""Where a setting comes from, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ziphius.config import (
    ServeConfig,
    default_config_file,
    env_name,
    option_fields,
    option_type,
    override,
    resolve,
)
from ziphius.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('port = 3\nhost = "file"\nmax-running-requests = 5\ndrain_timeout = 2\nprefix_cache = false\n')
    return path


def test_flag_over_environment_over_file_over_default(file: Path) -> None:
    env = {"ZIPHIUS_PORT": "2", "ZIPHIUS_HOST": "environment", "ZIPHIUS_HOME": "/somewhere", "HOME": "/home"}
    resolved = resolve({"port": 1, "host": None}, env, file)
    config, origins = resolved.config, resolved.origins
    assert (config.port, origins["port"]) == (1, "flag")
    assert (config.host, origins["host"]) == ("environment", "environment ZIPHIUS_HOST")
    assert (config.max_running_requests, origins["max_running_requests"]) == (5, f"file {file}")
    assert (config.page_size, origins["page_size"]) == (16, "default")
    assert (config.drain_timeout, config.prefix_cache) == (2.0, False)
    assert set(origins) == {option.name for option in option_fields()}


def test_a_resolved_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}, env={}).config.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("port", "8000", 8000),
        ("port", 8000, 8000),
        ("mem_fraction", "0.5", 0.5),
        ("drain_timeout", 3, 3.0),
        ("prefix_cache", "off", False),
        ("prefix_cache", "Yes", True),
        ("context_length", "4096", 4096),
        ("served_model_name", "a", "a"),
    ],
)
def test_text_becomes_what_the_option_is(name: str, given: Any, value: Any) -> None:
    config = resolve({name: given}, env={}).config
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("port", "http", ["port (flag)", "must be int", "'http'"]),
        ("port", "", ["port"]),
        ("port", 1.5, ["port"]),
        ("port", True, ["port"]),
        ("port", "0", ["at least 1"]),
        ("port", "65536", ["at most 65535"]),
        ("port", "1234567", ["at most 65535, not 1234567"]),
        ("port", float("inf"), ["must be int"]),
        ("port", "9" * 400, ["at most 65535"]),
        ("mem_fraction", "nan", ["mem_fraction"]),
        ("start_timeout", "inf", ["start_timeout", "a finite float"]),
        ("device", "tpu", ["auto, cpu, cuda", "'tpu'"]),
        ("prefix_cache", "maybe", ["prefix_cache"]),
        ("model", 5, ["model"]),
        ("model", ["a"], ["model"]),
        ("host", "", ["must not be empty"]),
        ("api_key", "", ["must not be empty"]),
    ],
)
def test_a_wrong_value_is_told_with_its_limit(name: str, given: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({name: given}, env={})
    assert caught.value.param == name
    for word in words:
        assert word in caught.value.message


def test_a_wrong_value_names_its_origin(file: Path) -> None:
    with pytest.raises(ConfigError, match="environment ZIPHIUS_PORT"):
        resolve({}, {"ZIPHIUS_PORT": "x"})
    file.write_text("port = 'x'")
    with pytest.raises(ConfigError, match=str(file)):
        resolve({}, {}, file)


def test_an_unknown_key_is_an_error_with_the_nearest(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown option: prot; did you mean port\?"):
        resolve({"prot": 1}, {})
    with pytest.raises(ConfigError, match=r"ZIPHIUS_PROT; did you mean ZIPHIUS_PORT\?"):
        resolve({}, {"ZIPHIUS_PROT": "1"})
    file.write_text("max_runing_requests = 1")
    with pytest.raises(ConfigError, match=r"max_runing_requests; did you mean max_running_requests\?"):
        resolve({}, {}, file)
    resolve({}, {"ZIPHIUS_HOME": "/x", "ZIPHIUS_RUN_ID": "y", "ZIPHIUS_TEST_ANYTHING": "z", "OTHER": "1"})


@pytest.mark.parametrize(("content", "reason"), [("port = ", "not valid TOML"), (b"\xff", "not valid TOML")])
def test_a_broken_file_is_told(file: Path, content: str | bytes, reason: str) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=reason):
        resolve({}, {}, file)


def test_a_missing_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        resolve({}, {}, tmp_path / "none.toml")


def test_override_keeps_the_rest_and_its_origins(file: Path) -> None:
    base = resolve({"api_key": "k"}, {"ZIPHIUS_HOST": "h"}, file)
    changed = override(base, {"port": "9", "model": None})
    assert dataclasses.replace(base.config, port=9) == changed.config
    assert {name for name in base.origins if base.origins[name] != changed.origins[name]} == {"port"}
    with pytest.raises(ConfigError, match="at most 65535"):
        override(base, {"port": 70000})


def test_the_usual_file(tmp_path: Path) -> None:
    home, xdg = tmp_path / "home", tmp_path / "xdg"
    assert default_config_file({"HOME": str(home)}) is None
    assert default_config_file({}) is None
    for folder in (home / ".config" / "ziphius", xdg / "ziphius", tmp_path / "own"):
        folder.mkdir(parents=True)
        (folder / "config.toml").touch()
    env = {"HOME": str(home)}
    assert default_config_file(env) == home / ".config" / "ziphius" / "config.toml"
    env["XDG_CONFIG_HOME"] = str(xdg)
    assert default_config_file(env) == xdg / "ziphius" / "config.toml"
    env["ZIPHIUS_HOME"] = str(tmp_path / "own")
    assert default_config_file(env) == tmp_path / "own" / "config.toml"


def test_each_option_is_declared_whole() -> None:
    for option in option_fields():
        assert option.metadata["help"].endswith(".")
        assert option_type(option.name) in (str, int, float, bool)
        assert env_name(option.name) == "ZIPHIUS_" + option.name.upper()
        value = getattr(ServeConfig(), option.name)
        if value is not None and option.metadata["choices"]:
            assert value in option.metadata["choices"]
