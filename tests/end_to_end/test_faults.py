"""What ends badly: killed processes, taken ports, models that are not there. The rest must end, and say why."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import psutil
import pytest
from tests.end_to_end.conftest import alive, wait_until
from tests.ports import free_port

from ziphius.config import DEFAULT_MODEL


@pytest.mark.parametrize("which", [0, 1], ids=["server", "engine"])
def test_kill_of_each_process(installation, which: int) -> None:
    server = installation.start("--max-total-tokens", "4096")
    tree = server.tree()
    assert len(tree) == 2
    ended: list[str] = []

    def long_answer() -> None:
        body = {"model": DEFAULT_MODEL, "prompt": "Once", "max_tokens": 3000, "ignore_eos": True}
        try:
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            ended.append(f"HTTP {answer.status_code}")
        except httpx.TransportError as e:
            ended.append(type(e).__name__)

    client = threading.Thread(target=long_answer)
    client.start()
    wait_until(lambda: server.live()["running"] == 1, "the request runs")
    tree[which].send_signal(signal.SIGKILL)
    client.join(60)
    assert ended
    assert ended != ["HTTP 200"]
    wait_until(lambda: not any(alive(process) for process in tree), "everything has ended")
    status = installation.run("status", check=False)
    assert status.returncode == 1, status.stdout
    assert "failed" in status.stdout
    installation.run("start", "--port", str(server.port), "--max-total-tokens", "4096")
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_starts_that_cannot_work(installation, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = installation.run("start", "--port", port, check=False)
        assert refused.returncode == 1
        assert port in refused.stderr
    for model, told in (("no-such-model", "no-such-model"), (str(tmp_path), "config.json")):
        failed = installation.run("start", "--port", str(free_port()), "--model", model, check=False)
        assert failed.returncode == 1
        assert told in failed.stderr
    misspelt = installation.run("start", "--prot", "1", check=False)
    assert misspelt.returncode == 2
    assert "--port" in misspelt.stderr
    huge = ("--context-length", "8192", "--max-total-tokens", "100000000000")
    memory = installation.run("start", "--port", str(free_port()), *huge, check=False)
    assert memory.returncode == 1
    assert "GiB" in memory.stderr
    assert installation.run("status", check=False).returncode in (1, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_loading(installation, number: int) -> None:
    argv = [sys.executable, "-m", "ziphius", "start", "--port", str(free_port())]
    starter = subprocess.Popen(argv, env=installation.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    record = installation.home / "instances" / "default" / "record.json"
    wait_until(record.exists, "the server is on record")
    wait_until(lambda: psutil.Process(starter.pid).children() != [] or starter.poll() is not None, "it is spawned")
    time.sleep(0.5)
    starter.send_signal(number)
    starter.communicate(timeout=60)
    assert starter.returncode == 128 + number
    told = json.loads(installation.run("status", "--json", check=False).stdout)
    assert told["pid"] is None or not psutil.pid_exists(told["pid"])


def test_sigterm_of_the_server_lets_answers_finish(installation) -> None:
    server = installation.start("--drain-timeout", "100")
    answers: list[httpx.Response] = []
    body = {"model": DEFAULT_MODEL, "prompt": "Once", "max_tokens": 300, "ignore_eos": True}
    client = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120))
    )
    client.start()
    wait_until(lambda: server.live()["running"] == 1, "the request runs")
    installation.run("stop")
    client.join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].json()["usage"]["completion_tokens"] == 300
