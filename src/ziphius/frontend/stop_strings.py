"""StopMatcher: finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Scan(NamedTuple):
    """The result for one piece of text."""

    text: str
    """Text that certainly belongs to no stop string."""
    matched: str | None
    """The stop string that was found; nothing may be pushed after it."""


class StopMatcher:
    """Searches a stream of text for the first of several stop strings.

    Text that could still turn out to be the start of a stop string is held back, so that no client
    ever sees a part of one, however the text was cut into pieces.
    """

    __slots__ = ("_held", "_longest", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        """No string in `stops` is empty."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, piece: str) -> Scan:
        """Add text. Of several matches the one that ends first wins, and of those that end together the longest.

        So it does not matter where the text was cut into pieces.
        """
        text = self._held + piece
        start = end = len(text) + 1
        matched = None
        for stop in self._stops:
            at = text.find(stop)
            if at != -1 and (at + len(stop), at) < (end, start):
                start, end, matched = at, at + len(stop), stop
        if matched is not None:
            self._held = ""
            return Scan(text[:start], matched)
        certain = self._certain_length(text)
        self._held = text[certain:]
        return Scan(text[:certain], None)

    def flush(self) -> str:
        """The text that was held back. Call it when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _certain_length(self, text: str) -> int:
        """Where the longest suffix of `text` begins that is also a prefix of a stop string."""
        earliest = len(text)
        floor = max(0, len(text) - self._longest + 1)
        for stop in self._stops:
            at = text.find(stop[0], max(floor, len(text) - len(stop) + 1), earliest)
            while at != -1:
                if stop.startswith(text[at:]):
                    earliest = at
                    break
                at = text.find(stop[0], at + 1, earliest)
        return earliest
