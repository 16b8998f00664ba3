"""RankWatch: it finds the rank that hangs from the beats and the time between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ziphius.ipc.messages import Beat
from ziphius.ranks.failures import Cause, Failure
from ziphius.ranks.heartbeat import SERVING, STARTING, beat_interval

_STARTING_S = 60.0
"""The import of torch blocks the interpreter, and so the heartbeat, for seconds; on a slow disk for longer."""


class RankWatch:
    """Judges whether this machine's ranks are silent, and whether all ranks together make progress.

    A stopped process is silent. A rank that waits for a stopped one in a collective still beats, so it is not blamed.
    When every rank beats but none makes progress, the rank that has entered the fewest collectives is behind.
    """

    def __init__(self, names: Mapping[int, str], timeout_s: float) -> None:
        """`names`: the name of each of this machine's ranks."""
        self._names = names
        self._timeout_s = timeout_s
        self._silent_s = dict.fromkeys(names, 0.0)
        """Seconds without a beat of every known rank, also of those on other machines."""
        self._still_s = 0.0
        self._beats: dict[int, Beat] = {}
        self._untold: dict[int, Beat] = {}

    def news(self) -> list[Beat]:
        """The last beat of each of this machine's ranks since the last call. A silent rank has none."""
        news = list(self._untold.values())
        self._untold.clear()
        return news

    def heard(self, beat: Beat) -> None:
        """Take in a beat of one of this machine's ranks."""
        if beat.rank in self._names:
            self._untold[beat.rank] = beat
            self._take(beat)

    def heard_of(self, beats: Iterable[Beat]) -> None:
        """Take in another machine's `news`. That machine itself judges whether its ranks are silent."""
        for beat in beats:
            if beat.rank not in self._names:
                self._take(beat)

    def wait(self, seconds: float) -> Failure | None:
        """Judge after `seconds` have passed and all messages were read. Returns what is wrong, if anything."""
        for rank in self._silent_s:
            self._silent_s[rank] += seconds
        return self._silence() or self._standstill(seconds)

    def _take(self, beat: Beat) -> None:
        self._silent_s[beat.rank] = 0.0
        last = self._beats.get(beat.rank)
        if last is None or (last.collectives, last.busy) != (beat.collectives, beat.busy):
            self._still_s = 0.0
        self._beats[beat.rank] = beat

    def _silence(self) -> Failure | None:
        silent = [rank for rank in self._names if self._silent_s[rank] > self._patience(rank)]
        if not silent:
            return None
        who = " and ".join(self._names[rank] for rank in silent)
        one = len(silent) == 1
        why = f"it is stopped or hung (while {self._phase(silent[0])})" if one else "they are stopped or hung"
        return Failure(
            Cause.SILENT,
            f"{who} {'has' if one else 'have'} not answered for {self._silent_s[silent[0]]:.0f} s "
            f"(--rank-timeout {self._timeout_s:g}): {why}",
        )

    def _standstill(self, seconds: float) -> Failure | None:
        beats = self._beats.values()
        if len(beats) < 2 or not any(b.busy for b in beats) or any(b.phase != SERVING for b in beats):
            self._still_s = 0.0
            return None
        self._still_s += seconds
        # A silent rank blocks the others, and the judgement of its silence says more.
        if self._still_s <= self._timeout_s or max(self._silent_s.values()) > 2 * beat_interval(self._timeout_s):
            return None
        entered = {beat.rank: beat.collectives for beat in beats}
        least, most = min(entered.values()), max(entered.values())
        behind = ", ".join(self._names.get(rank, f"rank {rank}") for rank, count in entered.items() if count == least)
        why = f"{behind} is behind the others, at collective {least} of {most}"
        if least == most:
            why = f"all of them are at collective {most}, so the connection between them may be broken"
        return Failure(Cause.STUCK, f"the ranks have not got on for {self._still_s:.0f} s (--rank-timeout): {why}")

    def _patience(self, rank: int) -> float:
        starting = self._phase(rank) == STARTING
        return max(self._timeout_s, _STARTING_S) if starting else self._timeout_s

    def _phase(self, rank: int) -> str:
        return self._beats[rank].phase if rank in self._beats else STARTING
