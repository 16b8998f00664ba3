"""The engine's channel: to the frontend, or queues in the same process."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from ziphius.ipc.messages import FromEngine, ToEngine


class Channel(Protocol):
    """rank 0's end. `ziphius.ipc.sockets.EngineChannel` between processes."""

    def send(self, message: FromEngine) -> None: ...

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        """All messages that have arrived. Waits up to `timeout_s` for the first one (None: for ever, 0: not at all)."""


class MemoryChannel:
    """Both ends in one thread, so it never waits."""

    def __init__(self) -> None:
        self.to_engine: deque[ToEngine] = deque()
        self.from_engine: deque[FromEngine] = deque()

    def send(self, message: FromEngine) -> None:
        self.from_engine.append(message)

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        messages = list(self.to_engine)
        self.to_engine.clear()
        return messages
