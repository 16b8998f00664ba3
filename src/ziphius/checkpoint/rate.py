"""RateMeter: how fast bytes come and how long the rest will take, in words."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class RateMeter:
    """Speed over the last `window_s` seconds, so that a slow start or a pause is soon forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window_s: float = 15.0) -> None:
        self._clock = clock
        self._window = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def update(self, done: int) -> None:
        """`done` bytes are there now."""
        now = self._clock()
        if len(self._samples) > 1 and now - self._samples[-2][0] < self._window / 100:
            self._samples.pop()  # a few samples a second are enough
        self._samples.append((now, done))
        # One sample from before the window stays, so that the window is covered
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window:
            self._samples.popleft()

    @property
    def bytes_per_second(self) -> float:
        """0 until two samples differ in time."""
        if len(self._samples) < 2:
            return 0.0
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def words(self, total: int) -> str:
        """Such as `1.9 GB/s, 4 min left`; empty while nothing is known."""
        rate = self.bytes_per_second
        if rate <= 0:
            return ""
        left = total - self._samples[-1][1]
        return f"{size_words(rate)}/s" + (f", {time_words(left / rate)} left" if left > 0 else "")


def size_words(count: float) -> str:
    """Bytes for a person, in powers of ten as disks and hubs tell them: `471.5 GB`."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def time_words(seconds: float) -> str:
    """`8 s`, `4 min`, `2 h 5 min`."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
