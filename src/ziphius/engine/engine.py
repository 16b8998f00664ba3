"""Engine: rank 0's loop between the channel, the scheduler and the runner."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ziphius.engine.channel import Channel
from ziphius.errors import EngineFailed, RankLost
from ziphius.ipc.messages import (
    AbortRequest,
    AddRequest,
    FlushCache,
    FlushResult,
    RequestOutput,
    ScheduledBatch,
    Shutdown,
    StepOutput,
    ToEngine,
)
from ziphius.scheduler.scheduler import Scheduler, StepResult

_log = logging.getLogger(__name__)

_STATS_INTERVAL_S = 0.25
_STUCK_WAIT_S = 0.02
"""Pause when there is work but nothing can be scheduled. A message may change that."""


class Step(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait for the result and return it. Raises what the step raised."""


class Runner(Protocol):
    """Runs steps in the order they are given (ModelRunner)."""

    def run(self, batch: ScheduledBatch) -> Step: ...


@dataclass(slots=True)
class _InFlight:
    batch: ScheduledBatch
    step: Step


def no_ranks(batch: ScheduledBatch) -> None:
    """The broadcast of a single rank, which has nobody to send to."""


class Engine:
    """Takes messages, runs steps and sends outputs. For one thread.

    With `overlap`, step n + 1 is scheduled and launched before the result of step n is read, so that a GPU has work
    while the host reads and schedules. `broadcast` gets each batch before it runs, for the ranks > 0; when
    there are any (`alone` False), a step that fails ends the engine, because they are in the middle of that step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        channel: Channel,
        *,
        overlap: bool = False,
        broadcast: Callable[[ScheduledBatch], None] = no_ranks,
        alone: bool = True,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._channel = channel
        self._broadcast = broadcast
        self._alone = alone
        self._depth = 1 if overlap else 0
        self._in_flight: deque[_InFlight] = deque()
        self._failures = 0
        self._stopping = False
        self._stuck = False
        self._stats_due = 0.0
        self._told_idle = False

    @property
    def idle(self) -> bool:
        """Whether nothing will happen until a message comes."""
        return not self._scheduler.has_work

    def run(self) -> None:
        """Run until Shutdown. EngineFailed when steps keep failing, after the last one's requests were answered."""
        while not self._stopping:
            self.turn(wait=True)
        self._abort_all()

    def turn(self, wait: bool = False) -> None:
        """Read the messages that have arrived, then do one step. With `wait`, an idle engine waits for a message."""
        for message in self._channel.receive(self._patience() if wait else 0):
            self._handle(message)
        self._send(self._scheduler.take_outputs())
        if self._stopping:
            return
        batch = self._scheduler.schedule()
        self._stuck = batch is None and not self._in_flight
        if batch is not None:
            self._launch(batch)
        while len(self._in_flight) > (self._depth if batch is not None else 0):
            self._finish_step()
        self._send_stats()

    def _patience(self) -> float | None:
        if self.idle:
            return None
        return _STUCK_WAIT_S if self._stuck else 0

    def _handle(self, message: ToEngine) -> None:
        self._told_idle = False  # The message may change the gauges without a step.
        if isinstance(message, AddRequest):
            self._scheduler.add(message)
        elif isinstance(message, AbortRequest):
            self._scheduler.abort(message.rid)
        elif isinstance(message, FlushCache):
            flushed = self._scheduler.flush_cache()
            self._channel.send(FlushResult(flushed=flushed, reason=None if flushed else "requests are running"))
        elif isinstance(message, Shutdown):
            self._stopping = True

    def _launch(self, batch: ScheduledBatch) -> None:
        try:
            self._broadcast(batch)
            step = self._runner.run(batch)
        except RankLost:
            raise
        except Exception as error:  # noqa: BLE001 - becomes each request's `error`, or an EngineFailed
            _log.exception("step %d failed", batch.step)
            # Steps end in order, and the one before may have succeeded.
            while self._in_flight:
                self._finish_step()
            self._fail(batch, error)
        else:
            self._in_flight.append(_InFlight(batch, step))

    def _finish_step(self) -> None:
        flight = self._in_flight.popleft()
        try:
            result = flight.step.result()
        except RankLost:
            raise  # the frontend knows which rank is gone, and answers the requests
        except Exception as error:  # noqa: BLE001 - becomes each request's `error`, or an EngineFailed
            _log.exception("step %d failed", flight.batch.step)
            self._fail(flight.batch, error)
        else:
            self._failures = 0
            self._send(self._scheduler.update(flight.batch, result))

    def _fail(self, batch: ScheduledBatch, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        if not self._alone:
            raise EngineFailed(f"step {batch.step} failed on rank 0 with {reason}") from error
        self._send(self._scheduler.fail(batch, f"the engine failed on this request ({reason})"))
        self._failures += 1
        if isinstance(error, torch.AcceleratorError):
            raise EngineFailed(f"the device failed in step {batch.step} ({reason})") from error
        if self._failures > 1:
            raise EngineFailed(f"two steps in a row failed, the last one, {batch.step}, with {reason}") from error

    def _abort_all(self) -> None:
        self._scheduler.abort_all("the server is shutting down")
        self._send(self._scheduler.take_outputs())
        while self._in_flight:
            self._finish_step()

    def _send(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._channel.send(StepOutput(outputs=outputs))

    def _send_stats(self) -> None:
        idle, now = self.idle, time.monotonic()
        if (idle and not self._told_idle) or (not idle and now >= self._stats_due):
            self._channel.send(self._scheduler.stats())
            self._stats_due = now + _STATS_INTERVAL_S
        self._told_idle = idle
