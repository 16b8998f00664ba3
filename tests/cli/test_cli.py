"""The command's face: help, exit statuses, settings and their origins, and how little it costs to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ziphius.config import option_fields

HELP = """\
Usage: ziphius [OPTIONS] COMMAND [ARGS]...

  Start, serve and watch a language model behind an OpenAI-compatible API.

Options:
  -h, --help  Show this message and exit.

Commands:
  start    Start a server in the background, and wait for it.
  restart  Stop a server and start it again with its settings.
  serve    Run the server in the foreground.
  stop     Let running requests end, then end every process.
  status   Say what a server is doing.
  logs     Show a server's log, also of one that is gone.
  chat     Talk to a server in the terminal.
  pull     Fetch a model without starting it.
  config   Show each setting and where its value came from.
  plan     Say what fits and why, before anything is started.
  doctor   Look for what would keep a server from running well.
  slurm    Print a Slurm script that starts a server, and submit it.
  version  Print the version.
  image    Build and look at an Apptainer image of SGLang.
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ZIPHIUS_", "XDG_"))}
    return {**kept, "ZIPHIUS_HOME": str(tmp_path), "COLUMNS": "100", "NO_COLOR": "1"}


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "ziphius", *words]
        return subprocess.run(argv, env={**env, **more}, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_help(run: Run) -> None:
    done = run("--help")
    assert (done.returncode, done.stdout) == (0, HELP)


@pytest.mark.parametrize("verb", ["start", "serve", "config", "restart"])
def test_every_option_is_an_option_of_these_verbs(run: Run, verb: str) -> None:
    text = run(verb, "--help").stdout
    for option in option_fields():
        assert f"--{option.name.replace('_', '-')} " in text
    assert "--resolved" not in text


@pytest.mark.parametrize(
    ("words", "most"), [(["--help"], 200), (["status"], 210), (["status", "--json", "--name", "x"], 210)]
)
def test_asking_is_cheap(env: dict[str, str], words: list[str], most: int) -> None:
    """Nearly all of its time goes into imports, and those can be counted."""
    argv = [sys.executable, "-X", "importtime", "-m", "ziphius", *words]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip() for line in told}
    assert {"typer", "ziphius.cli.app"} <= modules
    assert {"torch", "numpy", "httpx2", "uvicorn", "tokenizers", "jinja2", "huggingface_hub", "rich"} & modules == set()
    assert {"pydantic", "zmq", "asyncio", "psutil", "importlib.metadata"} & modules == set()
    assert len(modules) <= most


def test_status_of_nothing(run: Run) -> None:
    done = run("status")
    assert (done.returncode, done.stdout) == (3, "default is stopped: it was never started\n")
    told = json.loads(run("status", "--json", "--name", "x").stdout)
    assert (told["name"], told["state"], told["pid"]) == ("x", "stopped", None)
    assert run("status", "--all", "--json").stdout == "[]\n"


def test_config_tells_origins_and_masks_secrets(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("page_size = 32\n")
    words = ("config", "--port", "8000", "--api-key", "the-key", "--no-prefix-cache")
    settings = {s["name"]: s for s in json.loads(run(*words, "--json", ZIPHIUS_HOST="0.0.0.0").stdout)}
    assert list(settings) == [option.name for option in option_fields()]
    told = {name: (settings[name]["value"], settings[name]["origin"]) for name in settings}
    assert told["port"] == (8000, "flag")
    assert told["prefix_cache"] == (False, "flag")
    assert told["host"] == ("0.0.0.0", "environment ZIPHIUS_HOST")
    assert told["page_size"] == (32, f"file {tmp_path / 'config.toml'}")
    assert told["dtype"] == ("auto", "default")
    assert told["api_key"] == ("********", "flag")
    assert told["context_length"] == (None, "default")
    table = run(*words, ZIPHIUS_API_KEY="the-other-key")
    assert "the-" not in table.stdout
    assert ["page_size", "32", "file"] in [line.split()[:3] for line in table.stdout.splitlines()]


def test_another_config_file_takes_the_usual_ones_place(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("page_size = 32\n")
    (tmp_path / "mine.toml").write_text("port = 8000\n")
    settings = json.loads(run("config", "--config", str(tmp_path / "mine.toml"), "--json").stdout)
    values = {s["name"]: s["value"] for s in settings}
    assert (values["port"], values["page_size"]) == (8000, 16)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("config", "--port", "x"), "ziphius: port (flag) must be int, not 'x'\n"),
        (("start", "--dtype", "int3"), "dtype (flag) must be one of"),
        (("start", "--prot", "1"), "No such option"),
        (("start", "--name", "../x"), "name must be"),
        (("start", "--gpu", "4xH200"), "--gpu 4xH200 is for --dry-run"),
        (("stop", "--forget", "--all"), "--forget is for one instance"),
        (("stop", "--drain-timeout", "-1"), "--drain-timeout"),
        (("logs", "-n", "-1"), "--lines"),
        (("config", "--config", "/no/such/file"), "cannot read the config file"),
        (("pul",), "No such command"),
        (("serve", "--resolved"), "no configuration on stdin"),
    ],
)
def test_a_wrong_use_exits_2_with_one_reason(run: Run, words: tuple[str, ...], reason: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_verb_without_an_instance_says_what_to_do(run: Run) -> None:
    for verb, reason in (("logs", "never started"), ("chat", "`ziphius start`"), ("restart", "use start")):
        done = run(verb)
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.startswith("ziphius: ")
    assert run("stop").returncode == 0


def test_the_configured_name_is_the_one_asked_for(run: Run, tmp_path: Path) -> None:
    assert run("status", ZIPHIUS_NAME="other").stdout.startswith("other is stopped")
    (tmp_path / "config.toml").write_text('name = "filed"\n')
    assert run("status").stdout.startswith("filed is stopped")
    assert run("status", "--name", "given").stdout.startswith("given is stopped")
    (tmp_path / "config.toml").write_text("nam = 1\n")
    assert "--name" in run("status").stderr
    assert run("status", "--name", "given").returncode == 3
