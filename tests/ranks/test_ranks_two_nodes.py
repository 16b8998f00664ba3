"""Ranks on two machines: two network namespaces with a cable between them where they can be made, else loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from real_server import Client, RealServer, ServeProcess
from tests.ports import free_port
from tiny_llama import write_tiny_llama

TIMEOUTS = ("--rank-timeout", "6")


@dataclass(frozen=True)
class Network:
    address: str
    """Of node 0."""
    prefix: Sequence[str]
    """Runs a command on node 1."""


@dataclass
class Nodes:
    """Makes node 0 and node 1 of one instance."""

    model: Path
    folder: Path
    network: Network
    made: list[ServeProcess]

    def __post_init__(self) -> None:
        self.where = ("--nnodes", "2", "--dist-init-addr", f"{self.network.address}:{free_port()}", *TIMEOUTS)

    def node_0(self, *options: str) -> RealServer:
        server = RealServer(self.model, self._own(), "--tp", "2", *self.where, *options)
        self.made.append(server)
        return server

    def node_1(self, *options: str) -> ServeProcess:
        settings = ("--tp", "2", *self.where, "--node-rank", "1", *options)
        process = ServeProcess(self.model, self._own(), *settings, prefix=self.network.prefix)
        self.made.append(process)
        return process

    def _own(self) -> Path:
        own = self.folder / str(len(self.made))
        own.mkdir()
        return own


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    name, number = f"z{os.getpid()}", os.getpid() % 250
    own, other = f"10.231.{number}.1", f"10.231.{number}.2"
    made = shutil.which("ip") is not None and ip("netns", "add", name)
    try:
        cable = (
            made
            and ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
            and ip("address", "add", f"{own}/30", "dev", f"{name}a")
            and ip("link", "set", f"{name}a", "up")
            and ip("-n", name, "address", "add", f"{other}/30", "dev", f"{name}b")
            and ip("-n", name, "link", "set", f"{name}b", "up")
            and ip("-n", name, "link", "set", "lo", "up")
        )
        yield Network(own, ("ip", "netns", "exec", name)) if cable else Network("127.0.0.2", ())
    finally:
        if made:
            ip("netns", "delete", name)  # the cable goes with it


@pytest.fixture
def nodes(network: Network, tmp_path: Path) -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="zn-") as folder:  # not tmp_path: a Unix socket's path must be short
        made: list[ServeProcess] = []
        yield Nodes(write_tiny_llama(tmp_path / "tiny"), Path(folder), network, made)
        for each in made:
            each.close()


def ended(*processes: ServeProcess) -> list[int]:
    codes = [process.ended() for process in processes]
    assert [left for process in processes for left in process.leftovers()] == []
    return codes


def worker_of(process: ServeProcess) -> psutil.Process:
    (worker,) = [c for c in psutil.Process(process.process.pid).children(recursive=True) if "worker" in c.cmdline()[-1]]
    return worker


def test_a_rank_on_the_other_node_that_stops_ends_both(nodes: Nodes) -> None:
    alone = RealServer(nodes.model, nodes._own(), "--tp", "1")
    nodes.made.append(alone)
    node_0, node_1 = nodes.node_0(), nodes.node_1()
    node_0.until_ready()
    node_1.remember()
    alone.until_ready()
    assert node_0.ids() == alone.ids()
    client = Client(node_0)
    node_0.until(lambda: node_0.http.get("/status").json()["running"] == 1)
    worker = worker_of(node_1)
    worker.suspend()
    assert ended(node_0, node_1) == [1, 1]
    client.join(60)
    assert client.status == 500
    reason = f"rank 1 (process {worker.pid}) has not answered for"
    assert f"node 1: {reason}" in client.text
    assert f"node 1: {reason}" in node_0.log
    assert reason in node_1.log


@pytest.mark.parametrize("how", ["asked to stop", "killed"])
def test_nodes_end_together(nodes: Nodes, how: str) -> None:
    node_1, node_0 = nodes.node_1(), nodes.node_0()
    node_0.until_ready()
    node_1.remember()
    assert len(node_0.ids()) == 16
    if how == "killed":
        node_1.process.kill()
        assert node_0.ended() == 1
        assert "node 1 is gone" in node_0.log
        assert node_0.leftovers() == []
        return
    node_0.process.send_signal(signal.SIGTERM)
    assert ended(node_0, node_1) == [0, 0], node_1.log
    assert "error" not in node_0.log + node_1.log


def test_waiting_ends_when_nobody_comes(nodes: Nodes) -> None:
    node_1 = nodes.node_1("--start-timeout", "1")
    assert ended(node_1) == [1]
    assert "node 0 was not at" in node_1.log
    node_0 = nodes.node_0("--start-timeout", "2")
    assert ended(node_0) == [1]
    assert "node 1 did not join" in node_0.log


def test_a_node_that_does_not_fit_is_told_so_and_another_may_come(nodes: Nodes, tmp_path: Path) -> None:
    node_0 = nodes.node_0()
    node_0.until(lambda: node_0.http.get("/health").json()["phase"] == "waiting")
    other = write_tiny_llama(tmp_path / "other", layers=1)
    wrong_model = ServeProcess(
        other, nodes._own(), "--tp", "2", *nodes.where, "--node-rank", "1", prefix=nodes.network.prefix
    )  # fmt: skip
    nodes.made.append(wrong_model)
    assert ended(wrong_model) == [1]
    assert "node 1 has another model than node 0" in wrong_model.log
    leaver = nodes.node_1()
    node_0.until(lambda: "node 1 has joined" in node_0.log or "starting" in node_0.log)
    assert node_0.process.poll() is None
    leaver.process.send_signal(signal.SIGTERM)
    assert leaver.ended() == 0
