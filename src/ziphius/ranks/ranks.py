"""Ranks: all of an instance's ranks, here and on other machines, as node 0's server sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ziphius.checkpoint.checkpoint import Checkpoint
from ziphius.config import ServeConfig
from ziphius.installation import package_version
from ziphius.ipc.messages import LoadProgress
from ziphius.ranks.failures import Failure, Failures
from ziphius.ranks.group import RankGroup
from ziphius.ranks.layout import rank_specs
from ziphius.ranks.node_hub import NodeHub
from ziphius.ranks.node_link import NodeHello, model_digest


class Ranks:
    """Call `start` and `failure`, and `stop` in the end whatever happened."""

    def __init__(self, config: ServeConfig, folder: Path, on_progress: Callable[[LoadProgress], None]) -> None:
        """`folder`: this server's private folder, for sockets."""
        self._config = config
        self._folder = folder
        self._on_progress = on_progress
        self._failures = Failures()
        self._group = RankGroup(config, folder, self._failures)
        self._hub: NodeHub | None = None

    @property
    def pids(self) -> list[int]:
        """One for each rank on this machine, in order."""
        return self._group.pids

    async def start(self, checkpoint: Checkpoint) -> None:
        """Start the ranks here, after the other nodes have joined and together with theirs.

        PortInUse, StartFailed when the nodes do not come together; OSError when a process cannot be started.
        """
        path = str(checkpoint.path)
        if self._config.nnodes == 1:
            await self._group.start(rank_specs(self._config, path, self._folder))
            return
        self._hub = NodeHub(self._config, hello_of(self._config, checkpoint), self._failures)
        self._hub.on_beats = self._group.heard_of
        await self._hub.open()
        await self._hub.all_joined(self._tell_joined)
        with self._hub.listen_for_store() as listener:
            address, port = listener.getsockname()[:2]
            rendezvous = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
            specs = rank_specs(self._config, path, self._folder, rendezvous, listener.fileno())
            await self._group.start(specs)
        self._hub.welcome(rendezvous)

    async def failure(self) -> Failure:
        """Wait until the ranks cannot go on, and return why."""
        return await self._failures.first()

    async def stop(self, message: str) -> None:
        """End every rank, here and on the other nodes. `message`: why, or "" when the user asked for it."""
        if self._hub is not None:
            await self._hub.close(message)
        await self._group.stop()

    def _tell_joined(self, joined: int, nodes: int) -> None:
        detail = f"{joined} of {nodes} nodes, at {self._config.dist_init_addr}"
        self._on_progress(LoadProgress(phase="waiting", done=joined, total=nodes, unit="nodes", detail=detail))


def hello_of(config: ServeConfig, checkpoint: Checkpoint) -> NodeHello:
    """How a node introduces itself."""
    return NodeHello(
        node_rank=config.node_rank,
        nnodes=config.nnodes,
        tp=config.tp,
        version=package_version(),
        model=model_digest(checkpoint.config),
    )
