"""Sampler: it chooses one token for each row of logits, and owns each row's sampling parameters.

A row's token depends on its logits, its parameters, its seed and how many tokens it has generated, and on nothing
else in the batch: the random number is a counter-based hash of (seed, output index), and every row goes through
operations that treat each row separately. So a preempted request repeats its own choices.

temperature scales first. top_k, top_p and min_p are then each judged on that distribution, and a token must pass
all three (as in SGLang): it is among the top_k; all likelier tokens together have less than top_p; it has at least
min_p times the best token's probability. Tokens exactly as likely as the last one that passes also pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ziphius.engine.logprobs import LogprobTensors, compute_logprobs
from ziphius.engine.penalties import LogitAdjuster
from ziphius.engine.transfer import upload
from ziphius.ipc.messages import SamplingParams

_GREEDY_BELOW = 1e-6
"""Temperatures below this count as 0: a division by them would leave only one token."""


@dataclass(slots=True)
class SampledTokens:
    """What one step chose, still on the device."""

    tokens: Tensor
    """[n] int64."""
    logprobs: LogprobTensors | None
    """The log-probabilities at the positions in `logprobs_of`."""
    logprobs_of: list[int]
    """Which of the n want log-probabilities."""
    top_counts: list[int]
    """How many alternatives each of `logprobs_of` wants."""


class Sampler:
    """`num_rows` rows of state; `vocab_size` columns of logits."""

    def __init__(self, num_rows: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._adjuster = LogitAdjuster(num_rows, vocab_size, eos_token_ids, device)
        self._generated = np.zeros(num_rows, dtype=np.int64)
        self._seed = np.zeros(num_rows, dtype=np.uint64)
        self._greedy = np.ones(num_rows, dtype=bool)
        self._filtered = np.zeros(num_rows, dtype=bool)
        self._logprobs = np.full(num_rows, -1, dtype=np.int64)
        self._temperature = np.ones(num_rows)
        self._top_p = np.ones(num_rows)
        self._top_k = np.full(num_rows, vocab_size, dtype=np.int64)
        self._min_p = np.zeros(num_rows)

    def start_row(
        self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """`row` begins a request, or continues it with what it had generated before a preemption."""
        top_k = sampling.top_k if 0 < sampling.top_k < self._vocab_size else self._vocab_size
        self._generated[row] = len(output_ids)
        self._seed[row] = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
        self._greedy[row] = sampling.temperature < _GREEDY_BELOW or top_k == 1
        self._filtered[row] = top_k < self._vocab_size or sampling.top_p < 1.0
        self._logprobs[row] = sampling.top_logprobs if sampling.logprobs else -1
        self._temperature[row] = max(sampling.temperature, _GREEDY_BELOW)
        self._top_p[row] = sampling.top_p
        self._top_k[row] = top_k
        self._min_p[row] = sampling.min_p
        self._adjuster.start_row(row, prompt_ids, output_ids, sampling)

    def sample(self, logits: Tensor, rows: np.ndarray) -> SampledTokens:
        """One token for each of `rows` [n], all different, from `logits` [n, vocab] float32 (which it may change)."""
        wanted = self._logprobs[rows]
        logprobs_of: list[int] = np.flatnonzero(wanted >= 0).tolist()
        raw = logits
        adjusted = self._adjuster.needed(rows)
        if adjusted:
            logits = logits.clone() if logprobs_of else logits
            self._adjuster.apply(logits, rows, self._generated[rows])
        tokens = self._choose(logits, rows)
        if adjusted:
            self._adjuster.record(rows, tokens)
        self._generated[rows] += 1
        if not logprobs_of:
            return SampledTokens(tokens, None, [], [])
        top_counts: list[int] = wanted[logprobs_of].tolist()
        if len(logprobs_of) < len(rows):
            index = upload(logprobs_of, self._device)
            logprobs = compute_logprobs(raw[index], tokens[index], max(top_counts))
        else:
            logprobs = compute_logprobs(raw, tokens, max(top_counts))
        return SampledTokens(tokens, logprobs, logprobs_of, top_counts)

    def takes_best(self, rows: np.ndarray) -> bool:
        """Whether each of `rows` [n] only needs its best token, and nothing else."""
        return (
            bool(self._greedy[rows].all())
            and not self._adjuster.needed(rows)
            and bool((self._logprobs[rows] < 0).all())
        )

    def took_best(self, rows: np.ndarray) -> None:
        """Take in that `rows` [n], for which `takes_best` is true, got their best tokens without `sample`."""
        self._generated[rows] += 1

    def _choose(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        """Sample each kind of row separately, because most rows need no sorting."""
        greedy, filtered = self._greedy[rows], self._filtered[rows]
        if greedy.all():
            return argmax(logits)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for members in (greedy, ~greedy & ~filtered, ~greedy & filtered):
            index = np.flatnonzero(members)
            if not len(index):
                continue
            at = upload(index, self._device)
            part = logits if len(index) == len(rows) else logits.index_select(0, at)
            tokens[at] = argmax(part) if members is greedy else sample(part, self._draw(rows[index]))
        return tokens

    def _draw(self, rows: np.ndarray) -> Draw:
        columns = (
            uniform(self._seed[rows], self._generated[rows]),
            self._temperature[rows],
            self._top_p[rows],
            self._top_k[rows],
            self._min_p[rows],
        )
        random, temperature, top_p, top_k, min_p = upload(np.stack(columns), self._device).unsqueeze(-1)
        any_filter, any_min_p = bool(self._filtered[rows].any()), bool(self._min_p[rows].any())
        return Draw(random, temperature.float(), top_p, top_k, min_p.float(), any_filter, any_min_p)


@dataclass(slots=True)
class Draw:
    """Parameters of n rows, each [n, 1] on the device."""

    random: Tensor
    """float64, uniform in [0, 1)."""
    temperature: Tensor
    """float32, above 0."""
    top_p: Tensor
    """float64, up to 1."""
    top_k: Tensor
    """float64, from 1 to the vocabulary's size."""
    min_p: Tensor
    """float32, from 0 to 1."""
    any_filter: bool
    """Whether some row has a top_k or top_p that excludes tokens."""
    any_min_p: bool


