"""RowTable: what a rank remembers of each running request. It turns a ScheduledBatch into a ForwardBatch.

Page tables are numpy on the host, because only the host changes them; the last sampled token is on the device,
because the host may not know it yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ziphius.attention.batch import ForwardBatch
from ziphius.engine.transfer import upload
from ziphius.ipc.messages import NewRow, RowWork


@dataclass(frozen=True, slots=True)
class PromptLogprobWork:
    """Positions of one row's chunk whose logits tell how likely the next prompt token was."""

    row: int
    tokens: range
    """Token indices in the step."""
    targets: list[int]
    """The prompt token after each."""
    first_token: int | None
    """The prompt's first token, if it is in the chunk and its log-probability is wanted: nothing predicts it."""
    num_top: int


@dataclass(frozen=True, slots=True)
class StepInput:
    """The input of a step, and what is wanted of its output."""

    forward: ForwardBatch
    sample_rows: np.ndarray
    """[n] int64: the rows that get a token. They belong to the first n of `forward.sample_indices`."""
    prompt_logprobs: list[PromptLogprobWork]
    """Their positions follow in `forward.sample_indices`, in this order."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A step of one token for each of n rows, on the host."""

    rows: np.ndarray
    """[n] int64."""
    positions: np.ndarray
    """[n] int64: tokens in the cache before the step."""
    slots: np.ndarray
    """[n] int64: where the new token goes."""
    pages: np.ndarray
    """[n, pages] int32: each row's page table as far as the longest row needs it."""


@dataclass(slots=True)
class _ScoredPrompt:
    prompt_ids: list[int]
    first: int
    num_top: int


class RowTable:
    """`num_rows` requests of up to `max_pages` pages each."""

    def __init__(self, num_rows: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device
        self._pages = np.zeros((num_rows, max_pages), dtype=np.int32)
        self._num_pages = np.zeros(num_rows, dtype=np.int64)
        self._scored: dict[int, _ScoredPrompt] = {}
        self.last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """[num_rows]: the token each row sampled last, written by the code that samples."""

    def start(self, new: NewRow) -> None:
        """Give the row to a request. What the row held before is forgotten."""
        self._num_pages[new.row] = 0
        self._append_pages(new.row, new.pages)
        self._scored.pop(new.row, None)
        sampling = new.sampling
        # It was resumed after its prompt was computed, so its log-probabilities have been sent already.
        if sampling.prompt_logprobs_from >= 0 and not new.output_ids:
            num_top = sampling.top_logprobs if sampling.logprobs else 0
            self._scored[new.row] = _ScoredPrompt(new.prompt_ids, sampling.prompt_logprobs_from, num_top)

    def plan(self, work: Sequence[RowWork]) -> StepInput:
        """The tensors of one step. Decode rows (no token ids) must come first in `work`."""
        for item in work:
            if item.new_pages:
                self._append_pages(item.row, item.new_pages)
        rows = np.array([w.row for w in work], dtype=np.int64)
        before = np.array([w.position for w in work], dtype=np.int64)
        counts = np.array([len(w.token_ids) or 1 for w in work], dtype=np.int64)
        starts = np.zeros(len(work) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        num_decodes = sum(not w.token_ids for w in work)
        token_rows = np.repeat(rows, counts)
        positions = np.repeat(before - starts[:-1], counts) + np.arange(starts[-1])
        page, offset = np.divmod(positions, self._page_size)
        slots = self._pages[token_rows, page].astype(np.int64) * self._page_size + offset
        seq_lens = before + counts
        width = int(seq_lens.max() - 1) // self._page_size + 1
        query_starts: list[int] = starts.tolist()
        samples = np.array([w.sample for w in work], dtype=bool)
        scored = self._scored_chunks(work, query_starts) if self._scored else []
        wanted = [starts[1:][samples] - 1, *(np.arange(s.tokens.start, s.tokens.stop) for s in scored)]
        forward = ForwardBatch(
            input_ids=self._input_ids(work, rows, num_decodes),
            positions=upload(positions, self._device),
            slots=upload(slots, self._device),
            num_decodes=num_decodes,
            query_starts=query_starts,
            seq_lens=seq_lens.tolist(),
            seq_lens_device=upload(seq_lens.astype(np.int32), self._device),
            page_table=upload(self._pages[rows, :width], self._device),
            page_size=self._page_size,
            sample_indices=upload(np.concatenate(wanted), self._device),
        )
        return StepInput(forward, rows[samples], scored)

    def plan_decodes(self, work: Sequence[RowWork]) -> DecodePlan | None:
        """The integers of a step of decode rows that all get a token; None for any other step."""
        if any(w.token_ids or not w.sample for w in work):
            return None
        for item in work:
            if item.new_pages:
                self._append_pages(item.row, item.new_pages)
        rows = np.array([w.row for w in work], dtype=np.int64)
        positions = np.array([w.position for w in work], dtype=np.int64)
        page, offset = np.divmod(positions, self._page_size)
        slots = self._pages[rows, page] * np.int64(self._page_size) + offset
        return DecodePlan(rows, positions, slots, self._pages[rows, : int(page.max()) + 1])

    def store(self, rows: np.ndarray, tokens: Tensor) -> None:
        """Take in that `tokens` [n] int64 were sampled for `rows` [n]."""
        self.last_token[upload(rows, self._device)] = tokens

    def _append_pages(self, row: int, pages: list[int]) -> None:
        start = self._num_pages[row]
        self._pages[row, start : start + len(pages)] = pages
        self._num_pages[row] += len(pages)

    def _input_ids(self, work: Sequence[RowWork], rows: np.ndarray, num_decodes: int) -> Tensor:
        decoded = self.last_token[upload(rows[:num_decodes], self._device)]
        if num_decodes == len(work):
            return decoded
        chunks = np.concatenate([np.array(w.token_ids, dtype=np.int64) for w in work[num_decodes:]])
        return torch.cat([decoded, upload(chunks, self._device)])

    def _scored_chunks(self, work: Sequence[RowWork], query_starts: list[int]) -> list[PromptLogprobWork]:
        chunks = []
        for index, item in enumerate(work):
            scored = self._scored.get(item.row)
            if scored is None or not item.token_ids:
                continue
            prompt_ids = scored.prompt_ids
            # The hidden state at position p predicts the prompt token at p + 1.
            first = max(item.position, scored.first - 1)
            end = max(first, min(item.position + len(item.token_ids), len(prompt_ids) - 1))
            first_token = prompt_ids[0] if item.position == 0 and scored.first == 0 else None
            if first < end or first_token is not None:
                shift = query_starts[index] - item.position
                tokens, targets = range(first + shift, end + shift), prompt_ids[first + 1 : end + 1]
                chunks.append(PromptLogprobWork(item.row, tokens, targets, first_token, scored.num_top))
        return chunks
