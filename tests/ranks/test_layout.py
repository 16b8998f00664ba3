"""Which ranks run where, and what each is told; refusals of options that contradict one another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ziphius.config import ServeConfig
from ziphius.engine.team import parse_rendezvous
from ziphius.errors import ConfigError
from ziphius.ranks.layout import (
    config_of_node,
    interface_of,
    own_address,
    parse_address,
    rank_environment,
    rank_layout,
    rank_specs,
)
from ziphius.ranks.spec import cpu_threads

FOLDER = Path("/run/z")


def test_ranks_of_one_machine() -> None:
    specs = rank_specs(ServeConfig(tp=2), "/m", FOLDER)
    assert [(s.rank, s.device_index, s.store_fd) for s in specs] == [(0, 0, -1), (1, 1, -1)]
    assert {s.rendezvous for s in specs} == {"file:/run/z/rendezvous"}
    assert {s.batches for s in specs} == {"ipc:///run/z/batches.sock"}


def test_ranks_over_two_machines() -> None:
    config = ServeConfig(tp=4, nnodes=2, node_rank=1, dist_init_addr="10.0.0.1:5000")
    assert list(rank_layout(config).here) == [2, 3]
    specs = rank_specs(config, "/m", FOLDER, "tcp://10.0.0.1:41000", store_fd=9)
    assert [(s.rank, s.device_index, s.store_fd) for s in specs] == [(2, 0, -1), (3, 1, -1)]
    own = rank_specs(ServeConfig(tp=4, nnodes=2, dist_init_addr="h:1"), "/m", FOLDER, "tcp://10.0.0.1:41000", 9)
    assert [(s.rank, s.store_fd) for s in own] == [(0, 9), (1, -1)]
    assert own[0].batches == "tcp://10.0.0.1:*"


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tp": 3, "nnodes": 2, "dist_init_addr": "h:1"}, "nnodes", "3 = 2 x 1 + 1"),
        ({"tp": 1, "nnodes": 2, "dist_init_addr": "h:1"}, "nnodes", "1 = 2 x 0 + 1"),
        ({"tp": 2, "nnodes": 2, "node_rank": 2, "dist_init_addr": "h:1"}, "node_rank", "0 to 1"),
        ({"tp": 2, "node_rank": 1}, "node_rank", "--nnodes"),
        ({"tp": 2, "nnodes": 2}, "dist_init_addr", "--dist-init-addr"),
        ({"tp": 2, "dist_init_addr": "h:1"}, "nnodes", "--nnodes"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_layout(ServeConfig(**options))
    assert caught.value.param == param
    assert words in caught.value.message


def test_addresses() -> None:
    assert parse_address("node-0.example:5000") == ("node-0.example", 5000)
    assert parse_address("[fd00::1]:5000") == ("fd00::1", 5000)
    for wrong in ("node-0", ":5000", "h:", "h:0", "h:65536", "h:x", ""):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            parse_address(wrong)
    assert own_address("127.0.0.2", 1) in ("127.0.0.1", "127.0.0.2")
    assert interface_of("127.0.0.1").startswith("lo")
    assert interface_of("127.0.0.2") == interface_of("127.0.0.1")
    assert interface_of("203.0.113.77") == ""


def test_rendezvous() -> None:
    assert parse_rendezvous("file:/run/z/r", -1).path == "/run/z/r"
    where = parse_rendezvous("tcp://[::1]:99", 5)
    assert (where.host, where.port, where.listening_fd) == ("::1", 99, 5)
    for wrong in ("", "tcp://h", "udp://h:1"):
        with pytest.raises(ConfigError):
            parse_rendezvous(wrong, -1)


def test_the_environment_keeps_what_the_user_has_set() -> None:
    assert rank_environment(ServeConfig(), {}) == {}
    added = rank_environment(ServeConfig(tp=2), {})
    no_multicast = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    assert added == {"GLOO_SOCKET_IFNAME": interface_of("127.0.0.1"), **no_multicast}
    assert rank_environment(ServeConfig(tp=2), {**dict.fromkeys(no_multicast, "x"), "GLOO_SOCKET_IFNAME": "eth9"}) == {}
    config = ServeConfig(tp=2, nnodes=2, dist_init_addr="127.0.0.1:5000")
    assert rank_environment(config, {})["NCCL_SOCKET_IFNAME"] == interface_of("127.0.0.1")


def test_ranks_share_the_cores_of_their_machine() -> None:
    assert cpu_threads(ServeConfig(threads=8, tp=4)) == 2
    assert cpu_threads(ServeConfig(threads=1, tp=4)) == 1
    assert cpu_threads(ServeConfig(threads=8, tp=4, nnodes=2, dist_init_addr="h:1")) == 4


def test_a_node_takes_node_0s_settings_but_its_own_place() -> None:
    node_0 = ServeConfig(model="/a", tp=2, nnodes=2, dist_init_addr="h:1", page_size=4, dtype="float32", threads=3)
    own = ServeConfig(model="/b", tp=2, nnodes=2, dist_init_addr="10.0.0.1:1", node_rank=1, threads=7)
    config = config_of_node(node_0, own)
    assert (config.page_size, config.dtype) == (4, "float32")
    assert (config.model, config.node_rank, config.threads) == ("/b", 1, 7)
    assert config.dist_init_addr == "10.0.0.1:1"


def test_the_frontend_can_import_it_without_torch() -> None:
    code = "import sys, ziphius.ranks.layout, ziphius.ranks.heartbeat; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
