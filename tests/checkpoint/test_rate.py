"""Speed and time left, by a clock of the test's own."""

from __future__ import annotations

import tracemalloc

import pytest

from ziphius.checkpoint.rate import RateMeter, size_words, time_words


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_told_before_anything_is_known(clock: Clock) -> None:
    meter = RateMeter(clock)
    assert meter.words(1000) == ""
    for _ in range(3):
        meter.update(5)
    assert (meter.bytes_per_second, meter.words(1000)) == (0.0, "")


def test_a_steady_speed(clock: Clock) -> None:
    meter = RateMeter(clock)
    for second in range(60):
        clock.now = float(second)
        meter.update(second * 2_000_000_000)
    assert meter.bytes_per_second == pytest.approx(2e9)
    assert meter.words(471_000_000_000) == "2.0 GB/s, 3 min left"
    assert meter.words(59 * 2_000_000_000) == "2.0 GB/s"


def test_what_was_long_ago_is_forgotten(clock: Clock) -> None:
    meter = RateMeter(clock, window_s=10.0)
    done = 0
    for tick in range(400):
        clock.now = tick / 10
        done += 100 if tick < 200 else 1000
        meter.update(done)
    assert meter.bytes_per_second == pytest.approx(10_000)


def test_many_updates_cost_no_memory(clock: Clock) -> None:
    """10,000 updates fall into the window, and each sample that is kept takes more than 100 bytes."""
    meter = RateMeter(clock, window_s=10.0)
    tracemalloc.start()
    for tick in range(20_000):
        clock.now = tick / 1000
        meter.update(tick)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert meter.bytes_per_second == pytest.approx(1000)
    assert taken < 150 * 1000


def test_words() -> None:
    assert [size_words(n) for n in (0, 999, 1500, 471.48e9, 1.5e12)] == [
        "0 bytes", "999 bytes", "1.5 kB", "471.5 GB", "1.5 TB"
    ]  # fmt: skip
    assert [time_words(s) for s in (0.2, 59, 61, 3599, 3660, 7500)] == [
        "1 s", "59 s", "1 min", "1 h 0 min", "1 h 1 min", "2 h 5 min"
    ]  # fmt: skip
