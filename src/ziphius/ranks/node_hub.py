"""NodeHub: node 0's side of an instance on several machines: it lets the other nodes join, start and end.

It starts no process. What goes wrong with a node goes to the `Failures` it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from ziphius.config import ServeConfig
from ziphius.errors import PortInUse, StartFailed
from ziphius.ipc.messages import Beat
from ziphius.ranks.failures import Cause, Failure, Failures
from ziphius.ranks.heartbeat import beat_interval
from ziphius.ranks.layout import parse_address
from ziphius.ranks.node_link import (
    HELLO_S,
    NodeBeat,
    NodeEnd,
    NodeFailed,
    NodeHello,
    NodeLink,
    NodeRefused,
    NodeWelcome,
    without_secrets,
)

_log = logging.getLogger(__name__)


class NodeHub:
    """Call `open`, `all_joined` and `welcome`, and `close` in the end whatever happened."""

    def __init__(self, config: ServeConfig, own: NodeHello, failures: Failures) -> None:
        """`own`: the other nodes must introduce themselves with the same values, except for their number."""
        self._config = config
        self._own = own
        self._failures = failures
        self._links: dict[int, NodeLink] = {}
        self._silent_s: dict[int, float] = {}
        self._changed = asyncio.Event()
        self._started = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.on_beats: Callable[[list[Beat]], None] = _ignore
        """Called with the beats that the other nodes get from their ranks."""

    async def open(self) -> None:
        """Listen at --dist-init-addr. PortInUse when that cannot be."""
        assert self._config.dist_init_addr is not None
        host, port = parse_address(self._config.dist_init_addr)
        try:
            self._server = await asyncio.start_server(self._serve, host, port)
        except OSError as e:
            raise PortInUse(
                f"node 0 cannot listen on {self._config.dist_init_addr} (--dist-init-addr): {e.strerror or e}",
                param="dist_init_addr",
            ) from e
        self._spawn(self._beat())

    def listen_for_store(self) -> socket.socket:
        """A new socket on a free port of the address where nodes join: for rank 0's store."""
        assert self._server is not None
        address = self._server.sockets[0].getsockname()[0]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family, backlog=128)

    async def all_joined(self, on_join: Callable[[int, int], None]) -> None:
        """Wait for every node. `on_join` is called with (joined, all). StartFailed after --start-timeout."""
        others = self._config.nnodes - 1
        try:
            async with asyncio.timeout(self._config.start_timeout):
                while len(self._links) < others:
                    on_join(len(self._links) + 1, self._config.nnodes)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            missing = ", ".join(str(node) for node in range(1, others + 1) if node not in self._links)
            raise StartFailed(
                f"node {missing} did not join at {self._config.dist_init_addr} within {self._config.start_timeout:g} s"
            ) from None

    def welcome(self, rendezvous: str) -> None:
        """Tell every node to start its ranks. From now on the instance ends when a node goes away."""
        self._started = True
        for link in self._links.values():
            link.send(NodeWelcome(config=without_secrets(self._config), rendezvous=rendezvous))

    async def close(self, message: str) -> None:
        """Tell every node to end. `message`: why, or "" when the user asked for it."""
        for task in self._tasks:
            task.cancel()
        for task in list(self._tasks):
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for link in self._links.values():
            link.send(NodeEnd(message=message))
        await asyncio.gather(*(link.close() for link in self._links.values()))
        if self._server is not None:
            self._server.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._attend(NodeLink(reader, writer)))

    async def _attend(self, link: NodeLink) -> None:
        """Serve one connection until it ends."""
        try:
            async with asyncio.timeout(HELLO_S):
                hello = await link.receive()
        except TimeoutError:
            hello = None
        refusal = self._refusal(hello) if isinstance(hello, NodeHello) else "that is no node of Ziphius"
        if refusal or not isinstance(hello, NodeHello):
            _log.warning("refused a node: %s", refusal)
            link.send(NodeRefused(message=refusal))
            await link.close()
            return
        node = hello.node_rank
        self._links[node], self._silent_s[node] = link, 0.0
        _log.info("node %d has joined", node)
        self._changed.set()
        await self._hear(node, link)

    def _refusal(self, hello: NodeHello) -> str:
        """The reason why that node cannot join, or ""."""
        own = self._own
        for what, theirs, ours in (
            ("Ziphius", hello.version, own.version),
            ("--nnodes", hello.nnodes, own.nnodes),
            ("--tp", hello.tp, own.tp),
        ):
            if theirs != ours:
                return f"node {hello.node_rank} has {what} {theirs}, node 0 has {ours}"
        if hello.model != own.model:
            return f"node {hello.node_rank} has another model than node 0: their configs differ"
        if not 0 < hello.node_rank < own.nnodes:
            return f"--node-rank {hello.node_rank} is not one of 1 to {own.nnodes - 1}"
        if hello.node_rank in self._links:
            return f"node {hello.node_rank} has joined already"
        return ""

    async def _hear(self, node: int, link: NodeLink) -> None:
        while (message := await link.receive()) is not None:
            self._silent_s[node] = 0.0
            if isinstance(message, NodeBeat):
                self.on_beats(message.beats)
            elif isinstance(message, NodeFailed) and self._started:
                self._failures.report(Failure(message.cause, f"node {node}: {message.message}"))
        if self._started:
            self._failures.report(Failure(Cause.GONE, f"node {node} is gone: it has closed its connection"))
        else:
            _log.info("node %d has left; it may join again", node)
            del self._links[node], self._silent_s[node]
            self._changed.set()

    async def _beat(self) -> None:
        """Tell the nodes that this one lives, and judge their silence."""
        loop, limit = asyncio.get_running_loop(), self._config.rank_timeout
        interval, before = beat_interval(limit), loop.time()
        while True:
            await asyncio.sleep(interval)
            now = loop.time()
            waited, before = min(now - before, 2 * interval), now
            for node, link in self._links.items():
                link.send(NodeBeat())
                self._silent_s[node] += waited
                if self._silent_s[node] > limit and self._started:
                    text = f"node {node} has not answered for {self._silent_s[node]:.0f} s (--rank-timeout {limit:g})"
                    self._failures.report(Failure(Cause.SILENT, text))


def _ignore(beats: list[Beat]) -> None:
    """The default: ignore who joins."""
