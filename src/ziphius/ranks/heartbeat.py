"""Heartbeat: a rank's thread that tells the frontend that the rank lives, and its last message.

It is a separate thread, so that a rank still answers while it computes, loads or waits for others. A stopped process
never answers: this is how the frontend tells it from the ranks that wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ziphius.errors import ZiphiusError
from ziphius.ipc.messages import Beat, RankFailed
from ziphius.ipc.sockets import BeatSender

STARTING = "starting"
"""A rank's phase until torch is imported."""
SERVING = "serving"
"""A rank's phase once it is loaded."""


def beat_interval(rank_timeout_s: float) -> float:
    """Seconds between beats. Several must be missing before a rank counts as hung."""
    return min(1.0, rank_timeout_s / 5)


class Heartbeat:
    """Sends beats from `start` to `stop`. The rank's main thread sets what they say."""

    def __init__(self, address: str, rank: int, interval_s: float) -> None:
        self._rank = rank
        self._interval_s = interval_s
        self._sender = BeatSender(address)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.phase = STARTING
        self.busy: Callable[[], bool] = _no
        """Whether a step has not ended yet. The heartbeat's thread calls it."""
        self.collectives: Callable[[], int] = int
        """How many collectives the rank has entered."""

    def start(self) -> None:
        self._thread.start()

    def fail(self, error: ZiphiusError) -> None:
        """Send the rank's last message."""
        self._sender.send(RankFailed(rank=self._rank, error=type(error).__name__, message=error.message))

    def stop(self) -> None:
        """End the thread. What was sent before still arrives."""
        self._stopping.set()
        self._thread.join()
        self._sender.close()

    def _run(self) -> None:
        while True:
            self._sender.send(Beat(rank=self._rank, phase=self.phase, busy=self.busy(), collectives=self.collectives()))
            if self._stopping.wait(self._interval_s):
                return


def _no() -> bool:
    return False
