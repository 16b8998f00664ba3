"""The experts' device code for prompts: with many tokens for each expert, arithmetic takes most of the time.

Weights come through tensor descriptors: the copy engine computes addresses (Hopper and later; elsewhere Triton turns
them into ordinary loads), and the registers hold only sums. experts.py launches the kernels and explains them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ziphius.kernels.gpu.device import allow_next, wait_for_previous


@triton.jit(do_not_specialize=["num_pairs"])
def prompt_gate_up_kernel(x, gate_up, act, pairs, block_experts, num_pairs, hidden, stride_x, WIDTH: tl.constexpr,
                          PAIRS_PER_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
                          PDL: tl.constexpr):  # fmt: skip
    """act[b * BLOCK_M + m] = silu(gate x) * (up x) of the m-th pair of block b. Grid: width blocks, expert blocks.

    gate_up: descriptor of [experts * 2 * WIDTH, hidden] in tiles of [BLOCK_N, BLOCK_K].
    """
    allow_next(PDL)
    block = tl.program_id(1)
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    wait_for_previous(PDL)
    expert = tl.load(block_experts + block)
    if expert >= 0:
        pair = tl.load(pairs + block * BLOCK_M + m)
        token = tl.where(pair < num_pairs, pair // PAIRS_PER_TOKEN, 0)
        first = tl.program_id(0) * BLOCK_N
        row = expert * (2 * WIDTH) + first
        x_at = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                x_tile = tl.load(x_at + start)
            else:
                x_tile = tl.load(x_at + start, mask=(start + k < hidden)[None, :], other=0.0)
            gate_tile = gate_up.load([row, start])
            up_tile = gate_up.load([row + WIDTH, start])
            gate = tl.dot(x_tile, tl.trans(gate_tile), gate, input_precision="ieee")
            up = tl.dot(x_tile, tl.trans(up_tile), up, input_precision="ieee")
        value = gate / (1.0 + tl.exp(-gate)) * up
        to = act + (block.to(tl.int64) * BLOCK_M + m)[:, None] * WIDTH + (first + n)[None, :]
        tl.store(to, value.to(act.dtype.element_ty), mask=(first + n < WIDTH)[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def prompt_down_kernel(act, down, out, weights, pairs, block_experts, num_pairs, hidden, WIDTH: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr,
                       STAGES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """out[p] = weight of pair p x (down act of its place). Grid: groups of TILES hidden blocks, expert blocks.

    act: descriptor of [places, WIDTH] in tiles of [BLOCK_M, BLOCK_K]; down: of [experts * hidden, WIDTH] in tiles of
    [BLOCK_N, BLOCK_K].
    """
    allow_next(PDL)
    block = tl.program_id(1)
    m, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    wait_for_previous(PDL)
    expert = tl.load(block_experts + block)
    if expert >= 0:
        pair = tl.load(pairs + block * BLOCK_M + m)
        used = pair < num_pairs
        share = tl.load(weights + tl.where(used, pair, 0))
        out_at = out + pair.to(tl.int64)[:, None] * hidden
        for tile in tl.range(0, TILES, num_stages=1):
            first = (tl.program_id(0) * TILES + tile) * BLOCK_N
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
                act_tile = act.load([block * BLOCK_M, start])
                down_tile = down.load([expert * hidden + first, start])
                total = tl.dot(act_tile, tl.trans(down_tile), total, input_precision="ieee")
            n = first + j
            value = (total * share[:, None]).to(out.dtype.element_ty)
            tl.store(out_at + n[None, :], value, mask=used[:, None] & (n < hidden)[None, :])
