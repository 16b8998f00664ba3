"""LogitAdjuster: penalties, logit bias and forbidden end tokens, row by row.

Applied to the raw logits in this order, each only to the rows that ask for it:
1. repetition_penalty r over prompt and generated tokens: x / r where x > 0, x * r where x < 0
   (Keskar et al. 2019, arXiv:1909.05858; Hugging Face's RepetitionPenaltyLogitsProcessor);
2. frequency_penalty f and presence_penalty p over generated tokens: x - f * count - p * (count > 0)
   (OpenAI's definition);
3. logit_bias: added;
4. below min_new_tokens: the tokens that would end the answer get -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ziphius.engine.transfer import upload
from ziphius.ipc.messages import SamplingParams


@dataclass(slots=True)
class _Row:
    sampling: SamplingParams
    slot: int
    """The row's line in the count tables; -1 without penalties."""
    bias_ids: list[int]
    bias_values: list[float]
    end_ids: list[int]


class LogitAdjuster:
    """Owns the token counts of rows with penalties. They are on the device, because the host may not know them yet."""

    def __init__(self, num_rows: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._slots: dict[int, int] = {}
        self._needed = np.zeros(num_rows, dtype=bool)
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._yes = torch.ones((), dtype=torch.bool, device=device)  # A True from the host would make it wait.

    def start_row(
        self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """`row` begins a request, or continues it after a preemption."""
        penalized = (
            sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
        )
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self._eos_token_ids))
        end_ids = sorted(i for i in ends if 0 <= i < self._vocab_size)
        held_back = sampling.min_new_tokens > 0 and bool(end_ids)
        self._needed[row] = penalized or held_back or bool(sampling.logit_bias)
        self._rows.pop(row, None)
        if not self._needed[row]:
            return
        slot = self._start_counts(row, prompt_ids, output_ids) if penalized else -1
        bias = sampling.logit_bias
        self._rows[row] = _Row(sampling, slot, list(bias.keys()), list(bias.values()), end_ids)

    def needed(self, rows: np.ndarray) -> bool:
        """Whether `apply` would change anything for `rows` [n]."""
        return bool(self._needed[rows].any())

    def apply(self, logits: Tensor, rows: np.ndarray, generated: np.ndarray) -> None:
        """Change `logits` [n, vocab] of `rows` [n] in place; `generated` [n]: how many tokens each has so far."""
        states = [(i, self._rows[row]) for i, row in enumerate(rows.tolist()) if self._needed[row]]
        penalized = [(i, state) for i, state in states if state.slot >= 0]
        if penalized:
            self._penalize(logits, penalized)
        at: list[int] = []
        ids: list[int] = []
        values: list[float] = []
        for i, state in states:
            extra_ids, extra_values = state.bias_ids, state.bias_values
            if generated[i] < state.sampling.min_new_tokens:
                extra_ids = extra_ids + state.end_ids
                extra_values = extra_values + [-float("inf")] * len(state.end_ids)
            at += [i] * len(extra_ids)
            ids += extra_ids
            values += extra_values
        if ids:
            where = upload([at, ids], self._device)
            logits.index_put_((where[0], where[1]), upload(values, self._device, np.float32), accumulate=True)

    def record(self, rows: np.ndarray, tokens: Tensor) -> None:
        """Count the `tokens` [n] just chosen for `rows` [n]."""
        counted = [(i, self._rows[row].slot) for i, row in enumerate(rows.tolist()) if self._needed[row]]
        counted = [(i, slot) for i, slot in counted if slot >= 0]
        if counted:
            index, slots = upload(counted, self._device).unbind(1)
            chosen = tokens[index]
            self._counts[slots, chosen] += 1  # Each slot appears once, so no count is lost.
            self._seen.index_put_((slots, chosen), self._yes)

    def _penalize(self, logits: Tensor, penalized: list[tuple[int, _Row]]) -> None:
        index, slots = upload([(i, state.slot) for i, state in penalized], self._device).unbind(1)
        strengths = [
            (s.sampling.repetition_penalty, s.sampling.frequency_penalty, s.sampling.presence_penalty)
            for _, s in penalized
        ]
        repetition, frequency, presence = upload(strengths, self._device, np.float32).T.unsqueeze(-1)
        x = logits[index]
        counts = self._counts[slots]
        repeated = torch.where(x > 0, x / repetition, x * repetition)
        x = torch.where(self._seen[slots], repeated, x)
        logits[index] = x - frequency * counts - presence * (counts > 0)

    def _start_counts(self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        slot = self._slots.setdefault(row, len(self._slots))
        if slot >= len(self._counts):
            more = max(4, len(self._counts))
            self._counts = torch.cat([self._counts, self._counts.new_zeros((more, self._vocab_size))])
            self._seen = torch.cat([self._seen, self._seen.new_zeros((more, self._vocab_size))])
        counts = np.bincount(np.asarray(output_ids, dtype=np.int64), minlength=self._vocab_size)
        seen = counts > 0
        seen[np.asarray(prompt_ids, dtype=np.int64)] = True
        self._counts[slot] = upload(counts, self._device, np.int32)
        self._seen[slot] = upload(seen, self._device)
        return slot
