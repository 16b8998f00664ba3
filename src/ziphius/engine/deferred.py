"""DeferredRunner: a step runs when its result is asked for. By then the next step's batch has been sent."""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.engine.engine import Runner
from ziphius.ipc.messages import ScheduledBatch
from ziphius.scheduler.scheduler import StepResult


@dataclass(frozen=True, slots=True)
class DeferredStep:
    runner: Runner
    batch: ScheduledBatch

    def result(self) -> StepResult:
        """Run the step. Results must be asked for in the order of the steps."""
        return self.runner.run(self.batch).result()


@dataclass(frozen=True, slots=True)
class DeferredRunner:
    """For a CPU, where `runner.run` returns when the step is done.

    Under an engine with overlap, step n + 1 is scheduled and sent to the other ranks before step n runs here, so none
    of them waits for it after step n. A GPU does not need this, because there `run` returns at once.
    """

    runner: Runner

    def run(self, batch: ScheduledBatch) -> DeferredStep:
        return DeferredStep(self.runner, batch)
