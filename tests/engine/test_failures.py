"""Steps that raise: their requests get an error, the engine goes on, and gives up when it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ziphius.engine.loading import LoadedRank
from ziphius.errors import EngineFailed
from ziphius.ipc.messages import AddRequest, ScheduledBatch
from ziphius.scheduler.scheduler import StepResult

Add = Callable[..., AddRequest]
Drive = Callable[..., Any]


class BrokenStep:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        raise self._error


class Faulty:
    """The real runner, but the steps in `faults` raise: at launch, or only when their result is read."""

    def __init__(self, loaded: LoadedRank, faults: dict[int, Exception], late: bool) -> None:
        self._runner = loaded.runner
        self._faults = faults
        self._late = late

    def run(self, batch: ScheduledBatch) -> Any:
        if batch.step not in self._faults:
            return self._runner.run(batch)
        if self._late:
            return BrokenStep(self._faults[batch.step])
        raise self._faults[batch.step]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_failed_step_ends_its_requests_and_no_others(
    loaded_llama: LoadedRank, drive: Drive, add: Add, overlap: bool, late: bool
) -> None:
    faults: dict[int, Exception] = {4: RuntimeError("out of luck")}
    runner = Faulty(loaded_llama, faults, late)
    driver = drive(loaded_llama, overlap=overlap, runner=runner, max_running_requests=2, prefix_cache=False)
    # Two rows: the others wait until the failed ones have gone.
    answers = driver.run([add(str(i), [5 + i, 6, 7], max_new_tokens=10) for i in range(4)])
    kinds = [answer.finish.kind for answer in answers.values()]
    assert kinds == ["error", "error", "length", "length"]
    assert "out of luck" in answers["0"].finish.message
    wanted = drive(loaded_llama).run([add("2", [7, 6, 7], max_new_tokens=10)])
    assert answers["2"].token_ids == wanted["2"].token_ids
    assert driver.others[-1].pages_free == driver.others[-1].pages_total


@pytest.mark.parametrize("late", [False, True])
def test_two_failures_in_a_row_are_fatal(loaded_llama: LoadedRank, drive: Drive, add: Add, late: bool) -> None:
    faults: dict[int, Exception] = {2: RuntimeError("first"), 3: RuntimeError("second")}
    driver = drive(loaded_llama, runner=Faulty(loaded_llama, faults, late), max_running_requests=1)
    with pytest.raises(EngineFailed, match=r"two steps in a row.*second"):
        driver.run([add(str(i), [5, 6, 7]) for i in range(3)])
    driver.read()
    # Those of the failed steps were told; the frontend answers the rest when it hears of the end.
    assert [driver.answers[rid].finish and driver.answers[rid].finish.kind for rid in "012"] == ["error", "error", None]


def test_failures_with_successes_between_are_not_fatal(loaded_llama: LoadedRank, drive: Drive, add: Add) -> None:
    faults: dict[int, Exception] = {step: RuntimeError("again") for step in (2, 4, 6)}
    driver = drive(loaded_llama, runner=Faulty(loaded_llama, faults, late=False), max_running_requests=1)
    answers = driver.run([add(str(i), [5, 6, 7]) for i in range(4)])
    assert [answer.finish.kind for answer in answers.values()] == ["error"] * 3 + ["length"]


def test_a_broken_device_is_fatal_at_once(loaded_llama: LoadedRank, drive: Drive, add: Add) -> None:
    faults: dict[int, Exception] = {2: torch.AcceleratorError("an illegal memory access was encountered")}
    driver = drive(loaded_llama, runner=Faulty(loaded_llama, faults, late=True))
    with pytest.raises(EngineFailed, match="device failed"):
        driver.run([add("a", [5, 6, 7])])
    driver.read()
    assert driver.answers["a"].finish.kind == "error"
