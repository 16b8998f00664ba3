"""Which tokens go to which expert, decided on the device: top-k of the router's scores, and tokens sorted by expert.

A *pair* is (token, one of its experts): pair p belongs to token p // width. Shared experts, which every token
uses, may be appended as experts E, E + 1, ... of weight 1, so that one kernel computes all experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous
from ziphius.kernels.gpu.norm import rms_norm_torch

ALIGN_AT_ONCE = 1024
"""Pairs that one program sorts."""


@dataclass(frozen=True, slots=True)
class Routes:
    """For each token its experts and their weights."""

    ids: Tensor
    """[T, width] int32: the chosen experts, then the shared ones."""
    weights: Tensor
    """[T, width] float32."""


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """Pairs sorted by expert, each expert's padded to whole blocks."""

    pairs: Tensor
    """[blocks * block_size] int32; the number of pairs stands for padding."""
    experts: Tensor
    """[blocks] int32: the expert of each block; -1 for an unused block."""
    block_size: int


@triton.jit
def _choose(scores, expert, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr):
    """Scores outside the best groups become 0. A group has the score of its best expert. scores [G, P] -> [G, P]."""
    if GROUPS > KEPT_GROUPS:
        best = tl.max(scores, axis=1)
        group = tl.arange(0, scores.shape[0])
        # Groups that come before this one: better ones, and among equals the earlier ones.
        before = (best[None, :] > best[:, None]) | (
            (best[None, :] == best[:, None]) & (group[None, :] < group[:, None])
        )
        kept = tl.sum(before.to(tl.int32), axis=1) < KEPT_GROUPS
        scores = tl.where(kept[:, None] & (expert < EXPERTS), scores, 0.0)
    return scores


@triton.jit
def _top_k(logits, ids, weights, token, scale, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
           BLOCK_P: tl.constexpr, KEPT_GROUPS: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr,
           RENORMALIZE: tl.constexpr):  # fmt: skip
    """One token's experts from its logits [EXPERTS]: see kernels.routing_reference.select_experts."""
    WIDTH: tl.constexpr = TOP_K + SHARED
    PER_GROUP: tl.constexpr = EXPERTS // GROUPS
    g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    inside = (g < GROUPS)[:, None] & (p < PER_GROUP)[None, :]
    expert = tl.where(inside, g[:, None] * PER_GROUP + p[None, :], EXPERTS)
    value = tl.load(logits + expert, mask=inside, other=float("-inf"), cache_modifier=".cg")
    value = tl.exp(value - tl.max(tl.max(value, axis=1), axis=0))
    scores = value / tl.sum(tl.sum(value, axis=1), axis=0)
    scores = tl.where(inside, _choose(scores, expert, EXPERTS, GROUPS, KEPT_GROUPS), -1.0)
    # One key for score and id: scores are not negative, so their bits are ordered as they are.
    key = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (EXPERTS - expert).to(tl.int64)
    key = tl.reshape(key, (BLOCK_G * BLOCK_P,))
    slot = tl.arange(0, 16)
    all_ids = EXPERTS + slot - TOP_K
    all_weights = tl.where(slot < TOP_K, 0.0, 1.0)
    total = 0.0
    for i in tl.static_range(TOP_K):
        best = tl.max(key, axis=0)
        score = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        best_id = EXPERTS - (best & 0xFFFFFFFF).to(tl.int32)
        all_ids = tl.where(slot == i, best_id, all_ids)
        all_weights = tl.where(slot == i, score, all_weights)
        total += score
        key = tl.where(key == best, -1, key)
    if RENORMALIZE:
        factor = 1.0 / (total + 1e-20)
    else:
        factor = scale
    all_weights = tl.where(slot < TOP_K, all_weights * factor, all_weights)
    tl.store(ids + token * WIDTH + slot, all_ids, mask=slot < WIDTH)
    tl.store(weights + token * WIDTH + slot, all_weights, mask=slot < WIDTH)


