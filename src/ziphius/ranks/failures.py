"""Why an instance ends: one failure causes others, and this finds the one to report."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import IntEnum

_SETTLE_S = 1.0
"""A failure that may be only a consequence waits this long for its cause."""


class Cause(IntEnum):
    """The most telling kind first: a later kind may be the consequence of an earlier one."""

    TOLD = 0
    """A rank said what is wrong, and it is not the loss of other ranks."""
    KILLED = 1
    """A rank was ended by a signal."""
    SILENT = 2
    """A rank or a node does not answer."""
    STUCK = 3
    """Every rank answers, but none makes progress."""
    GONE = 4
    """A rank or a node ended without a message."""
    LOST = 5
    """A rank could not reach the others."""


@dataclass(frozen=True, slots=True)
class Failure:
    cause: Cause
    message: str
    """One sentence for the log and for each open request."""


class Failures:
    """Collects what goes wrong with one instance."""

    def __init__(self) -> None:
        self._best: Failure | None = None
        self._some = asyncio.Event()

    def report(self, failure: Failure) -> None:
        """Among failures of one kind the first counts."""
        if self._best is None or failure.cause < self._best.cause:
            self._best = failure
        self._some.set()

    async def first(self) -> Failure:
        """Wait for a failure and return it. Wait a moment longer when it may be a consequence of another one."""
        await self._some.wait()
        assert self._best is not None
        if self._best.cause >= Cause.GONE:
            await asyncio.sleep(_SETTLE_S)
        return self._best