def uniform(seeds: NDArray[np.uint64], counters: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n] float64 in [0, 1): the number at `counters` [n] in each seed's [n] SplitMix64 stream (Steele et al. 2014).

    The seed is mixed first, so that neighbouring seeds do not give shifted copies of one stream.
    """
    state = _mix64(seeds) + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    # 32 bits: with more the number could round to 1.0 in the search for the token.
    return (_mix64(state) >> np.uint64(32)).astype(np.float64) * 2.0**-32


def _mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def argmax(logits: Tensor) -> Tensor:
    """[n, vocab] -> [n] int64, the lowest id among equals."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))  # Ten times as fast as torch's here.
    return logits.argmax(dim=-1)


def sample(logits: Tensor, draw: Draw) -> Tensor:
    """Draw a token for each row of `logits` [n, vocab] float32 -> [n] int64."""
    # Each token's probability divided by the best one's.
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(draw.temperature).exp_()
    least = torch.maximum(draw.min_p, _least_weight(weights, draw)) if draw.any_filter else draw.min_p
    if draw.any_filter or draw.any_min_p:
        weights *= torch.ge(weights, least, out=torch.empty_like(weights))  # Much faster here than a mask of bools.
    mass = weights.cumsum(dim=-1, dtype=torch.float64)
    index = torch.searchsorted(mass, draw.random * mass[:, -1:], right=True)
    return index.clamp_(max=logits.shape[1] - 1).squeeze(1)


def _least_weight(weights: Tensor, draw: Draw) -> Tensor:
    """The least weight that is among the top_k and in the nucleus of top_p; equal tokens stay. [n, 1] float32."""
    if weights.device.type == "cpu":
        rising = torch.from_numpy(np.sort(weights.numpy(), axis=-1))  # Twenty times as fast as torch's here.
    else:
        rising = weights.sort(dim=-1).values
    mass = rising.cumsum(dim=-1, dtype=torch.float64)
    # All likelier tokens have less than top_p if this token and all less likely ones have more than the rest.
    first_in_nucleus = torch.searchsorted(mass, (1.0 - draw.top_p) * mass[:, -1:], right=True)
    first = torch.maximum(first_in_nucleus, weights.shape[1] - draw.top_k.long())
    return rising.gather(1, first.clamp_(max=weights.shape[1] - 1))
