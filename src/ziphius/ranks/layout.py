"""Which ranks run on which machine, and the WorkerSpec of each. It needs no torch."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ziphius.config import ServeConfig
from ziphius.errors import ConfigError
from ziphius.ipc.sockets import socket_address
from ziphius.ranks.spec import WorkerSpec

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class RankLayout:
    """`tp` ranks over `nnodes` machines, the same number on each, in order."""

    tp: int
    nnodes: int
    node_rank: int

    @property
    def per_node(self) -> int:
        return self.tp // self.nnodes

    @property
    def here(self) -> range:
        """The ranks of this machine."""
        first = self.node_rank * self.per_node
        return range(first, first + self.per_node)


def rank_layout(config: ServeConfig) -> RankLayout:
    """The layout that --tp, --nnodes and --node-rank describe. ConfigError when they contradict each other."""
    tp, nnodes, node_rank = config.tp, config.nnodes, config.node_rank
    if tp % nnodes:
        raise ConfigError(
            f"{tp} ranks (--tp) cannot be spread evenly over {nnodes} machines (--nnodes): "
            f"{tp} = {nnodes} x {tp // nnodes} + {tp % nnodes}",
            param="nnodes",
        )
    if node_rank >= nnodes:
        raise ConfigError(
            f"--node-rank {node_rank} is not one of {nnodes} machines: they are 0 to {nnodes - 1} (--nnodes)",
            param="node_rank",
        )
    if nnodes > 1 and config.dist_init_addr is None:
        raise ConfigError("several machines (--nnodes) need --dist-init-addr, machine 0's", param="dist_init_addr")
    if nnodes == 1 and config.dist_init_addr is not None:
        raise ConfigError("--dist-init-addr is for several machines: say how many with --nnodes", param="nnodes")
    return RankLayout(tp, nnodes, node_rank)


def parse_address(text: str) -> tuple[str, int]:
    """`host:port`, `[::1]:port` -> (host, port). ConfigError otherwise."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"dist_init_addr must be HOST:PORT, not {text!r}", param="dist_init_addr")
    return host, int(port)


def rank_specs(
    config: ServeConfig, model_path: str, folder: Path, rendezvous: str = "", store_fd: int = -1
) -> list[WorkerSpec]:
    """The spec of each rank of this machine. `folder` is this server's private folder.

    `rendezvous`: tcp://IP:PORT of rank 0's store, where ranks run on several machines; `store_fd`: the socket that
    listens there, for rank 0 to inherit. On one machine a file in `folder` is enough, so no port is needed.
    """
    layout = rank_layout(config)
    batches = f"ipc://{folder}/batches.sock"
    if rendezvous:
        batches = f"{rendezvous.rpartition(':')[0]}:*"
    return [
        WorkerSpec(
            config=config,
            model_path=model_path,
            address=socket_address(folder),
            rank=rank,
            device_index=index,
            beats=beats_address(folder),
            rendezvous=rendezvous or f"file:{folder}/rendezvous",
            batches=batches,
            store_fd=store_fd if rank == 0 else -1,
        )
        for index, rank in enumerate(layout.here)
    ]


def beats_address(folder: Path) -> str:
    """Where the ranks of this machine send their beats."""
    return f"ipc://{folder}/beats.sock"


def rank_environment(config: ServeConfig, environment: Mapping[str, str]) -> Mapping[str, str]:
    """The variables to add to the environment of ranks that talk to other machines. The caller's own values stay.

    GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME: the network interface that leads to machine 0. gloo would look up the
    host's own name, which fails on many machines. NCCL_NVLS_ENABLE 0, TORCH_SYMM_MEM_DISABLE_MULTICAST 1: no NVLink
    multicast, which needs services on the host that a container cannot count on. torch would set it up for memory that
    ranks share, even when it is not used, and fail where this is impossible (vllm-project/vllm#25937).
    """
    if config.tp == 1:
        return {}
    wanted = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    if config.dist_init_addr is None:
        wanted["GLOO_SOCKET_IFNAME"] = interface_of(_LOOPBACK)
    else:
        own = own_address(*parse_address(config.dist_init_addr))
        wanted["GLOO_SOCKET_IFNAME"] = wanted["NCCL_SOCKET_IFNAME"] = interface_of(own)
    return {name: value for name, value in wanted.items() if value and name not in environment}


def own_address(host: str, port: int) -> str:
    """The IP address from which this machine reaches `host`. ConfigError when there is no route."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing: it only chooses a route
            return str(probe.getsockname()[0])
    except OSError as e:
        raise ConfigError(f"no way to {host} (--dist-init-addr): {e.strerror or e}", param="dist_init_addr") from e


def interface_of(address: str) -> str:
    """The network interface that has `address`; "" when it is not known."""
    interfaces = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    if address.startswith("127."):  # the whole block belongs to the loopback interface, which has one address of it
        return interface_of(_LOOPBACK) if address != _LOOPBACK else ""
    return ""


def config_of_node(config: ServeConfig, own: ServeConfig) -> ServeConfig:
    """Machine 0's `config` for the machine of `own`. That machine keeps its own node rank, paths and cores."""
    return replace(
        config, model=own.model, node_rank=own.node_rank, threads=own.threads, dist_init_addr=own.dist_init_addr
    )
