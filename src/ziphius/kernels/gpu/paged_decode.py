"""Decode attention over a paged cache, split over the sequence: latent attention (MLA) and grouped queries (GQA).

Each (token, group of heads, split) is one program; every split writes its own normalised sum and the log of its
weight (base 2), and the next kernel combines them. The number of splits depends on the batch, unless a fixed length
is given: then a token's sums are split at the same places whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous

_LOG2E = 1.4426950408889634
FIXED_SPLIT = 1024
"""Tokens of a split when the splits may not depend on the batch."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How sequences are split."""

    splits: int
    chunk: int
    """Tokens of a split. 0: each sequence is split evenly."""


@dataclass(frozen=True, slots=True)
class Paged:
    """Where the sequences of a decode batch are in the cache."""

    page_table: Tensor
    """[T, pages] int32."""
    seq_lens: Tensor
    """[T] int32, at least 1 each."""
    page_size: int


@dataclass(frozen=True, slots=True)
class Parts:
    """The results of the splits."""

    sums: Tensor
    """[T, H, splits, D], each normalised; with one split in the queries' type, else float32."""
    logs: Tensor
    """[T, H, splits] float32: log2 of each split's weight, -inf for an empty one."""


def split_plan(programs: int, longest: int, processors: int, *, fixed: int | None = None) -> SplitPlan:
    """`programs` without splitting; `longest`: tokens of the longest sequence there may be; `fixed`: see SplitPlan."""
    if fixed is not None:
        return SplitPlan(triton.next_power_of_2(triton.cdiv(longest, fixed)), fixed)
    wanted = max(1, min(64, 2 * processors // max(1, programs)))
    return SplitPlan(fewer_splits(1 << (wanted.bit_length() - 1), longest), 0)


def fewer_splits(splits: int, longest: int) -> int:
    """`splits`, or fewer so that each has at least 32 tokens."""
    while splits > 1 and splits * 32 > longest:
        splits //= 2
    return splits


@triton.jit
def _bounds(length, split, splits, chunk, BLOCK: tl.constexpr):
    """(first, end) of this split's tokens."""
    even = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    first = split * tl.where(chunk == 0, even, chunk)
    return first, tl.minimum(first + tl.where(chunk == 0, even, chunk), length)


@triton.jit
def _mine(seq_lens, splits, chunk, HEADS: tl.constexpr, EACH: tl.constexpr, BLOCK_H: tl.constexpr,
          BLOCK_KV: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Begin, on a grid of tokens, EACH heads, splits: (token, heads, where their parts go, first and end of the keys).

    Heads and parts are [BLOCK_H]; some may lie beyond EACH or HEADS.
    """
    allow_next(PDL)
    t = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    h = tl.program_id(1) * EACH + tl.arange(0, BLOCK_H)
    wait_for_previous(PDL)
    first, end = _bounds(tl.load(seq_lens + t), split, splits, chunk, BLOCK_KV)
    return t, h, (t * HEADS + h) * splits + split, first, end


@triton.jit
def _pages(page_at, start, end, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The pages with tokens start, ... of a sequence: one if it holds all BLOCK tokens, else as many as needed."""
    if PAGE % BLOCK == 0:
        pages = tl.load(page_at + start // PAGE, mask=start < end, other=0)
    else:
        EACH: tl.constexpr = PAGE if BLOCK % PAGE == 0 else 1
        at = start + tl.arange(0, BLOCK // EACH) * EACH
        pages = tl.load(page_at + at // PAGE, mask=at < end, other=0)
    return pages


@triton.jit
def _slots(pages, start, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK]: the slots of those tokens. A lookup for each row would cost more instructions than its products."""
    j = tl.arange(0, BLOCK)
    if PAGE % BLOCK == 0:
        slots = pages.to(tl.int64) * PAGE + start % PAGE + j
    elif BLOCK % PAGE == 0:
        slots = tl.reshape(pages.to(tl.int64)[:, None] * PAGE + tl.arange(0, PAGE)[None, :], (BLOCK,))
    else:
        slots = pages.to(tl.int64) * PAGE + (start + j) % PAGE
    return slots


@triton.jit
def _weigh(scores, seen, highest, weights, AXIS: tl.constexpr):
    """A round's scores (log2), of which AXIS is the tokens' -> (weights, factor of older sums, highest, sums).

    The sum of weights is kept for each position of a block, and added up once, after the last round.
    """
    scores = tl.where(tl.expand_dims(seen, 1 - AXIS), scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=AXIS))
    faded = tl.expand_dims(tl.exp2(highest - higher), AXIS)
    scores = tl.exp2(scores - tl.expand_dims(higher, AXIS))
    return scores, faded, higher, weights * faded + scores


@triton.jit(do_not_specialize=["stride_table", "splits", "chunk"])
def _mla_kernel(q, cache, page_table, seq_lens, sums, logs, scale, stride_table, splits, chunk,
                HEADS: tl.constexpr, LORA: tl.constexpr, ROPE: tl.constexpr, BLOCK_R: tl.constexpr,
                PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """Grid: tokens, head blocks, splits. A cache row is key and, but for its rotary part, value of every head.

    The latent is read as two halves, and a score is three sums: with few heads each sum is a chain of products
    that wait for each other, and a single chain would leave the tensor cores idle.
    """
    HALF: tl.constexpr = LORA // 2
    c, r, j = tl.arange(0, HALF), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_KV)
    t, h, part, first, end = _mine(seq_lens, splits, chunk, HEADS, BLOCK_H, BLOCK_H, BLOCK_KV, PDL)
    if first >= end:
        tl.store(logs + part, tl.full((BLOCK_H,), float("-inf"), tl.float32), mask=h < HEADS)
    else:
        q_at = q + (t * HEADS + tl.minimum(h, HEADS - 1))[:, None] * (LORA + ROPE)
        q_low, q_high = tl.load(q_at + c[None, :]), tl.load(q_at + HALF + c[None, :])
        q_pe = tl.load(q_at + LORA + r[None, :], mask=(r < ROPE)[None, :], other=0.0)
        highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        weights = tl.zeros((BLOCK_H, BLOCK_KV), tl.float32)
        low, high = tl.zeros((BLOCK_H, HALF), tl.float32), tl.zeros((BLOCK_H, HALF), tl.float32)
        # Pages are looked up one round ahead, so that the rows' addresses are known when their loads can start.
        page_at = page_table + t * stride_table
        pages = _pages(page_at, first, end, PAGE, BLOCK_KV)
        for start in tl.range(first, end, BLOCK_KV, num_stages=STAGES):
            seen = start + j < end
            row = cache + _slots(pages, start, PAGE, BLOCK_KV)[:, None] * (LORA + ROPE)
            pages = _pages(page_at, start + BLOCK_KV, end, PAGE, BLOCK_KV)
            latent_low = tl.load(row + c[None, :], mask=seen[:, None], other=0.0)
            latent_high = tl.load(row + HALF + c[None, :], mask=seen[:, None], other=0.0)
            k_pe = tl.load(row + LORA + r[None, :], mask=seen[:, None] & (r < ROPE)[None, :], other=0.0)
            # Each is scaled by itself: the compiler would turn a plain sum of products into one chain.
            scores = tl.dot(q_low, tl.trans(latent_low), input_precision="ieee") * scale
            scores += tl.dot(q_high, tl.trans(latent_high), input_precision="ieee") * scale
            scores += tl.dot(q_pe, tl.trans(k_pe), input_precision="ieee") * scale
            scores, faded, highest, weights = _weigh(scores, seen, highest, weights, 1)
            scores = scores.to(latent_low.dtype)
            low = tl.dot(scores, latent_low, low * faded, input_precision="ieee")
            high = tl.dot(scores, latent_high, high * faded, input_precision="ieee")
        weight = tl.sum(weights, axis=1)
        sum_at = sums + part[:, None] * LORA + c[None, :]
        tl.store(sum_at, (low / weight[:, None]).to(sums.dtype.element_ty), mask=(h < HEADS)[:, None])
        tl.store(sum_at + HALF, (high / weight[:, None]).to(sums.dtype.element_ty), mask=(h < HEADS)[:, None])
        tl.store(logs + part, highest + tl.log2(weight), mask=h < HEADS)


@triton.jit(do_not_specialize=["stride_table", "splits", "chunk"])
def _mla_keys_first_kernel(
    q, cache, page_table, seq_lens, sums, logs, scale, stride_table, splits, chunk, HEADS: tl.constexpr,
    LORA: tl.constexpr, ROPE: tl.constexpr, BLOCK_R: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_mla_kernel`, with cache rows as the tensor cores' first operand: few heads leave most of a tile empty then.

    Scores are [BLOCK_KV, BLOCK_H], sums [LORA, BLOCK_H]. On Hopper these are products of whole warp groups, which
    run a chain well but wait after each call, so there are few calls.
    """
    c, r, j = tl.arange(0, LORA), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_KV)
    t, h, part, first, end = _mine(seq_lens, splits, chunk, HEADS, BLOCK_H, BLOCK_H, BLOCK_KV, PDL)
    if first >= end:
        tl.store(logs + part, tl.full((BLOCK_H,), float("-inf"), tl.float32), mask=h < HEADS)
    else:
        q_at = q + (t * HEADS + tl.minimum(h, HEADS - 1))[:, None] * (LORA + ROPE)
        q_latent = tl.load(q_at + c[None, :])
        q_pe = tl.load(q_at + LORA + r[None, :], mask=(r < ROPE)[None, :], other=0.0)
        highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        weights = tl.zeros((BLOCK_KV, BLOCK_H), tl.float32)
        acc = tl.zeros((LORA, BLOCK_H), tl.float32)
        page_at = page_table + t * stride_table
        pages = _pages(page_at, first, end, PAGE, BLOCK_KV)
        for start in tl.range(first, end, BLOCK_KV, num_stages=STAGES):
            seen = start + j < end
            row = cache + _slots(pages, start, PAGE, BLOCK_KV)[:, None] * (LORA + ROPE)
            pages = _pages(page_at, start + BLOCK_KV, end, PAGE, BLOCK_KV)
            latent = tl.load(row + c[None, :], mask=seen[:, None], other=0.0)
            k_pe = tl.load(row + LORA + r[None, :], mask=seen[:, None] & (r < ROPE)[None, :], other=0.0)
            scores = tl.dot(latent, tl.trans(q_latent), input_precision="ieee")
            scores = tl.dot(k_pe, tl.trans(q_pe), scores, input_precision="ieee") * scale
            scores, faded, highest, weights = _weigh(scores, seen, highest, weights, 0)
            acc = tl.dot(tl.trans(latent), scores.to(latent.dtype), acc * faded, input_precision="ieee")
        weight = tl.sum(weights, axis=0)
        acc = tl.trans(acc / weight[None, :])
        tl.store(sums + part[:, None] * LORA + c[None, :], acc.to(sums.dtype.element_ty), mask=(h < HEADS)[:, None])
        tl.store(logs + part, highest + tl.log2(weight), mask=h < HEADS)


@triton.jit(do_not_specialize=["stride_table", "splits", "chunk"])
def _gqa_kernel(q, k_cache, v_cache, page_table, seq_lens, sums, logs, scale, stride_q, stride_table, splits, chunk,
                HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
                BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """Grid: tokens, key heads, splits. GROUP query heads share a key head."""
    key_head = tl.program_id(1)
    g, d, j = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_KV)
    t, h, part, first, end = _mine(seq_lens, splits, chunk, HEADS, GROUP, BLOCK_H, BLOCK_KV, PDL)
    if first >= end:
        tl.store(logs + part, tl.full((BLOCK_H,), float("-inf"), tl.float32), mask=g < GROUP)
    else:
        queries = tl.load(q + t * stride_q + tl.minimum(h, HEADS - 1)[:, None] * DIM + d[None, :],
                          mask=(d < DIM)[None, :], other=0.0)  # fmt: skip
        highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        weights = tl.zeros((BLOCK_H, BLOCK_KV), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        page_at = page_table + t * stride_table
        pages = _pages(page_at, first, end, PAGE, BLOCK_KV)
        for start in tl.range(first, end, BLOCK_KV, num_stages=STAGES):
            seen = start + j < end
            slot = _slots(pages, start, PAGE, BLOCK_KV)
            pages = _pages(page_at, start + BLOCK_KV, end, PAGE, BLOCK_KV)
            at = (slot * (HEADS // GROUP) + key_head)[:, None] * DIM + d[None, :]
            inside = seen[:, None] & (d < DIM)[None, :]
            keys = tl.load(k_cache + at, mask=inside, other=0.0)
            values = tl.load(v_cache + at, mask=inside, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            scores, faded, highest, weights = _weigh(scores, seen, highest, weights, 1)
            acc = tl.dot(scores.to(values.dtype), values, acc * faded, input_precision="ieee")
        weight = tl.sum(weights, axis=1)
        at = sums + part[:, None] * DIM + d[None, :]
        inside = (g < GROUP)[:, None] & (d < DIM)[None, :]
        tl.store(at, (acc / weight[:, None]).to(sums.dtype.element_ty), mask=inside)
        tl.store(logs + part, highest + tl.log2(weight), mask=g < GROUP)


@dataclass(frozen=True, slots=True)
class MLADecodeConfig:
    """The tiling of latent attention."""

    block_h: int
    """Query heads a program takes: more heads read the cache less often, and need more registers."""
    block_kv: int = 32
    stages: int = 3
    warps: int = 4
    keys_first: bool = False
    """Whether the cache's rows are the first operand, which suits few heads."""


def mla_config(heads: int, element_size: int) -> MLADecodeConfig:
    """The tiling where nothing was measured. With few heads a processor has room for a second program."""
    return MLADecodeConfig(16 if heads <= 32 else 32, 16 if element_size == 4 else 32, 3, 4 if heads <= 32 else 8)


def mla_parts(
    gpu: GpuDevice,
    q: Tensor,
    cache: Tensor,
    paged: Paged,
    scale: float,
    plan: SplitPlan,
    config: MLADecodeConfig | None = None,
) -> Parts:
    """q [T, H, lora + rope] (decode_inputs), cache [slots, lora + rope]; lora: a power of two, 32 at least."""
    tokens, heads, width = q.shape
    lora = 1 << (width.bit_length() - 1)
    rope = width - lora
    parts = _empty_parts(tokens, heads, plan, lora, q)
    config = config or mla_config(heads, q.element_size())
    kernel = _mla_keys_first_kernel if config.keys_first else _mla_kernel
    kernel[(tokens, triton.cdiv(heads, config.block_h), plan.splits)](
        q, cache, paged.page_table, paged.seq_lens, parts.sums, parts.logs, scale * _LOG2E,
        paged.page_table.stride(0), plan.splits, plan.chunk, HEADS=heads, LORA=lora, ROPE=rope,
        BLOCK_R=max(16, triton.next_power_of_2(rope)), PAGE=paged.page_size, BLOCK_H=config.block_h,
        BLOCK_KV=config.block_kv, STAGES=config.stages, num_warps=config.warps, **gpu.overlap,
    )  # fmt: skip
    return parts


def gqa_parts(
    gpu: GpuDevice, q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: Paged, scale: float, plan: SplitPlan
) -> Parts:
    """q [T, H, D], rows may be strided; caches [slots, KH, D]."""
    tokens, heads, dim = q.shape
    group = heads // k_cache.shape[1]
    parts = _empty_parts(tokens, heads, plan, dim, q)
    _gqa_kernel[(tokens, k_cache.shape[1], plan.splits)](
        q, k_cache, v_cache, paged.page_table, paged.seq_lens, parts.sums, parts.logs, scale * _LOG2E, q.stride(0),
        paged.page_table.stride(0), plan.splits, plan.chunk, HEADS=heads, GROUP=group, DIM=dim, PAGE=paged.page_size,
        BLOCK_H=max(16, triton.next_power_of_2(group)), BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_KV=64,
        STAGES=2, num_warps=4, **gpu.overlap,
    )  # fmt: skip
    return parts


def mla_parts_torch(q: Tensor, cache: Tensor, paged: Paged, scale: float, plan: SplitPlan) -> Parts:
    """The same in plain torch, token by token."""
    lora = 1 << (q.shape[2].bit_length() - 1)
    return _parts_torch(
        q, lambda slots: (cache[slots].unsqueeze(1), cache[slots, :lora].unsqueeze(1)), paged, scale, plan
    )


def gqa_parts_torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: Paged, scale: float, plan: SplitPlan) -> Parts:
    """The same in plain torch, token by token."""
    return _parts_torch(q, lambda slots: (k_cache[slots], v_cache[slots]), paged, scale, plan)


def _parts_torch(
    q: Tensor, read: Callable[[Tensor], tuple[Tensor, Tensor]], paged: Paged, scale: float, plan: SplitPlan
) -> Parts:
    parts: Parts | None = None
    for t, length in enumerate(paged.seq_lens.tolist()):
        position = torch.arange(length, device=q.device)
        slots = paged.page_table[t, position // paged.page_size].long() * paged.page_size + position % paged.page_size
        keys, values = read(slots)  # [length, KH, D], [length, KH, V]
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1).float() for x in (keys, values))
        scores = torch.einsum("hd,lhd->hl", q[t].float(), keys) * (scale * _LOG2E)
        if parts is None:
            parts = _empty_parts(q.shape[0], q.shape[1], plan, values.shape[2], q)
        chunk = plan.chunk or -(-(-(-length // plan.splits)) // 16) * 16
        for split in range(plan.splits):
            mine = scores[:, split * chunk : (split + 1) * chunk]
            if mine.shape[1] == 0:
                parts.logs[t, :, split] = float("-inf")
                continue
            parts.logs[t, :, split] = torch.logsumexp(mine * 0.6931471805599453, dim=1) * _LOG2E
            weights = (mine * 0.6931471805599453).softmax(dim=1)
            parts.sums[t, :, split] = torch.einsum("hl,lhd->hd", weights, values[split * chunk : (split + 1) * chunk])
    assert parts is not None
    return parts


def _empty_parts(tokens: int, heads: int, plan: SplitPlan, dim: int, q: Tensor) -> Parts:
    dtype = q.dtype if plan.splits == 1 else torch.float32
    return Parts(
        torch.empty((tokens, heads, plan.splits, dim), dtype=dtype, device=q.device),
        torch.empty((tokens, heads, plan.splits), dtype=torch.float32, device=q.device),
    )