@triton.jit
def _top_k_kernel(logits, ids, weights, counts, scale, EXPERTS: tl.constexpr, GROUPS: tl.constexpr,
                  BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, KEPT_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
                  SHARED: tl.constexpr, RENORMALIZE: tl.constexpr, COUNTS: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """Program t: token t. Program 0 also clears the counts that sorting starts from."""
    allow_next(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    if token == 0:
        at = tl.arange(0, COUNTS)
        tl.store(counts + at, tl.zeros((COUNTS,), tl.int32))
    _top_k(logits + token * EXPERTS, ids, weights, token, scale, EXPERTS, GROUPS, BLOCK_G, BLOCK_P, KEPT_GROUPS,
           TOP_K, SHARED, RENORMALIZE)  # fmt: skip


@triton.jit
def _route_kernel(x, norm_weight, gate, normed, logits, ids, weights, counts, arrivals, columns, stride_x, eps, scale,
                  BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, EXPERTS: tl.constexpr,
                  GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, KEPT_GROUPS: tl.constexpr,
                  TOP_K: tl.constexpr, SHARED: tl.constexpr, RENORMALIZE: tl.constexpr, COUNTS: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """Norm, router and top-k of a few tokens in one launch. Grid: expert blocks, tokens.

    The last program that stores logits of a token chooses its experts. Columns as in gemv: BLOCK_A + BLOCK_B.
    """
    block = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    row = gate + tl.minimum(e, EXPERTS - 1).to(tl.int64)[:, None] * columns
    a = tl.arange(0, BLOCK_A)
    gate_a = tl.load(row + a[None, :])
    norm_a = tl.load(norm_weight + a).to(tl.float32)
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        inside = b < columns
        gate_b = tl.load(row + b[None, :], mask=inside[None, :], other=0.0)
        norm_b = tl.load(norm_weight + b, mask=inside, other=0.0).to(tl.float32)
    allow_next(PDL)
    wait_for_previous(PDL)
    x_a = tl.load(x + token * stride_x + a).to(tl.float32)
    squares = tl.sum(x_a * x_a, axis=0)
    if BLOCK_B > 0:
        x_b = tl.load(x + token * stride_x + b, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x_b * x_b, axis=0)
    root = tl.rsqrt(squares / columns + eps)
    # Rounded as the experts will read it, so that the router reads the same values.
    x_a = ((x_a * root).to(normed.dtype.element_ty).to(tl.float32) * norm_a).to(normed.dtype.element_ty)
    if block == 0:
        tl.store(normed + token * columns + a, x_a)
    score = tl.sum(gate_a.to(tl.float32) * x_a.to(tl.float32)[None, :], axis=1)
    if BLOCK_B > 0:
        x_b = ((x_b * root).to(normed.dtype.element_ty).to(tl.float32) * norm_b).to(normed.dtype.element_ty)
        if block == 0:
            tl.store(normed + token * columns + b, x_b, mask=inside)
        score += tl.sum(gate_b.to(tl.float32) * x_b.to(tl.float32)[None, :], axis=1)
    tl.store(logits + token * EXPERTS + e, score, mask=e < EXPERTS)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + token, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(arrivals + token, 0)
        if token == 0:
            at = tl.arange(0, COUNTS)
            tl.store(counts + at, tl.zeros((COUNTS,), tl.int32))
        _top_k(logits + token * EXPERTS, ids, weights, token, scale, EXPERTS, GROUPS, BLOCK_G, BLOCK_P, KEPT_GROUPS,
               TOP_K, SHARED, RENORMALIZE)  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "num_sorted"])
def _count_kernel(ids, ranks, counts, sorted_pairs, num_pairs, num_sorted, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Each pair's place among its expert's pairs, in no particular order; and padding into `sorted_pairs`."""
    allow_next(PDL)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    expert = tl.load(ids + pair, mask=pair < num_pairs, other=0)
    rank = tl.atomic_add(counts + expert, 1, mask=pair < num_pairs, sem="relaxed")
    tl.store(ranks + pair, rank, mask=pair < num_pairs)
    for start in tl.range(tl.program_id(0) * BLOCK, num_sorted, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(sorted_pairs + at, tl.full((BLOCK,), num_pairs, tl.int32), mask=at < num_sorted)


@triton.jit
def _place(ids, ranks, counts, sorted_pairs, block_experts, num_pairs, num_blocks, first, EXPERTS: tl.constexpr,
           BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Put pairs from `first` on into their places. counts [EXPERTS] give each expert's blocks.

    Only the first program writes the experts of the blocks.
    """
    e = tl.arange(0, EXPERTS)
    blocks = tl.cdiv(tl.load(counts + e, cache_modifier=".cg"), BLOCK_SIZE)
    ends = tl.cumsum(blocks, axis=0)
    starts = ends - blocks
    pair = first + tl.arange(0, BLOCK)
    expert = tl.load(ids + pair, mask=pair < num_pairs, other=0)
    rank = tl.load(ranks + pair, mask=pair < num_pairs, other=0, cache_modifier=".cg")
    to = tl.gather(starts, expert, axis=0) * BLOCK_SIZE + rank
    tl.store(sorted_pairs + to, pair, mask=pair < num_pairs)
    if first == 0:
        for i in tl.range(0, tl.max(blocks, axis=0)):
            tl.store(block_experts + starts + i, e, mask=i < blocks)
        for start in tl.range(tl.sum(blocks, axis=0), num_blocks, BLOCK):
            unused = start + tl.arange(0, BLOCK)
            tl.store(block_experts + unused, tl.full((BLOCK,), -1, tl.int32), mask=unused < num_blocks)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _place_kernel(ids, ranks, counts, sorted_pairs, block_experts, num_pairs, num_blocks, EXPERTS: tl.constexpr,
                  BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    allow_next(PDL)
    wait_for_previous(PDL)
    _place(ids, ranks, counts, sorted_pairs, block_experts, num_pairs, num_blocks, tl.program_id(0) * BLOCK, EXPERTS,
           BLOCK_SIZE, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "num_sorted", "num_blocks"])
def _align_kernel(ids, ranks, counts, sorted_pairs, block_experts, num_pairs, num_sorted, num_blocks,
                  EXPERTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """Count and place in one program, for a decode batch."""
    allow_next(PDL)
    pair = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    expert = tl.load(ids + pair, mask=pair < num_pairs, other=0)
    rank = tl.atomic_add(counts + expert, 1, mask=pair < num_pairs, sem="relaxed")
    tl.store(ranks + pair, rank, mask=pair < num_pairs)
    for start in tl.range(0, num_sorted, BLOCK):
        tl.store(sorted_pairs + start + pair, tl.full((BLOCK,), num_pairs, tl.int32), mask=start + pair < num_sorted)
    tl.debug_barrier()
    _place(ids, ranks, counts, sorted_pairs, block_experts, num_pairs, num_blocks, 0, EXPERTS, BLOCK_SIZE, BLOCK)


@dataclass(frozen=True, slots=True)
class RouteWorkspace:
    """Small device memory that routing works in; belongs to one stream."""

    counts: Tensor
    """[padded experts] int32."""
    arrivals: Tensor
    """[tokens that _route_kernel takes] int32, zero between kernels."""

    @classmethod
    def on(cls, device: torch.device) -> RouteWorkspace:
        return cls(*(torch.zeros(1024, dtype=torch.int32, device=device) for _ in range(2)))


def top_k(gpu: GpuDevice, logits: Tensor, moe: MoEConfig, shared: int, workspace: RouteWorkspace) -> Routes:
    """logits [T, experts] float32 -> routes of moe.num_experts_per_tok + shared pairs a token."""
    routes = _empty_routes(logits.shape[0], moe, shared, logits.device)
    if logits.shape[0]:
        _top_k_kernel[(logits.shape[0],)](
            logits, routes.ids, routes.weights, workspace.counts, moe.routed_scaling_factor,
            **_top_k_shape(moe, shared), num_warps=1, **gpu.overlap,
        )  # fmt: skip
    return routes


def route(
    gpu: GpuDevice,
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    moe: MoEConfig,
    shared: int,
    workspace: RouteWorkspace,
) -> tuple[Tensor, Routes]:
    """x [T, hidden] of a few tokens, not normed; gate [experts, hidden] -> (normed x, routes), in one launch."""
    tokens, columns = x.shape
    routes = _empty_routes(tokens, moe, shared, x.device)
    normed = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    logits = torch.empty((tokens, moe.n_routed_experts), dtype=torch.float32, device=x.device)
    block_a = 1 << (columns.bit_length() - 1)
    block_b = triton.next_power_of_2(columns - block_a) if columns > block_a else 0
    block_e = 2 if tokens <= 2 else 4
    _route_kernel[(triton.cdiv(moe.n_routed_experts, block_e), tokens)](
        x, norm_weight, gate, normed, logits, routes.ids, routes.weights, workspace.counts, workspace.arrivals,
        columns, x.stride(0), eps, moe.routed_scaling_factor, BLOCK_E=block_e, BLOCK_A=block_a,
        BLOCK_B=block_b, **_top_k_shape(moe, shared), num_warps=4 if block_e * columns <= 12288 else 8, **gpu.overlap,
    )  # fmt: skip
    return normed, routes


def align(gpu: GpuDevice, routes: Routes, experts: int, block_size: int, workspace: RouteWorkspace) -> ExpertBlocks:
    """Sort pairs by expert into blocks. `experts` counts the shared ones where routes have them.

    The order inside an expert is arbitrary: no result depends on it, because a row of a product does not depend on its
    place. workspace.counts must be zero: `top_k` and `route` leave it so.
    """
    pairs = routes.ids.numel()
    # Each expert that is hit wastes less than a block, and no more experts are hit than there are pairs.
    blocks = min(pairs, experts + pairs // block_size)
    device = routes.ids.device
    ranks = torch.empty(pairs, dtype=torch.int32, device=device)
    out = ExpertBlocks(
        torch.empty(blocks * block_size, dtype=torch.int32, device=device),
        torch.empty(blocks, dtype=torch.int32, device=device),
        block_size,
    )
    sizes = {"EXPERTS": _padded(experts), "BLOCK_SIZE": block_size}
    buffers = (routes.ids, ranks, workspace.counts, out.pairs)
    if pairs <= ALIGN_AT_ONCE:
        block = max(32, triton.next_power_of_2(pairs))
        _align_kernel[(1,)](
            *buffers, out.experts, pairs, blocks * block_size, blocks, BLOCK=block, num_warps=8, **sizes, **gpu.overlap
        )
        return out
    grid = (triton.cdiv(pairs, ALIGN_AT_ONCE),)
    _count_kernel[grid](*buffers, pairs, blocks * block_size, BLOCK=ALIGN_AT_ONCE, num_warps=8, **gpu.overlap)
    _place_kernel[grid](*buffers, out.experts, pairs, blocks, BLOCK=ALIGN_AT_ONCE, num_warps=8, **sizes, **gpu.overlap)
    return out


def route_torch(
    x: Tensor, norm_weight: Tensor, eps: float, gate: Tensor, moe: MoEConfig, shared: int
) -> tuple[Tensor, Routes]:
    """`route` in plain torch. From the logits on it is `top_k`."""
    from ziphius.kernels.routing_reference import select_experts

    normed = rms_norm_torch(x, norm_weight, eps)
    weights, ids = select_experts(normed.float() @ gate.float().t(), moe)
    extra = moe.n_routed_experts + torch.arange(shared, device=x.device).expand(x.shape[0], -1)
    ids = torch.cat((ids, extra), dim=1)
    weights = torch.cat((weights, weights.new_ones(extra.shape)), dim=1)
    return normed, Routes(ids.int(), weights)


def _empty_routes(tokens: int, moe: MoEConfig, shared: int, device: torch.device) -> Routes:
    shape = (tokens, moe.num_experts_per_tok + shared)
    return Routes(
        torch.empty(shape, dtype=torch.int32, device=device), torch.empty(shape, dtype=torch.float32, device=device)
    )


def _padded(experts: int) -> int:
    return triton.next_power_of_2(experts)


def _top_k_shape(moe: MoEConfig, shared: int) -> dict[str, int | bool]:
    grouped = moe.topk_method == "group_limited_greedy"
    groups = moe.n_group if grouped else 1
    return {
        "EXPERTS": moe.n_routed_experts,
        "GROUPS": groups,
        "BLOCK_G": triton.next_power_of_2(groups),
        "BLOCK_P": triton.next_power_of_2(moe.n_routed_experts // groups),
        "KEPT_GROUPS": moe.topk_group if grouped else 1,
        "TOP_K": moe.num_experts_per_tok,
        "SHARED": shared,
        "RENORMALIZE": moe.norm_topk_prob and moe.num_experts_per_tok > 1,
        "COUNTS": _padded(moe.n_routed_experts + shared),
    }
