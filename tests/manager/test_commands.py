"""The verbs as a person runs them: output, exit status, interrupts; an engine stands in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ziphius.manager import process
from ziphius.manager.instance import State

if TYPE_CHECKING:
    from conftest import Bench

Begin = Callable[..., subprocess.Popen[str]]
CLI = Path(__file__).with_name("stand_in_cli.py")
MODEL = "stand/in"
"""The stand-in server needs no model, but a start refuses a name that can be none."""


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def environment(bench: Bench) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ZIPHIUS_")}
    return {**kept, "ZIPHIUS_HOME": str(bench.home), "ZIPHIUS_DRAIN_TIMEOUT": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def begin(bench: Bench) -> Iterator[Begin]:
    """Starts a command and leaves it to the test; none outlives it."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        argv, pipe = [sys.executable, str(CLI), *words], subprocess.PIPE
        begun.append(subprocess.Popen(argv, env=environment(bench), stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return begun[-1]

    yield begin
    for command in begun:
        command.kill()
        command.communicate()


def run(bench: Bench, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(CLI), *words]
    return subprocess.run(argv, env=environment(bench), input=stdin, capture_output=True, text=True, timeout=120)


def start(bench: Bench, *options: str) -> subprocess.CompletedProcess[str]:
    port = str(bench.resolved().config.port)
    return run(bench, "--", "start", "--model", MODEL, "--port", port, *options)


def test_the_life_of_an_instance(bench: Bench) -> None:
    done = start(bench)
    assert done.returncode == 0, done.stderr
    record = bench.record()
    url = f"http://127.0.0.1:{record.resolved.config.port}"
    for part in (f"default runs at {url}", str(record.pid), "server.log", f"curl {url}/v1/chat/completions"):
        assert part in done.stdout

    again = run(bench, "--", "start", "--model", MODEL, "--port", str(record.resolved.config.port))
    assert (again.returncode, again.stdout.split("\n")[0]) == (0, f"default runs already at {url}")
    other = run(bench, "--", "start", "--model", MODEL, "--port", str(bench.resolved().config.port))
    assert other.returncode == 1
    assert "runs already, with other settings" in other.stderr

    status = run(bench, "--", "status")
    assert status.returncode == 0
    assert "2 running, 1 queued" in status.stdout
    told = json.loads(run(bench, "--", "status", "--json").stdout)
    assert (told["state"], told["pid"], told["model"], told["queued"]) == ("running", record.pid, MODEL, 1)
    assert [each["name"] for each in json.loads(run(bench, "--", "status", "--all", "--json").stdout)] == ["default"]
    assert "default  running" in run(bench, "--", "status", "--all").stdout

    restarted = run(bench, "--", "restart", "--json")
    assert json.loads(restarted.stdout)["port"] == record.resolved.config.port
    assert bench.record().pid != record.pid
    assert len(run(bench, "--", "logs", "-n", "1").stdout.splitlines()) == 1

    stopped = run(bench, "--", "stop")
    assert (stopped.returncode, stopped.stdout.split(" (")[0]) == (0, "default is stopped")
    assert run(bench, "--", "status").returncode == 3
    twice = run(bench, "--", "stop")
    assert (twice.returncode, twice.stdout) == (0, "default was not running\n")
    assert "listening" in run(bench, "--", "logs").stdout


def test_a_failed_start_shows_the_reason_and_the_log(bench: Bench) -> None:
    port = str(bench.resolved().config.port)
    done = run(bench, "--load-seconds", "2", "--crash", "error", "--", "start", "--port", port)
    assert done.returncode == 1
    assert "loading ..." in done.stderr
    assert "  " in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "ziphius: default did not start: the weights are too large: 99 GB needed, 1 GB there"
    )
    assert "listening on port" in done.stderr
    assert run(bench, "--", "status").returncode == 1


def test_a_reason_that_is_all_the_log_says_is_shown_once(bench: Bench) -> None:
    port = str(bench.resolved().config.port)
    done = run(bench, "--crash", "error", "--", "start", "--port", port, "--log-level", "error")
    assert done.returncode == 1
    assert done.stderr.count("the weights are too large") == 1
    assert "Last lines" not in done.stderr
    assert "the weights are too large" in run(bench, "--", "logs").stdout


def test_no_key_is_ever_printed(bench: Bench) -> None:
    done = start(bench, "--api-key", "the-key")
    assert "Bearer $ZIPHIUS_API_KEY" in done.stdout
    seen = [done, *(run(bench, "--", *words) for words in (("status", "--json"), ("logs",), ("stop",)))]
    assert "the-key" not in "".join(each.stdout + each.stderr for each in seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_it_loads_leaves_nothing(bench: Bench, begin: Begin, number: signal.Signals) -> None:
    port = str(bench.resolved().config.port)
    starting = begin("--load-seconds", "60", "--workers", "1", "--", "start", "--port", port)
    wait_for(lambda: bench.instances.names())
    wait_for(lambda: len(bench.pids()) == 2)
    starting.send_signal(number)
    _, stderr = starting.communicate(timeout=60)
    assert starting.returncode == 128 + number
    assert "interrupted" in stderr
    assert bench.pids() == []
    assert bench.manager().status("default").state is State.STOPPED


def test_a_killed_start_leaves_a_server_that_is_known(bench: Bench, begin: Begin) -> None:
    port = str(bench.resolved().config.port)
    starting = begin("--load-seconds", "3", "--", "start", "--port", port)
    # Before it has read its settings it would end with its starter.
    wait_for(lambda: bench.instances.names() and bench.manager().log_tail("default", 1))
    starting.kill()
    starting.communicate(timeout=60)
    assert bench.manager().status("default").state is State.STARTING
    wait_for(lambda: bench.manager().status("default").state is State.RUNNING)
    bench.manager().stop("default", None, lambda _: None)


def test_a_server_whose_starter_died_at_once_ends(bench: Bench) -> None:
    launch = bench.launcher()(bench.resolved(), os.environ)
    child = process.spawn(launch, bench.home.parent / "log", "run")
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=60) != 0


def test_following_a_log_sees_a_restart(bench: Bench, begin: Begin) -> None:
    start(bench)
    following = begin("--", "logs", "-f", "-n", "1")
    assert following.stdout is not None
    assert following.stdout.readline()
    run(bench, "--", "restart")
    assert any("listening" in line for line in following.stdout)
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=60)
    assert following.returncode == 0


def test_chat_in_a_pipe(bench: Bench) -> None:
    hint = run(bench, "--", "chat")
    assert hint.returncode == 1
    assert "`ziphius start`" in hint.stderr
    start(bench, "--api-key", "the-key")
    done = run(bench, "--", "chat", stdin="hello there\n\nhow are you\n")
    assert (done.returncode, done.stdout) == (0, "hello there \nhow are you \n")
    refused = run(bench, "--", "chat", stdin="refuse\n")
    assert refused.returncode == 1
    assert "not that" in refused.stderr


def test_ctrl_c_in_a_chat_stops_the_answer(bench: Bench, begin: Begin) -> None:
    start(bench)
    chat = begin("--", "chat")
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write("endless\n")
    chat.stdin.flush()
    assert chat.stdout.read(20) == "more " * 4
    chat.send_signal(signal.SIGINT)
    chat.stdin.write("go on\n")
    stdout, _ = chat.communicate(timeout=60)
    assert "[stopped]\ngo on" in stdout
    assert chat.returncode == 0
