"""Attention of grouped query heads over a paged cache, float32: decode rows by blocks of keys, prefill by query tiles.

A token's result does not depend on the batch, the chunk, the threads, or on whether it is decoded or prefilled.

In the cache the values of a slot are stored as [kv_heads, head_dim]. Keys are stored in groups of 16 slots, each as
[kv_heads, head_dim, 16], so that 16 keys are compared with a query at once and no sum goes across lanes.
A page is a whole number of groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ziphius.kernels.cpu.attention_tiles import (
    BLOCK,
    KEY_GROUP,
    KEY_TILE,
    LANES,
    MASKED,
    MAX_TILE_HEADS,
    decode_scores,
    decode_values,
    decode_weights,
    join_decode,
    prefill_scores,
    prefill_values,
    prefill_weights,
)
from ziphius.kernels.cpu.jit import PoolJob, kernel
from ziphius.kernels.cpu.memory import floats, ints32, ints64
from ziphius.kernels.cpu.sync import next_task

_GROUPS = 8 * BLOCK
_POSITIONS = _GROUPS + 64
_SCORES = _POSITIONS + 64
"""The layout of a thread's scratch memory. The offsets come first."""


class AttentionBlock(NamedTuple):
    """What all layers of a step share: one int64 each, in this order, in memory whose address the jobs get."""

    heads: int
    kv_heads: int
    head_dim: int
    """A multiple of 16."""
    page_size: int
    """A multiple of 16."""
    page_table: int
    """Address of int32 [sequences, table_width]."""
    table_width: int
    seq_lens: int
    """Address of int64 [sequences]."""
    query_starts: int
    """Address of int64 [sequences + 1]."""
    num_decodes: int
    num_seqs: int
    partials: int
    """Address of float32, `partial_floats` of them: the partial results of decode rows for FINISH_DECODE."""
    scratch: int
    """Address of bytes, `scratch_bytes` for each thread."""


def softmax_factor(scale: float) -> float:
    """The factor for queries: exp(scale * x) is 2^(this * x)."""
    return scale * math.log2(math.e)


