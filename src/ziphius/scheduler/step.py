"""A step: its plan while the scheduler makes it, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ziphius.ipc.messages import NewRow, RowWork, ScheduledBatch, TokenLogprob
from ziphius.scheduler.request import LaunchedRow, Request


class Sampled(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None
    """None unless the request asked for it."""


@dataclass(slots=True)
class StepResult:
    """What the ranks computed for one ScheduledBatch."""

    sampled: dict[int, Sampled]
    """By row; one for each work with `sample`."""
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    """By row: those that this step's chunk yields, in order."""


@dataclass(slots=True)
class StepPlan:
    """A step that is being planned or in flight: the integers for the ranks, and the requests that they belong to."""

    step: int
    new_rows: list[NewRow] = field(default_factory=list)
    work: list[RowWork] = field(default_factory=list)
    launches: list[LaunchedRow] = field(default_factory=list)
    """Parallel to `work`."""

    def add_row(self, request: Request, pages: list[int]) -> None:
        """Add the row of a `request` that has just been admitted, with cached `pages`."""
        self.new_rows.append(
            NewRow(
                row=request.row,
                pages=pages,
                prompt_ids=request.tokens[: request.prompt_length].tolist(),
                output_ids=request.tokens[request.prompt_length :].tolist(),
                sampling=request.sampling_for_row(),
            )
        )

    def add_decode(self, request: Request, new_pages: list[int]) -> None:
        position = request.launched
        launch = request.launch(1)
        self.launches.append(launch)
        self.work.append(
            RowWork(row=launch.row, position=position, token_ids=[], new_pages=new_pages, sample=launch.samples)
        )

    def add_chunk(self, request: Request, budget: int, new_pages: list[int]) -> int:
        """Add as much of its prompt as `budget` tokens allow. Returns how many tokens that is."""
        position = request.launched
        end = min(position + budget, request.prefill_end)
        launch = request.launch(end - position)
        self.launches.append(launch)
        chunk = request.tokens[position:end].tolist()
        self.work.append(
            RowWork(row=launch.row, position=position, token_ids=chunk, new_pages=new_pages, sample=launch.samples)
        )
        return end - position

    def batch(self) -> ScheduledBatch:
        return ScheduledBatch(step=self.step, new_rows=self.new_rows, work=self.work)
