"""Why an instance ends: one cause brings others about, and this finds the one to tell; it watches nothing itself."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import IntEnum

_SETTLE_S = 1.0
"""How long what may be a mere consequence waits for its cause."""


class Cause(IntEnum):
    """The most telling first: what comes later may follow from what comes before."""

    TOLD = 0
    """A rank said what is wrong, and it is not that others are gone."""
    KILLED = 1
    """A rank was ended by a signal."""
    SILENT = 2
    """A rank or a node does not answer."""
    STUCK = 3
    """Every rank answers, and none gets on."""
    GONE = 4
    """A rank or a node ended without a word."""
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
        """Of equally telling ones the first counts."""
        if self._best is None or failure.cause < self._best.cause:
            self._best = failure
        self._some.set()

    async def first(self) -> Failure:
        """The failure to tell; waits until there is one, and a moment more where that may be a consequence."""
        await self._some.wait()
        assert self._best is not None
        if self._best.cause >= Cause.GONE:
            await asyncio.sleep(_SETTLE_S)
        return self._best
