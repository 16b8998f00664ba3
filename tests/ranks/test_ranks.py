"""Servers with two ranks each, as real processes: side by side, a killed rank, stopped ranks, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_server import Client, RealServer
from tiny_llama import write_tiny_llama

TIMEOUT = ("--rank-timeout", "6")
Start = Callable[..., RealServer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    servers: list[RealServer] = []
    with tempfile.TemporaryDirectory(prefix="zs-") as folder:  # not tmp_path: a Unix socket's path must be short

        def begin(*options: str) -> RealServer:
            own = Path(folder, str(len(servers)))
            own.mkdir()
            servers.append(RealServer(model, own, *TIMEOUT, *options))
            return servers[-1]

        yield begin
        for server in servers:
            server.close()


def test_two_servers_side_by_side_a_killed_rank_and_an_idle_one_that_stops(start: Start) -> None:
    first, second = start("--tp", "2"), start("--tp", "2")
    for server in (first, second):
        server.until_ready()
        assert len(server.rank_pids) == 2
    assert first.ids() == second.ids()
    clients = [Client(first, stream) for stream in (False, True)]
    first.until(lambda: first.http.get("/status").json()["running"] == 2)
    assert clients[1].begun.wait(60)  # an error before its first token would be its status
    killed = first.rank_pids[1]
    os.kill(killed, signal.SIGKILL)
    assert first.ended() == 1
    reason = f"rank 1: the engine process {killed} was ended by SIGKILL"
    for client in clients:
        client.join(60)
        assert reason in client.text
    assert sorted(client.status for client in clients) == [200, 500]
    assert reason in first.log
    assert first.leftovers() == []

    assert second.generate().status_code == 200
    stopped = second.rank_pids[1]
    os.kill(stopped, signal.SIGSTOP)
    assert second.ended() == 1
    assert f"rank 1 (process {stopped}) has not answered for" in second.log
    assert second.leftovers() == []


def test_rank_0_stopped_in_the_middle_of_an_answer(start: Start) -> None:
    server = start("--tp", "2")
    server.until_ready()
    client = Client(server)
    server.until(lambda: server.http.get("/status").json()["running"] == 1)
    stopped = server.rank_pids[0]
    os.kill(stopped, signal.SIGSTOP)
    assert server.ended() == 1
    client.join(60)
    assert client.status == 500
    assert f"rank 0 (process {stopped}) has not answered for" in client.text
    assert server.leftovers() == []


def test_a_short_stop_is_survived_and_an_orderly_end_leaves_nothing(start: Start) -> None:
    server = start("--tp", "2")
    server.until_ready()
    expected = server.ids()
    pid = server.rank_pids[1]
    os.kill(pid, signal.SIGSTOP)
    client = Client(server, tokens=400)
    time.sleep(1)
    os.kill(pid, signal.SIGCONT)
    assert server.ids() == expected
    server.process.send_signal(signal.SIGTERM)
    client.join(60)
    assert client.status == 200
    assert server.ended() == 0, server.log
    assert "error" not in server.log
    assert server.leftovers() == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--tp", "4"), 2, ("vocabulary 258 = 4 x 64 + 2",)),
        (("--tp", "3"), 2, ("heads 4 = 3 x 1 + 1", "Nearest sizes that can: 2")),
        (("--tp", "5"), 2, ("vocabulary 258 = 5 x 51 + 3", "heads 4 = 5 x 0 + 4", "dense width 48 = 5 x 9 + 3")),
        (("--tp", "2", "--nnodes", "2"), 2, ("--dist-init-addr",)),
        (("--tp", "3", "--nnodes", "2", "--dist-init-addr", "127.0.0.1:1"), 2, ("3 = 2 x 1 + 1",)),
        (("--tp", "0"), 2, ("at least 1",)),
        (("--deterministic",), 2, ("deterministic is for a GPU",)),
        (("--image", "x.sif"), 2, ("--image is for --engine sglang",)),
    ],
)
def test_what_cannot_be_is_refused_before_any_rank_starts(
    start: Start, options: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    server = start(*options)
    assert server.ended() == code
    for word in words:
        assert word in server.log
    assert "importing torch" not in server.log
    assert server.leftovers() == []


def test_start_is_for_node_0(model: Path, tmp_path: Path) -> None:
    options = ["--tp", "2", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "127.0.0.1:1"]
    done = subprocess.run(
        [sys.executable, "-m", "ziphius", "start", "--model", str(model), *options],
        env={**os.environ, "ZIPHIUS_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "ziphius serve --node-rank 1" in done.stderr
