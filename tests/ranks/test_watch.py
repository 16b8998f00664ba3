"""Which rank is told to hang: from beats and the time between them, without processes or clocks."""

from __future__ import annotations

import asyncio

import pytest

from ziphius.ipc.messages import Beat
from ziphius.ranks.failures import Cause, Failure, Failures
from ziphius.ranks.watch import RankWatch

NAMES = {0: "rank 0 (process 100)", 1: "rank 1 (process 101)"}
TIMEOUT_S = 10.0


def beat(rank: int, collectives: int = 0, busy: bool = False, phase: str = "serving") -> Beat:
    return Beat(rank=rank, phase=phase, busy=busy, collectives=collectives)


def watch_of(*beats: Beat) -> RankWatch:
    watch = RankWatch(NAMES, TIMEOUT_S)
    for each in beats:
        watch.heard(each)
    return watch


def wait(watch: RankWatch, seconds: int, *beats: Beat) -> Failure | None:
    """Second after second, with these beats in each of them."""
    for _ in range(seconds):
        for each in beats:
            watch.heard(each)
        failure = watch.wait(1.0)
        if failure is not None:
            return failure
    return None


def test_ranks_that_beat_are_fine_however_long_they_idle() -> None:
    assert wait(watch_of(beat(0), beat(1)), 100, beat(0), beat(1)) is None


def test_the_silent_rank_is_named_not_the_one_that_waits_for_it() -> None:
    """rank 0 hangs in a collective because rank 1 was stopped in the middle of a step."""
    watch = watch_of(beat(0), beat(1))
    waiting = beat(0, collectives=7, busy=True)
    assert wait(watch, 10, waiting) is None
    failure = wait(watch, 1, waiting)
    assert failure is not None
    assert failure.cause is Cause.SILENT
    assert failure.message == (
        "rank 1 (process 101) has not answered for 11 s (--rank-timeout 10): it is stopped or hung (while serving)"
    )


def test_an_idle_rank_that_stops_is_noticed() -> None:
    failure = wait(watch_of(beat(0), beat(1)), 11, beat(1))
    assert failure is not None
    assert "rank 0" in failure.message


def test_both_silent() -> None:
    failure = wait(watch_of(beat(0), beat(1)), 11)
    assert failure is not None
    assert failure.message.startswith("rank 0 (process 100) and rank 1 (process 101) have not answered")


def test_a_pause_below_the_limit_is_forgiven() -> None:
    watch = watch_of(beat(0), beat(1))
    for _ in range(5):
        assert wait(watch, 9, beat(0)) is None
        watch.heard(beat(1))


def test_importing_torch_may_take_longer_than_the_limit_but_not_for_ever() -> None:
    watch = watch_of(beat(0, phase="starting"), beat(1))
    assert wait(watch, 55, beat(1)) is None
    failure = wait(watch, 10, beat(1))
    assert failure is not None
    assert "while starting" in failure.message


def test_ranks_that_beat_but_do_not_get_on() -> None:
    """The one that entered fewer collectives is behind."""
    stuck = (beat(0, 12, True), beat(1, 11, True))
    failure = wait(watch_of(*stuck), 12, *stuck)
    assert failure is not None
    assert failure.cause is Cause.STUCK
    assert "rank 1 (process 101) is behind the others, at collective 11 of 12" in failure.message


def test_ranks_stuck_in_the_same_collective() -> None:
    stuck = (beat(0, 12, True), beat(1, 12, True))
    failure = wait(watch_of(*stuck), 12, *stuck)
    assert failure is not None
    assert "all of them are at collective 12" in failure.message


def test_getting_on_slowly_is_getting_on() -> None:
    watch = watch_of(beat(0), beat(1))
    for done in range(1, 40):
        assert wait(watch, 9, beat(0, done, True), beat(1, done, True)) is None


@pytest.mark.parametrize("phase", ["loading", "waiting", "warm-up"])
def test_loading_is_not_judged_by_its_collectives(phase: str) -> None:
    busy = (beat(0, 3, True, phase), beat(1, 3, True, "serving"))
    assert wait(watch_of(*busy), 100, *busy) is None


def test_one_rank_alone_may_compute_for_long() -> None:
    watch = RankWatch({0: "the engine (process 100)"}, TIMEOUT_S)
    assert wait(watch, 100, beat(0, 0, True)) is None


def test_ranks_of_other_machines_count_for_getting_on_but_not_for_silence() -> None:
    watch = watch_of(beat(0), beat(1))
    busy, behind = (beat(0, 9, True), beat(1, 9, True)), beat(2, 8, True)
    watch.heard_of([behind])
    assert wait(watch, 100, *busy) is None, "whether rank 2 is too silent is for its own machine to say"
    for _ in range(13):
        watch.heard_of([behind])
        failure = wait(watch, 1, *busy)
        if failure is not None:
            break
    assert failure is not None
    assert "rank 2 is behind the others, at collective 8 of 9" in failure.message


def test_news_are_of_this_machines_ranks_that_have_beaten_since() -> None:
    watch = watch_of(beat(0), beat(1))
    watch.heard_of([beat(2, 8), beat(0, 99)])
    assert watch.news() == [beat(0), beat(1)]
    watch.heard(beat(1, 5))
    assert watch.news() == [beat(1, 5)]
    assert watch.news() == []


def test_the_cause_is_told_and_not_its_consequence() -> None:
    async def told(*failures: Failure) -> str:
        box = Failures()

        async def report() -> None:
            for failure in failures:
                box.report(failure)
                await asyncio.sleep(0.01)

        reporting = asyncio.create_task(report())
        message = (await box.first()).message
        await reporting
        return message

    lost, killed = Failure(Cause.LOST, "rank 0 lost the others"), Failure(Cause.KILLED, "rank 1 was killed")
    gone, said = Failure(Cause.GONE, "rank 0 ended"), Failure(Cause.TOLD, "no memory")
    assert asyncio.run(told(lost, gone, killed)) == "rank 1 was killed"
    assert asyncio.run(told(killed, lost)) == "rank 1 was killed"
    assert asyncio.run(told(gone, said)) == "no memory"
    assert asyncio.run(told(lost)) == "rank 0 lost the others"
