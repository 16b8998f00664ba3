"""Follower: the loop of a rank > 0, which runs every batch of rank 0 in order."""

from __future__ import annotations

from collections.abc import Callable

from ziphius.engine.engine import Runner, Step
from ziphius.ipc.messages import ScheduledBatch, Shutdown


class Follower:
    """`receive` waits for rank 0's next message and returns it."""

    def __init__(self, runner: Runner, receive: Callable[[], ScheduledBatch | Shutdown]) -> None:
        self._runner = runner
        self._receive = receive
        self.busy = False
        """Whether a batch was received whose step this rank has not launched."""

    def run(self) -> None:
        """Run until Shutdown. Raises what a step raised, because this rank has then lost the others."""
        launched: Step | None = None
        while isinstance(batch := self._receive(), ScheduledBatch):
            self.busy = True
            step = self._runner.run(batch)
            if launched is not None:
                launched.result()
            launched = step
            self.busy = False
        if launched is not None:
            launched.result()
