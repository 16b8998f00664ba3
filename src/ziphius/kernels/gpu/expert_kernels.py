"""The experts' device code: what each program of a launch computes. experts.py launches it and explains it."""

from __future__ import annotations

import triton
import triton.language as tl

from ziphius.kernels.gpu.device import allow_next, wait_for_previous


@triton.jit
def _expert_gate(expert, gate_up, shared_gate_up, hidden, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
                 SHARED: tl.constexpr):  # fmt: skip
    """(first row of this expert's gate, rows from gate to up)."""
    base = gate_up + expert.to(tl.int64) * (2 * WIDTH * hidden)
    apart = WIDTH
    if SHARED > 0:
        if expert >= EXPERTS:
            base = shared_gate_up + (expert - EXPERTS).to(tl.int64) * WIDTH * hidden
            apart = SHARED * WIDTH
    return base, apart


@triton.jit
def _expert_down(expert, down, shared_down, hidden, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr):
    """(this expert's first value, values from one row to the next)."""
    base = down + expert.to(tl.int64) * (WIDTH * hidden)
    stride = WIDTH
    if SHARED > 0:
        if expert >= EXPERTS:
            base = shared_down + (expert - EXPERTS) * WIDTH
            stride = SHARED * WIDTH
    return base, stride


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_kernel(x, gate_up, shared_gate_up, act, pairs, block_experts, num_pairs, hidden, stride_x,
                    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, PAIRS_PER_TOKEN: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                    EVEN_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """act[p] = silu(gate x) * (up x) of pair p's expert and token. Grid: width blocks, expert blocks.

    The weights are the tensor cores' first operand, so that few tokens do not leave most of a tile empty. One tile
    holds BLOCK_N gate rows above the BLOCK_N up rows that belong to them.
    """
    block = tl.program_id(1)
    r = tl.arange(0, 2 * BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    wait_for_previous(PDL)
    allow_next(PDL)
    expert = tl.load(block_experts + block)
    if expert >= 0:
        pair = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
        used = pair < num_pairs
        token = tl.where(used, pair // PAIRS_PER_TOKEN, 0)
        base, apart = _expert_gate(expert, gate_up, shared_gate_up, hidden, EXPERTS, WIDTH, SHARED)
        first = tl.program_id(0) * BLOCK_N
        row = tl.minimum(first + r % BLOCK_N, WIDTH - 1) + r // BLOCK_N * apart
        w_at = base + row[:, None] * hidden + k[None, :]
        x_at = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
        acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
        for start in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                x_tile = tl.load(x_at + start)
                w_tile = tl.load(w_at + start)
            else:
                inside = (start + k < hidden)[None, :]
                x_tile = tl.load(x_at + start, mask=inside, other=0.0)
                w_tile = tl.load(w_at + start, mask=inside, other=0.0)
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="ieee")
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_M)), (2, 1, 0)))
        value = gate / (1.0 + tl.exp(-gate)) * up
        n = first + tl.arange(0, BLOCK_N)
        at = act + pair.to(tl.int64)[:, None] * WIDTH + n[None, :]
        tl.store(at, value.to(act.dtype.element_ty), mask=used[:, None] & (n < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def down_kernel(act, down, shared_down, out, weights, pairs, block_experts, num_pairs, hidden,
                 EXPERTS: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
                 STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[p] = weight of pair p x (down act[p]). Grid: groups of TILES hidden blocks, expert blocks.

    A product of so few columns ends before its loads arrive. So one loop runs over the columns of all TILES blocks, and
    the next block's weights are being loaded while this block is stored.
    """
    STEPS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    allow_next(PDL)
    block = tl.program_id(1)
    m, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    wait_for_previous(PDL)
    expert = tl.load(block_experts + block)
    if expert >= 0:
        pair = tl.load(pairs + block * BLOCK_M + m)
        used = pair < num_pairs
        source = tl.where(used, pair, 0)
        base, stride = _expert_down(expert, down, shared_down, hidden, EXPERTS, WIDTH, SHARED)
        share = tl.load(weights + source)
        act_at = act + source.to(tl.int64)[:, None] * WIDTH + k[None, :]
        out_at = out + pair.to(tl.int64)[:, None] * hidden
        first = tl.program_id(0) * TILES * BLOCK_N + j
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.range(0, TILES * STEPS, num_stages=STAGES):
            n = first + i // STEPS * BLOCK_N
            start = i % STEPS * BLOCK_K
            down_at = base + tl.minimum(n, hidden - 1)[:, None] * stride + (start + k)[None, :]
            if WIDTH % BLOCK_K == 0:
                act_tile = tl.load(act_at + start)
                down_tile = tl.load(down_at)
            else:
                inside = (start + k < WIDTH)[None, :]
                act_tile = tl.load(act_at + start, mask=inside, other=0.0)
                down_tile = tl.load(down_at, mask=inside, other=0.0)
            acc = tl.dot(down_tile, tl.trans(act_tile), acc, input_precision="ieee")
            if i % STEPS == STEPS - 1:
                value = tl.trans(acc) * share[:, None]
                inside_out = used[:, None] & (n < hidden)[None, :]
                tl.store(out_at + n[None, :], value.to(out.dtype.element_ty), mask=inside_out)
                acc = tl.zeros_like(acc)


@triton.jit
def sum_pairs_kernel(pair_out, residual, y, hidden, stride_r, PAIRS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
                     RESIDUAL: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[t] = residual[t] + the sum of token t's pairs, in their order."""
    allow_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    wait_for_previous(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PAIRS_PER_TOKEN):
        pair = token * PAIRS_PER_TOKEN + i
        total += tl.load(pair_out + pair * hidden + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + token * stride_r + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def pair_gate_up_kernel(x, gate_up, shared_gate_up, act, ids, hidden, stride_x, EXPERTS: tl.constexpr,
                         WIDTH: tl.constexpr, SHARED: tl.constexpr, PAIRS_PER_TOKEN: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
                         PDL: tl.constexpr):  # fmt: skip
    """Few tokens: each pair by itself, a matrix times a vector. Grid: pairs, width blocks.

    The pair is the fastest index, so that two pairs of one expert read it at the same time, the second from L2.
    """
    pair = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = tl.arange(0, BLOCK_A)
    # Shared experts are known before the routes, so their weights are loaded while the routes are still computed.
    chosen = pair % PAIRS_PER_TOKEN < PAIRS_PER_TOKEN - SHARED
    if chosen:
        wait_for_previous(PDL)
        allow_next(PDL)
    known = EXPERTS + pair % PAIRS_PER_TOKEN - (PAIRS_PER_TOKEN - SHARED)
    expert = tl.load(ids + pair, mask=chosen, other=known)
    base, apart = _expert_gate(expert, gate_up, shared_gate_up, hidden, EXPERTS, WIDTH, SHARED)
    row = tl.minimum(n, WIDTH - 1)
    gate_at = base + row[:, None] * hidden
    up_at = base + (row + apart)[:, None] * hidden
    x_at = x + (pair // PAIRS_PER_TOKEN).to(tl.int64) * stride_x
    gate_a = tl.load(gate_at + a[None, :], eviction_policy="evict_first")
    up_a = tl.load(up_at + a[None, :], eviction_policy="evict_first")
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        inside = b < hidden
        gate_b = tl.load(gate_at + b[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        up_b = tl.load(up_at + b[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
    if not chosen:
        wait_for_previous(PDL)
        allow_next(PDL)
    x_a = tl.load(x_at + a).to(tl.float32)[None, :]
    gate = tl.sum(gate_a.to(tl.float32) * x_a, axis=1)
    up = tl.sum(up_a.to(tl.float32) * x_a, axis=1)
    if BLOCK_B > 0:
        x_b = tl.load(x_at + b, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(gate_b.to(tl.float32) * x_b, axis=1)
        up += tl.sum(up_b.to(tl.float32) * x_b, axis=1)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(act + pair * WIDTH + n, value.to(act.dtype.element_ty), mask=n < WIDTH)


@triton.jit
def pair_down_kernel(act, down, shared_down, residual, y, ids, weights, hidden, stride_r, EXPERTS: tl.constexpr,
                     WIDTH: tl.constexpr, SHARED: tl.constexpr, PAIRS_PER_TOKEN: tl.constexpr,
                     BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
                     RESIDUAL: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[t] = residual[t] + sum over token t's pairs of weight x (down act). Grid: tokens, hidden blocks.

    All rows of all pairs are loaded at once, before the activations are there. The routes can be read so early,
    because the kernel before this one has waited for the routes before it lets this one start.
    """
    allow_next(PDL)
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, hidden - 1)
    i, a = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_A)
    pair = token * PAIRS_PER_TOKEN + tl.minimum(i, PAIRS_PER_TOKEN - 1)
    expert = tl.load(ids + pair, cache_modifier=".cg")
    share = tl.load(weights + pair, cache_modifier=".cg")
    base = down + tl.minimum(expert, EXPERTS - 1).to(tl.int64) * (WIDTH * hidden)
    stride = tl.full((BLOCK_P,), WIDTH, tl.int32)
    if SHARED > 0:
        base = tl.where(expert < EXPERTS, base, shared_down + (expert - EXPERTS).to(tl.int64) * WIDTH)
        stride = tl.where(expert < EXPERTS, stride, SHARED * WIDTH)
    if BLOCK_P > PAIRS_PER_TOKEN:
        share = tl.where(i < PAIRS_PER_TOKEN, share, 0.0)
    at = base[:, None, None] + row[None, :, None] * stride[:, None, None]
    down_a = tl.load(at + a[None, None, :], eviction_policy="evict_first")
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        inside = (b < WIDTH)[None, None, :]
        down_b = tl.load(at + b[None, None, :], mask=inside, other=0.0, eviction_policy="evict_first")
    wait_for_previous(PDL)
    act_at = act + pair[:, None, None] * WIDTH
    act_a = tl.load(act_at + a[None, None, :]).to(tl.float32) * share[:, None, None]
    total = tl.sum(tl.sum(down_a.to(tl.float32) * act_a, axis=2), axis=0)
    if BLOCK_B > 0:
        act_b = tl.load(act_at + b[None, None, :], mask=inside, other=0.0).to(tl.float32) * share[:, None, None]
        total += tl.sum(tl.sum(down_b.to(tl.float32) * act_b, axis=2), axis=0)
    if RESIDUAL:
        residual_at = residual + token.to(tl.int64) * stride_r + n
        total += tl.load(residual_at, mask=n < hidden, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * hidden + n, total.to(y.dtype.element_ty), mask=n < hidden)
