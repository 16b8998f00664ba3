"""CudaBackend: attention by the GPU kernels: split decode over the paged cache, flash attention for prompt chunks.

Decoding never expands the latent cache. A prompt chunk expands the latents of all tokens that it sees through kv_b, as
many heads at a time as a fixed amount of memory holds, and attends to ordinary keys and values. With
`batch_invariant` every token is a decode row, split at fixed lengths: this is slower for prompts, but gives the same
bits whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.attention.backend import ProjectedTokens
from ziphius.attention.batch import ForwardBatch
from ziphius.kernels.gpu.combine import combine, combine_values
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.flash_prefill import Tiles, flash_prefill, make_tiles
from ziphius.kernels.gpu.mla_inputs import NewTokens, decode_inputs, prompt_inputs
from ziphius.kernels.gpu.paged_decode import FIXED_SPLIT, Paged, gqa_parts, mla_parts, split_plan
from ziphius.kernels.gpu.tuning import Tuned
from ziphius.kv_cache.kv_pool import KVCache, LatentCache
from ziphius.layers.ops import LayerOps

_EXPANDED_BYTES = 1 << 30
"""The most bytes that expanded keys and values take at a time."""
_KEYS_AT_ONCE = 1 << 17
"""The most keys of several sequences' chunks that are gathered from the cache together. They may share a prefix."""
_PARTS_BYTES = 1 << 29
"""The most bytes that the partial sums of decode rows take at a time. With splits of a fixed length there are many."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers of one step share."""

    batch: ForwardBatch
    rows: int
    """How many tokens are computed as decode rows: the first ones."""
    paged: Paged
    longest: int
    """At least as many as the longest decode row has tokens."""
    chunks: list[_Chunks]
    """The chunks of all other tokens, in order."""


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Prompt chunks whose keys are in memory together."""

    tokens: slice
    """Their tokens, counted from the first token that is not a decode row."""
    tiles: Tiles
    """Their queries, counted from the first of `tokens`."""
    key_slots: Tensor | None
    """The slots of all keys that they see. None: the keys are those of `tokens` themselves."""


class CudaBackend:
    def __init__(self, device: torch.device, batch_invariant: bool = False) -> None:
        self._gpu = GpuDevice.of(device, batch_invariant)
        self._tuned = Tuned.of(self._gpu)
        self._plan: _Plan | None = None

    def prepare(self, batch: ForwardBatch) -> None:
        if self._gpu.batch_invariant and batch.num_decodes < batch.num_seqs:
            self._plan = _plan_all_as_rows(batch)
        else:
            self._plan = _plan_step(batch)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, batch: ForwardBatch, scale: float) -> Tensor:
        plan = self._plan_of(batch)
        k, v = k.to(cache.k.dtype), v.to(cache.v.dtype)
        cache.k.index_copy_(0, batch.slots, k)
        cache.v.index_copy_(0, batch.slots, v)
        rows, heads = plan.rows, q.shape[1]
        decoded = self._decode_gqa(q[:rows], cache, plan, scale) if rows else None
        if decoded is not None and not plan.chunks:
            return decoded
        out = torch.empty((q.shape[0], heads, v.shape[2]), dtype=q.dtype, device=q.device)
        if decoded is not None:
            out[:rows] = decoded
        q, k, v, rest = q[rows:], k[rows:], v[rows:], out[rows:]
        for chunks in plan.chunks:
            mine, slots = chunks.tokens, chunks.key_slots
            keys, values = (k[mine], v[mine]) if slots is None else (cache.k[slots], cache.v[slots])
            flash_prefill(self._gpu, q[mine], keys, None, values, rest[mine], chunks.tiles, scale)
        return out

    def _decode_gqa(self, q: Tensor, cache: KVCache, plan: _Plan, scale: float) -> Tensor:
        fixed = FIXED_SPLIT if self._gpu.batch_invariant else None
        splits = split_plan(plan.rows * cache.k.shape[1], plan.longest, self._gpu.processors, fixed=fixed)

        def attend(some: slice, paged: Paged) -> Tensor:
            return combine(self._gpu, gqa_parts(self._gpu, q[some], cache.k, cache.v, paged, scale, splits), q.dtype)

        return _by_rows(plan, q.shape[1] * q.shape[2] * splits.splits, attend)

    def attend_projected(
        self, tokens: ProjectedTokens, cache: LatentCache, batch: ForwardBatch, scale: float, ops: LayerOps
    ) -> Tensor:
        plan = self._plan_of(batch)
        rows, total = plan.rows, tokens.q.shape[0]
        if rows == total:
            return self._decode(tokens.q, _new(tokens, batch, 0, rows), tokens, cache, plan, scale)
        out = torch.empty(
            (total, tokens.q.shape[1], tokens.w_uv.shape[2]), dtype=tokens.q.dtype, device=tokens.q.device
        )
        if rows:
            out[:rows] = self._decode(tokens.q[:rows], _new(tokens, batch, 0, rows), tokens, cache, plan, scale)
        new = _new(tokens, batch, rows, total)
        self._prefill(tokens.q[rows:], new, tokens, cache, plan, scale, out[rows:])
        return out

    def _decode(
        self, q: Tensor, new: NewTokens, tokens: ProjectedTokens, cache: LatentCache, plan: _Plan, scale: float
    ) -> Tensor:
        queries = decode_inputs(self._gpu, q, new, tokens.w_uk, cache.latent)
        heads, lora = queries.shape[1], tokens.w_uv.shape[1]
        splits, config = self._tuned.mla(plan.rows, heads, lora, plan.longest, q.element_size())

        def attend(some: slice, paged: Paged) -> Tensor:
            parts = mla_parts(self._gpu, queries[some], cache.latent, paged, scale, splits, config)
            return combine_values(self._gpu, parts, tokens.w_uv)

        return _by_rows(plan, heads * lora * splits.splits, attend)

    def _prefill(
        self,
        q: Tensor,
        new: NewTokens,
        tokens: ProjectedTokens,
        cache: LatentCache,
        plan: _Plan,
        scale: float,
        out: Tensor,
    ) -> None:
        rows = prompt_inputs(self._gpu, q, new, tokens.w_uk.shape[1], cache.latent)
        for chunks in plan.chunks:
            mine, slots = chunks.tokens, chunks.key_slots
            seen = rows[mine] if slots is None else cache.latent[slots]
            self._expand(q[mine], seen.to(q.dtype), tokens, chunks.tiles, scale, out[mine])

    def _expand(
        self, q: Tensor, rows: Tensor, tokens: ProjectedTokens, tiles: Tiles, scale: float, out: Tensor
    ) -> None:
        """Attend to cache rows [L, lora + rope], expanded a few heads at a time."""
        heads, nope, lora = tokens.w_uk.shape
        latent, k_pe = rows[:, :lora], rows[:, lora:]
        per_head = rows.shape[0] * (nope + tokens.w_uv.shape[2]) * q.element_size()
        at_once = max(1, min(heads, _EXPANDED_BYTES // per_head))
        for first in range(0, heads, at_once):
            some = slice(first, min(first + at_once, heads))
            keys = F.linear(latent, tokens.w_uk[some].flatten(0, 1)).view(latent.shape[0], -1, nope)
            values = torch.matmul(latent, tokens.w_uv[some]).transpose(0, 1)
            if at_once == heads:
                flash_prefill(self._gpu, q, keys, k_pe, values, out, tiles, scale)
                return
            part = out.new_empty((out.shape[0], keys.shape[1], out.shape[2]))
            flash_prefill(self._gpu, q[:, some], keys, k_pe, values, part, tiles, scale)
            out[:, some] = part

    def _plan_of(self, batch: ForwardBatch) -> _Plan:
        if self._plan is None or self._plan.batch is not batch:
            raise RuntimeError("prepare(batch) must come before the first layer of a step")
        return self._plan


def _new(tokens: ProjectedTokens, batch: ForwardBatch, start: int, end: int) -> NewTokens:
    cos, sin = tokens.angles
    return NewTokens(
        tokens.latent[start:end],
        tokens.k_pe[start:end],
        tokens.norm.weight,
        tokens.norm.eps,
        cos[start:end],
        sin[start:end],
        batch.slots[start:end],
    )


def _by_rows(plan: _Plan, values: int, attend: Callable[[slice, Paged], Tensor]) -> Tensor:
    """Call `attend` for all decode rows, for so many at a time that `values` float32 for each fit into the limit."""
    at_once = max(1, _PARTS_BYTES // (4 * values))
    paged = plan.paged
    if plan.rows <= at_once:
        return attend(slice(None), paged)
    some = [slice(first, first + at_once) for first in range(0, plan.rows, at_once)]
    parts = [attend(each, Paged(paged.page_table[each], paged.seq_lens[each], paged.page_size)) for each in some]
    return torch.cat(parts)


def _plan_step(batch: ForwardBatch) -> _Plan:
    rows = batch.num_decodes
    paged = Paged(batch.page_table[:rows], batch.seq_lens_device[:rows], batch.page_size)
    longest = max(batch.seq_lens[:rows], default=0)
    chunks: list[_Chunks] = []
    first = rows
    while first < batch.num_seqs:
        end, keys = first + 1, batch.seq_lens[first]
        while end < batch.num_seqs and keys + batch.seq_lens[end] <= _KEYS_AT_ONCE:
            keys += batch.seq_lens[end]
            end += 1
        chunks.append(_plan_chunks(batch, first, end))
        first = end
    return _Plan(batch, rows, paged, longest, chunks)


def _plan_chunks(batch: ForwardBatch, first: int, end: int) -> _Chunks:
    """The chunks of the sequences from `first` to before `end`."""
    start = batch.query_starts[first]
    query_starts = [each - start for each in batch.query_starts[first : end + 1]]
    tokens = slice(start - batch.num_decodes, batch.query_starts[end] - batch.num_decodes)
    counts = [after - before for before, after in pairwise(query_starts)]
    lens = batch.seq_lens[first:end]
    seen_by_first = [length - count + 1 for length, count in zip(lens, counts, strict=True)]
    device = batch.page_table.device
    if lens == counts:
        return _Chunks(tokens, make_tiles(query_starts, query_starts[:-1], seen_by_first, device), None)
    key_starts = [0]
    for length in lens:
        key_starts.append(key_starts[-1] + length)
    tiles = make_tiles(query_starts, key_starts[:-1], seen_by_first, device)
    return _Chunks(tokens, tiles, _key_slots(batch, first, end, key_starts[-1]))


def _key_slots(batch: ForwardBatch, first: int, end: int, total: int) -> Tensor:
    """Slots of all `total` tokens of the sequences from `first` to before `end`, one sequence after another."""
    lens = batch.seq_lens_device[first:end].long()
    seq = torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens, output_size=total)
    position = torch.arange(total, device=lens.device) - (lens.cumsum(0) - lens)[seq]
    return _slots(batch, seq + first, position)


def _plan_all_as_rows(batch: ForwardBatch) -> _Plan:
    """A plan with every token of a chunk as a decode row that sees its sequence's pages up to itself."""
    counts = batch.seq_lens_device.new_tensor([end - start for start, end in pairwise(batch.query_starts)])
    seq = torch.repeat_interleave(
        torch.arange(batch.num_seqs, device=counts.device), counts, output_size=batch.num_tokens
    )
    paged = Paged(batch.page_table[seq], (batch.positions + 1).int(), batch.page_size)
    return _Plan(batch, batch.num_tokens, paged, max(batch.seq_lens), [])


def _slots(batch: ForwardBatch, seq: Tensor, position: Tensor) -> Tensor:
    pages = batch.page_table[seq, position // batch.page_size].long()
    return pages * batch.page_size + position % batch.page_size
