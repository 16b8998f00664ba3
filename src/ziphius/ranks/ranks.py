"""Ranks: all of an instance's ranks, here and on other machines, as node 0's server sees them; it serves no request."""

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
    """Use as: `start`, `failure`; `stop` whatever happened between."""

    def __init__(self, config: ServeConfig, folder: Path, on_progress: Callable[[LoadProgress], None]) -> None:
        """`folder`: this server's own, for sockets."""
        self._config = config
        self._folder = folder
        self._on_progress = on_progress
        self._failures = Failures()
        self._group = RankGroup(config, folder, self._failures)
        self._hub: NodeHub | None = None

    @property
    def pids(self) -> list[int]:
        """Of the ranks on this machine, in order."""
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
        """Why the ranks cannot go on; waits until they cannot."""
        return await self._failures.first()

    async def stop(self, message: str) -> None:
        """See every rank end, here and on the other nodes; `message`: why, "" when it was asked for."""
        if self._hub is not None:
            await self._hub.close(message)
        await self._group.stop()

    def _tell_joined(self, joined: int, nodes: int) -> None:
        detail = f"{joined} of {nodes} nodes, at {self._config.dist_init_addr}"
        self._on_progress(LoadProgress(phase="waiting", done=joined, total=nodes, unit="nodes", detail=detail))


def hello_of(config: ServeConfig, checkpoint: Checkpoint) -> NodeHello:
    """What a node says of itself."""
    return NodeHello(
        node_rank=config.node_rank,
        nnodes=config.nnodes,
        tp=config.tp,
        version=package_version(),
        model=model_digest(checkpoint.config),
    )