def partial_floats(heads: int, head_dim: int, decode_lens: Sequence[int]) -> int:
    """Floats of AttentionBlock.partials: 16 and the values for each head and block of each decode row."""
    return sum((n + BLOCK - 1) // BLOCK for n in decode_lens) * heads * (LANES + head_dim)


def scratch_bytes(heads: int, head_dim: int) -> int:
    """Bytes of scratch of one thread: offsets, groups, positions; scores of a decode block or, with queries, values
    and state, of a prefill tile."""
    return _SCORES + 4 * BLOCK * heads + 4 * LANES * MAX_TILE_HEADS * (BLOCK + 2 * head_dim + 4)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, page_table: Tensor, page_size: int, seq_lens: list[int], query_starts: list[int],
    scale: float,
) -> Tensor:  # fmt: skip
    """q [T, H, D] over caches k and v [slots, KH, D] -> [T, H, D]: each sequence's last queries, causally."""
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    for row, length in enumerate(seq_lens):
        start, end = query_starts[row], query_starts[row + 1]
        index = torch.arange(length)
        slots = page_table[row].long()[index // page_size] * page_size + index % page_size
        keys, values = (c[slots].repeat_interleave(groups, dim=1) for c in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
        hidden = index.unsqueeze(0) > (torch.arange(start, end) - end + length).unsqueeze(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def group_keys(k: Tensor) -> Tensor:
    """k [slots, kv_heads, head_dim], slots a multiple of 16, in the kernels' order: a tensor of the same shape."""
    slots, heads, size = k.shape
    return k.view(-1, KEY_GROUP, heads, size).permute(0, 2, 3, 1).reshape(slots, heads, size)


@kernel
def read_block(address: int) -> AttentionBlock:
    a = ints64(address, 12)
    return AttentionBlock(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11])


@kernel
def slot_bytes(shape: AttentionBlock) -> int:
    """Bytes from one slot of the cache to the next."""
    return 4 * shape.kv_heads * shape.head_dim


@kernel
def store_key(shape: AttentionBlock, k_cache: int, slot: int, source: int) -> None:
    """source: floats [kv_heads, head_dim], the keys of one slot."""
    size = shape.kv_heads * shape.head_dim
    group = floats(k_cache + slot // KEY_GROUP * KEY_GROUP * slot_bytes(shape), size * KEY_GROUP)
    keys = floats(source, size)
    lane = slot % KEY_GROUP
    for i in range(size):
        group[i * KEY_GROUP + lane] = keys[i]


@kernel
def _fill_offsets(shape: AttentionBlock, row: int, first: int, count: int, scratch: int) -> None:
    """Byte offsets of the values of keys first..first+count-1 of a sequence, and of the four groups of keys.

    Offsets after `count` repeat the last group, which is read but masked.
    """
    table = ints32(shape.page_table + 4 * row * shape.table_width, shape.table_width)
    offsets, groups = ints64(scratch, BLOCK), ints64(scratch + _GROUPS, BLOCK // KEY_GROUP)
    for i in range(BLOCK // KEY_GROUP):
        start = min(i * KEY_GROUP, (count - 1) // KEY_GROUP * KEY_GROUP)
        key = first + start
        slot = np.int64(table[key // shape.page_size]) * shape.page_size + key % shape.page_size
        groups[i] = slot * slot_bytes(shape)
        for j in range(KEY_GROUP):
            offsets[start + j] = (slot + j) * slot_bytes(shape)


@kernel
def _decode_block(
    shape: AttentionBlock, q: int, k_cache: int, v_cache: int, count: int, scratch: int, out: int
) -> None:
    """All heads of one decode row against one block of keys; out: (largest, sum) and values of each head."""
    group = shape.heads // shape.kv_heads
    chunks = shape.head_dim // LANES
    scores = scratch + _SCORES
    part_bytes = 4 * (LANES + shape.head_dim)
    for head in range(shape.heads):
        kv = 4 * shape.head_dim * (head // group)
        # The values are fetched from memory while the keys are used.
        ahead = v_cache + 128 * head % slot_bytes(shape)
        decode_scores(q + 4 * shape.head_dim * head, k_cache + KEY_GROUP * kv, scratch + _GROUPS, shape.head_dim, ahead,
                      scratch, scores + 4 * BLOCK * head)  # fmt: skip
    for head in range(shape.heads):
        weights, part = scores + 4 * BLOCK * head, out + part_bytes * head
        decode_weights(weights, count, part)
        for chunk in range(0, chunks, 4):
            values = v_cache + 4 * shape.head_dim * (head // group) + 64 * chunk
            decode_values(chunks - chunk, weights, values, scratch, count, part + 4, part + 64 + 64 * chunk)


@kernel
def scratch_of(heads: int, head_dim: int) -> int:
    return _SCORES + 4 * BLOCK * heads + 4 * LANES * MAX_TILE_HEADS * (BLOCK + 2 * head_dim + 4)


@kernel
def _load_queries(shape: AttentionBlock, heads: int, q: int, q_stride: int, tokens: int, target: int) -> None:
    """target [head_dim][heads][16 tokens]; missing tokens are zero."""
    out = floats(target, shape.head_dim * heads * LANES)
    for head in range(heads):
        for token in range(LANES):
            if token < tokens:
                source = floats(q + token * q_stride + 4 * head * shape.head_dim, shape.head_dim)
                for d in range(shape.head_dim):
                    out[(d * heads + head) * LANES + token] = source[d]
            else:
                for d in range(shape.head_dim):
                    out[(d * heads + head) * LANES + token] = np.float32(0)


@kernel
def _store_values(
    shape: AttentionBlock, heads: int, values: int, sums: int, tokens: int, out: int, out_stride: int
) -> None:
    """The inverse of _load_queries, each token and head divided by its sum."""
    source, total = floats(values, shape.head_dim * heads * LANES), floats(sums, heads * LANES)
    for head in range(heads):
        for token in range(tokens):
            target = floats(out + token * out_stride + 4 * head * shape.head_dim, shape.head_dim)
            inverse = np.float32(1) / total[head * LANES + token]
            for d in range(shape.head_dim):
                target[d] = source[(d * heads + head) * LANES + token] * inverse


@kernel
def _prefill_block(
    heads: int,
    queries: int,
    keys: int,
    values: int,
    count: int,
    start: int,
    state: int,
    result: int,
    head_dim: int,
    scratch: int,
) -> None:
    """One block of keys for `heads` heads."""
    groups, scores, line = ints64(scratch + _GROUPS, BLOCK // KEY_GROUP), scratch + _SCORES, 4 * LANES * heads
    for i in range(0, BLOCK, KEY_TILE):
        first = keys + groups[i // KEY_GROUP] + 4 * (i % KEY_GROUP)
        prefill_scores(heads, queries, first, head_dim, scores + line * i)
    prefill_weights(heads, scores, start, scratch + _POSITIONS, state)
    for d in range(0, head_dim, KEY_TILE):
        prefill_values(heads, scores, values + 4 * d, scratch, count, state + 2 * line, result + line * d)


@kernel
def _prefill_tile(
    shape: AttentionBlock,
    heads: int,
    row: int,
    first: int,
    tokens: int,
    q: int,
    q_stride: int,
    keys: int,
    values: int,
    out: int,
    out_stride: int,
    scratch: int,
) -> None:
    """`tokens` <= 16 queries from position `first` on, of `heads` <= MAX_TILE_HEADS heads that share a key head."""
    width = heads * LANES
    positions, queries = scratch + _POSITIONS, scratch + _SCORES + 4 * BLOCK * width
    result = queries + 4 * shape.head_dim * width
    state = result + 4 * shape.head_dim * width
    for i in range(LANES):
        ints32(positions, LANES)[i] = first + min(i, tokens - 1)
    for i in range(width):
        floats(state, 2 * width)[i] = np.float32(MASKED)
        floats(state, 2 * width)[width + i] = np.float32(0)
    for i in range(shape.head_dim * width):
        floats(result, shape.head_dim * width)[i] = np.float32(0)
    _load_queries(shape, heads, q, q_stride, tokens, queries)
    for start in range(0, first + tokens, BLOCK):
        count = min(BLOCK, first + tokens - start)
        _fill_offsets(shape, row, start, count, scratch)
        _prefill_block(heads, queries, keys, values, count, start, state, result, shape.head_dim, scratch)
    _store_values(shape, heads, result, state + 4 * width, tokens, out, out_stride)


def _decode(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 7)
    shape, q, q_stride, k_cache, v_cache = read_block(a[0]), a[1], a[2], a[3], a[4]
    lens = ints64(shape.seq_lens, shape.num_seqs)
    blocks = 0
    for row in range(shape.num_decodes):
        blocks += (lens[row] + BLOCK - 1) // BLOCK
    scratch = shape.scratch + thread * scratch_of(shape.heads, shape.head_dim)
    while True:
        task = next_task(sync, thread, threads, blocks)
        if task < 0:
            return
        row, block = 0, task
        while block >= (lens[row] + BLOCK - 1) // BLOCK:
            block -= (lens[row] + BLOCK - 1) // BLOCK
            row += 1
        count = min(BLOCK, lens[row] - block * BLOCK)
        _fill_offsets(shape, row, block * BLOCK, count, scratch)
        out = shape.partials + 4 * task * shape.heads * (LANES + shape.head_dim)
        _decode_block(shape, q + row * q_stride, k_cache, v_cache, count, scratch, out)


def _finish_decode(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 3)
    shape, out, out_stride = read_block(a[0]), a[1], a[2]
    lens = ints64(shape.seq_lens, shape.num_seqs)
    size = 4 * (LANES + shape.head_dim)
    stride = shape.heads * size
    while True:
        row = next_task(sync, thread, threads, shape.num_decodes)
        if row < 0:
            return
        before = 0
        for other in range(row):
            before += (lens[other] + BLOCK - 1) // BLOCK
        count = (lens[row] + BLOCK - 1) // BLOCK
        for head in range(shape.heads):
            join_decode(shape.partials + before * stride + head * size, stride, count, shape.head_dim // LANES,
                        out + row * out_stride + 4 * shape.head_dim * head)  # fmt: skip


def _prefill(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 7)
    shape, q, q_stride, k_cache, v_cache, out, out_stride = read_block(a[0]), a[1], a[2], a[3], a[4], a[5], a[6]
    lens, starts = ints64(shape.seq_lens, shape.num_seqs), ints64(shape.query_starts, shape.num_seqs + 1)
    group = shape.heads // shape.kv_heads
    tiles = 0
    for row in range(shape.num_decodes, shape.num_seqs):
        tiles += (starts[row + 1] - starts[row] + LANES - 1) // LANES
    scratch = shape.scratch + thread * scratch_of(shape.heads, shape.head_dim)
    while True:
        task = next_task(sync, thread, threads, tiles * shape.kv_heads)
        if task < 0:
            return
        # The longest task first, so that the last ones, for which some threads wait, are short.
        kv_head, tile = task % shape.kv_heads, tiles - 1 - task // shape.kv_heads
        row = shape.num_decodes
        while tile >= (starts[row + 1] - starts[row] + LANES - 1) // LANES:
            tile -= (starts[row + 1] - starts[row] + LANES - 1) // LANES
            row += 1
        tokens = min(LANES, starts[row + 1] - starts[row] - tile * LANES)
        token = starts[row] + tile * LANES
        first = lens[row] - starts[row + 1] + token
        kv = 4 * shape.head_dim * kv_head
        keys, values = k_cache + KEY_GROUP * kv, v_cache + kv
        head = kv_head * group
        while head < (kv_head + 1) * group:
            heads = min((kv_head + 1) * group - head, MAX_TILE_HEADS)
            source = q + token * q_stride + 4 * shape.head_dim * head
            target = out + token * out_stride + 4 * shape.head_dim * head
            _prefill_tile(shape, heads, row, first, tokens, source, q_stride, keys, values, target, out_stride, scratch)
            head += heads


DECODE = PoolJob(_decode)
"""Decode rows; a task is one block of 64 keys of one row. Leaves partial results for FINISH_DECODE. Arguments: the
address of an AttentionBlock; q float32 [tokens, heads, head_dim], scaled with softmax_factor; bytes from a token to
the next; this layer's keys and values; where the result goes, and bytes from a token to the next there."""

FINISH_DECODE = PoolJob(_finish_decode)
"""Joins the blocks of each decode row. Arguments: the address of an AttentionBlock; where the result goes, and bytes
from a token to the next there."""

PREFILL = PoolJob(_prefill)
"""All other sequences' tokens; a task is 16 tokens with the query heads of one key head. Arguments as DECODE."""
