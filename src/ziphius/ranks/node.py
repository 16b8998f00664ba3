"""serve_node(): the server of a machine other than the first. It has ranks but no HTTP, and ends with node 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from pathlib import Path

import uvloop

from ziphius.checkpoint.checkpoint import Checkpoint, open_configured
from ziphius.config import ServeConfig
from ziphius.errors import StartFailed, ZiphiusError
from ziphius.installation import ziphius_home
from ziphius.planner.admission import admit_model
from ziphius.ranks.failures import Cause, Failure, Failures
from ziphius.ranks.group import RankGroup
from ziphius.ranks.heartbeat import beat_interval
from ziphius.ranks.layout import config_of_node, parse_address, rank_specs
from ziphius.ranks.node_link import NodeBeat, NodeEnd, NodeFailed, NodeLink, NodeRefused, NodeWelcome
from ziphius.ranks.private_folder import private_folder
from ziphius.ranks.progress_log import ProgressLog
from ziphius.ranks.ranks import hello_of
from ziphius.ranks.workers import kill_children

_log = logging.getLogger(__name__)

_RETRY_S = 0.5


def serve_node(config: ServeConfig) -> int:
    """Run this machine's ranks. Returns 0 when this node or node 0 was told to stop, and 1 when node 0 ended otherwise.

    ConfigError or ModelError before anything is started. Call it in the main thread, with logging configured.
    """
    home = ziphius_home(os.environ)
    checkpoint = open_configured(config, home, ProgressLog(), lambda model: admit_model(config, model))
    folder = private_folder()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Node(config, checkpoint, folder).run())
    finally:
        kill_children()
        shutil.rmtree(folder, ignore_errors=True)


class _Node:
    """One run of a node."""

    def __init__(self, config: ServeConfig, checkpoint: Checkpoint, folder: Path) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._folder = folder
        self._failures = Failures()
        self._ended = asyncio.Event()
        self._end_message = ""
        self._group: RankGroup | None = None
        self._silent_s = 0.0

    async def run(self) -> int:
        """The exit code."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number, stopping)
        joining = asyncio.create_task(self._join())
        told_to_stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({joining, told_to_stop}, return_when=asyncio.FIRST_COMPLETED)
        if not joining.done():
            joining.cancel()
            return 0
        try:
            link, welcome = joining.result()
        except ZiphiusError as e:
            _log.error("%s", e.message)
            told_to_stop.cancel()
            return e.exit_code
        return await self._serve(link, welcome, told_to_stop)

    def _on_signal(self, number: int, stopping: asyncio.Event) -> None:
        if not stopping.is_set():
            stopping.set()
            return
        _log.warning("second signal: exiting at once")
        kill_children()
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(128 + number)

    async def _join(self) -> tuple[NodeLink, NodeWelcome]:
        """StartFailed when node 0 does not answer, refuses, or goes away."""
        link = await self._connect()
        link.send(hello_of(self._config, self._checkpoint))
        limit = self._config.start_timeout
        try:
            async with asyncio.timeout(limit):
                while True:
                    message = await link.receive()
                    if isinstance(message, NodeWelcome):
                        return link, message
                    if isinstance(message, NodeRefused):
                        raise StartFailed(f"node 0 refuses this node: {message.message}")
                    if message is None or isinstance(message, NodeEnd):
                        raise StartFailed("node 0 ended before all nodes had joined")
        except TimeoutError:
            raise StartFailed(f"not all nodes had joined node 0 within {limit:g} s") from None

    async def _connect(self) -> NodeLink:
        assert self._config.dist_init_addr is not None
        host, port = parse_address(self._config.dist_init_addr)
        limit = self._config.start_timeout
        _log.info("node %d waits for node 0 at %s", self._config.node_rank, self._config.dist_init_addr)
        try:
            async with asyncio.timeout(limit):
                while True:
                    with contextlib.suppress(OSError):
                        return NodeLink(*await asyncio.open_connection(host, port))
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise StartFailed(f"node 0 was not at {self._config.dist_init_addr} within {limit:g} s") from None

    async def _serve(self, link: NodeLink, welcome: NodeWelcome, told_to_stop: asyncio.Task[object]) -> int:
        config = config_of_node(welcome.config, self._config)
        self._group = RankGroup(config, self._folder, self._failures)
        hearing = asyncio.create_task(self._hear(link))
        beating = asyncio.create_task(self._beat(link, config.rank_timeout))
        failing = asyncio.create_task(self._failures.first())
        ended = asyncio.create_task(self._ended.wait())
        try:
            specs = rank_specs(config, str(self._checkpoint.path), self._folder, welcome.rendezvous)
            await self._group.start(specs)
            _log.info("running rank %s for node 0", ", ".join(str(spec.rank) for spec in specs))
            await asyncio.wait({failing, ended, told_to_stop}, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, ZiphiusError) as e:
            self._failures.report(Failure(Cause.TOLD, f"cannot start the ranks: {e}"))
            await asyncio.wait({failing})
        finally:
            kill_children()
            for task in (hearing, beating, ended):
                task.cancel()
        code = self._tell_end(link, failing, told_to_stop)
        failing.cancel()
        await link.close()
        await self._group.stop()
        return code

    def _tell_end(
        self, link: NodeLink, failing: asyncio.Task[Failure], told_to_stop: asyncio.Task[object]
    ) -> int:  # fmt: skip
        """Tell node 0 and the log why this node ends. Returns the exit code."""
        if self._ended.is_set():
            if not self._end_message:
                _log.info("node 0 has ended")
                return 0
            _log.error("%s", self._end_message)
            return 1
        if told_to_stop.done():
            link.send(NodeFailed(cause=Cause.TOLD, message="it was told to stop"))
            _log.info("stopping")
            return 0
        failure = failing.result()
        _log.error("%s", failure.message)
        link.send(NodeFailed(cause=failure.cause, message=failure.message))
        return 1

    async def _hear(self, link: NodeLink) -> None:
        while (message := await link.receive()) is not None:
            self._silent_s = 0.0
            if isinstance(message, NodeEnd):
                self._end_message = message.message
                self._ended.set()
                return
        self._end_message = "node 0 is gone: it has closed its connection"
        self._ended.set()

    async def _beat(self, link: NodeLink, limit: float) -> None:
        """Tell node 0 that this node and its ranks live, and judge node 0's silence."""
        loop, interval = asyncio.get_running_loop(), beat_interval(limit)
        before = loop.time()
        while True:
            link.send(NodeBeat(beats=self._group.news() if self._group is not None else []))
            await asyncio.sleep(interval)
            now = loop.time()
            self._silent_s += min(now - before, 2 * interval)
            before = now
            if self._silent_s > limit:
                self._end_message = f"node 0 has not answered for {self._silent_s:.0f} s (--rank-timeout {limit:g})"
                self._ended.set()
                return
