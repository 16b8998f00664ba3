"""RankGroup: the rank processes of this machine: started, watched by their exits and beats, and ended.

Needs an event loop. Failures go to the `Failures` it is given; their reader decides what happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from ziphius.config import ServeConfig
from ziphius.errors import RankLost
from ziphius.ipc.messages import Beat, RankFailed
from ziphius.ipc.sockets import BeatReceiver
from ziphius.ranks.failures import Cause, Failure, Failures
from ziphius.ranks.heartbeat import beat_interval
from ziphius.ranks.layout import beats_address, rank_environment
from ziphius.ranks.spec import WorkerSpec
from ziphius.ranks.watch import RankWatch
from ziphius.ranks.workers import EngineProcess


class RankGroup:
    """Call `start`, and `stop` in the end whatever happened."""

    def __init__(self, config: ServeConfig, folder: Path, failures: Failures) -> None:
        """`folder`: this server's private folder, for sockets."""
        self._config = config
        self._failures = failures
        self._receiver = BeatReceiver(beats_address(folder))
        self._ranks: dict[int, EngineProcess] = {}
        self._watch: RankWatch | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._ranks.values()]

    def news(self) -> list[Beat]:
        """The last beat of each rank that has beaten since the last call."""
        return [] if self._watch is None else self._watch.news()

    def heard_of(self, beats: Sequence[Beat]) -> None:
        """Take in the news of another machine."""
        if self._watch is not None:
            self._watch.heard_of(beats)

    async def start(self, specs: Sequence[WorkerSpec]) -> None:
        """OSError when a process cannot be started. `stop` then ends those that were started before it."""
        environment = {**os.environ, **rank_environment(self._config, os.environ)}
        for spec in specs:
            self._ranks[spec.rank] = await EngineProcess.spawn(spec, environment)
        names = {rank: self._name(rank, process) for rank, process in self._ranks.items()}
        self._watch = RankWatch(names, self._config.rank_timeout)
        work = [self._hear(self._watch), self._judge(self._watch), *map(self._see_exit, self._ranks)]
        self._tasks = [asyncio.create_task(each) for each in work]

    async def stop(self) -> None:
        """Wait until all have ended. Those that do not end in time lose their stdin, and are killed in the end."""
        await self._cancel()
        await asyncio.gather(*(process.stop() for process in self._ranks.values()))
        self._receiver.close()

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _name(self, rank: int, process: EngineProcess) -> str:
        what = "the engine" if self._config.tp == 1 else f"rank {rank}"
        return f"{what} (process {process.pid})"

    async def _hear(self, watch: RankWatch) -> None:
        while True:
            message = await self._receiver.receive()
            if isinstance(message, RankFailed):
                cause = Cause.LOST if message.error == RankLost.__name__ else Cause.TOLD
                who = f"rank {message.rank}: " if message.rank and cause is Cause.TOLD else ""
                self._failures.report(Failure(cause, who + message.message))
            else:
                watch.heard(message)

    async def _judge(self, watch: RankWatch) -> None:
        loop, interval = asyncio.get_running_loop(), beat_interval(self._config.rank_timeout)
        before = loop.time()
        while True:
            await asyncio.sleep(interval)
            now = loop.time()
            # Time in which this process itself did not run says nothing about the ranks.
            failure = watch.wait(min(now - before, 2 * interval))
            before = now
            if failure is not None:
                self._failures.report(failure)

    async def _see_exit(self, rank: int) -> None:
        process = self._ranks[rank]
        code, how = await process.wait()
        who = "" if self._config.tp == 1 else f"rank {rank}: "
        self._failures.report(Failure(Cause.KILLED if code < 0 else Cause.GONE, who + how))
