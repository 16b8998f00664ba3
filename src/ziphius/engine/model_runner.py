"""ModelRunner: one rank's ScheduledBatch goes through the model and becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend
from ziphius.distributed import SINGLE, ParallelState
from ziphius.engine.logprobs import LogprobTensors, compute_logprobs
from ziphius.engine.row_table import DecodePlan, PromptLogprobWork, RowTable
from ziphius.engine.sampler import SampledTokens, Sampler
from ziphius.engine.transfer import download, upload
from ziphius.ipc.messages import ScheduledBatch, TokenLogprob
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.models.causal_lm import CausalLM
from ziphius.scheduler.scheduler import Sampled, StepResult

if TYPE_CHECKING:
    from ziphius.engine.cuda_graph import DecodeGraphs

_LOGIT_ROWS = 64
"""The most prompt positions whose logits are in memory at once."""


@dataclass(slots=True)
class _ScoredChunk:
    work: PromptLogprobWork
    parts: list[LogprobTensors]


class StepHandle:
    """A step that was launched. On a GPU it may still run, and its results may still be on the way to the host."""

    def __init__(
        self, rows: np.ndarray, sampled: SampledTokens | None, scored: list[_ScoredChunk], on_cuda: bool
    ) -> None:
        self._rows: list[int] = rows.tolist()
        self._sampled = sampled
        self._scored = scored
        self._event: torch.cuda.Event | None = None
        if not on_cuda:
            return
        if sampled is not None:
            sampled.tokens = download(sampled.tokens)
            sampled.logprobs = None if sampled.logprobs is None else _to_host(sampled.logprobs)
        for chunk in scored:
            chunk.parts = [_to_host(part) for part in chunk.parts]
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def result(self) -> StepResult:
        """Wait for the step and return its result. Raises what the device raised."""
        if self._event is not None:
            self._event.synchronize()
        return StepResult(sampled=self._read_sampled(), prompt_logprobs=self._read_scored())

    def _read_sampled(self) -> dict[int, Sampled]:
        sampled = self._sampled
        if sampled is None:
            return {}
        messages: dict[int, TokenLogprob] = {}
        if sampled.logprobs is not None:
            told = sampled.logprobs.to_messages(sampled.top_counts)
            messages = dict(zip(sampled.logprobs_of, told, strict=True))
        tokens: list[int] = sampled.tokens.tolist()
        return {row: Sampled(tokens[i], messages.get(i)) for i, row in enumerate(self._rows)}

    def _read_scored(self) -> dict[int, list[TokenLogprob]]:
        told: dict[int, list[TokenLogprob]] = {}
        for chunk in self._scored:
            work = chunk.work
            messages = told.setdefault(work.row, [])
            if work.first_token is not None:
                messages.append(TokenLogprob(logprob=None, token_id=work.first_token))
            for part in chunk.parts:
                messages += part.to_messages([work.num_top] * len(part.chosen))
        return told


class ModelRunner:
    """The model, the pool and the rows of one rank. Not for two threads at once."""

    def __init__(
        self,
        model: CausalLM,
        pool: KVPool,
        attention: AttentionBackend,
        rows: RowTable,
        sampler: Sampler,
        parallel: ParallelState = SINGLE,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """`graphs` run the decode steps that they take; every other step is run operation by operation."""
        self.model = model
        self._pool = pool
        self._attention = attention
        self._rows = rows
        self._sampler = sampler
        self._parallel = parallel
        self._graphs = graphs

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepHandle:
        """Launch one step. The next may be launched before this one's result is read."""
        for new in batch.new_rows:
            self._rows.start(new)
            self._sampler.start_row(new.row, new.prompt_ids, new.output_ids, new.sampling)
        if self._graphs is not None and self._graphs.takes(len(batch.work)):
            decodes = self._rows.plan_decodes(batch.work)
            if decodes is not None:
                return self._replay(self._graphs, decodes)
        plan = self._rows.plan(batch.work)
        forward = plan.forward
        self._attention.prepare(forward)
        hidden = self.model.forward(forward, self._pool, self._attention)
        count = len(plan.sample_rows)
        sampled = self._sample(hidden, forward.sample_indices[:count], plan.sample_rows) if count else None
        scored = []
        start = count
        for work in plan.prompt_logprobs:
            end = start + len(work.targets)
            scored.append(self._score(hidden, forward.sample_indices[start:end], work))
            start = end
        return StepHandle(plan.sample_rows, sampled, scored, on_cuda=hidden.is_cuda)

    def release_graphs(self) -> None:
        """Every later step runs operation by operation."""
        if self._graphs is not None:
            self._graphs.release()

    def _replay(self, graphs: DecodeGraphs, plan: DecodePlan) -> StepHandle:
        best = self._sampler.takes_best(plan.rows)
        output = graphs.replay(plan)
        if best:
            self._sampler.took_best(plan.rows)
            sampled = SampledTokens(output.tokens, None, [], [])
        else:
            sampled = self._choose(output.logits, plan.rows)
        return StepHandle(plan.rows, sampled, [], on_cuda=output.logits.is_cuda)

    def _sample(self, hidden: Tensor, at: Tensor, rows: np.ndarray) -> SampledTokens:
        return self._choose(self.model.logits(hidden[at]), rows)

    def _choose(self, logits: Tensor, rows: np.ndarray) -> SampledTokens:
        if self._parallel.rank == 0:
            sampled = self._sampler.sample(logits, rows)
        else:
            sampled = SampledTokens(torch.empty(len(rows), dtype=torch.int64, device=logits.device), None, [], [])
        self._rows.store(rows, self._parallel.broadcast(sampled.tokens))
        return sampled

    def _score(self, hidden: Tensor, at: Tensor, work: PromptLogprobWork) -> _ScoredChunk:
        parts = []
        targets = upload(work.targets, hidden.device, np.int64)
        for start in range(0, len(work.targets), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            parts.append(compute_logprobs(self.model.logits(hidden[at[part]]), targets[part], work.num_top))
        return _ScoredChunk(work, parts)


def _to_host(logprobs: LogprobTensors) -> LogprobTensors:
    return LogprobTensors(
        download(logprobs.chosen),
        download(logprobs.token_ids),
        download(logprobs.top_values),
        download(logprobs.top_ids),
    )
