"""Causal attention of prompt chunks of several sequences, with the keys stored one sequence after another (ragged).

Query and key may have a second part, whose keys all heads share (the rotary part of latent attention), and values
may have another size: 128 + 64 against 128 in DeepSeek-V2. Key heads may be fewer than query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous

_LOG2E = 1.4426950408889634
BLOCK_Q = 128
"""Queries a program takes."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """The programs: blocks of queries of one sequence, those with most keys first."""

    table: Tensor
    """[tiles, 4] int32: first query's row, queries, first key's row, keys that the first query sees."""


@dataclass(frozen=True, slots=True)
class FlashConfig:
    """How a program reads its keys."""

    block_kv: int = 32
    stages: int = 3
    warps: int = 4


@triton.jit
def _keys_of_a_block(acc, weight, highest, query, query_pe, start, keys, seen_by_first, k_at, k_pe_at, v_at, scale,
                     stride_kt, stride_pe, stride_vt, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PE: tl.constexpr,
                     BLOCK_P: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
                     BLOCK_KV: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """One round of online softmax, over keys start..start + BLOCK_KV; CAUSAL where some query does not see all."""
    d, e, r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    i, j = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    row = start + j
    if CAUSAL:
        row = tl.minimum(row, keys - 1)
    row = row.to(tl.int64)[:, None]
    if BLOCK_D == DIM:
        key = tl.load(k_at + row * stride_kt + d[None, :])
    else:
        key = tl.load(k_at + row * stride_kt + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    if BLOCK_V == VALUE:
        value = tl.load(v_at + row * stride_vt + e[None, :])
    else:
        value = tl.load(v_at + row * stride_vt + e[None, :], mask=(e < VALUE)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if PE > 0:
        if BLOCK_P == PE:
            key_pe = tl.load(k_pe_at + row * stride_pe + r[None, :])
        else:
            key_pe = tl.load(k_pe_at + row * stride_pe + r[None, :], mask=(r < PE)[None, :], other=0.0)
        scores = tl.dot(query_pe, tl.trans(key_pe), scores, input_precision="ieee")
    if CAUSAL:
        scores = tl.where((start + j)[None, :] < seen_by_first + i[:, None], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    faded = tl.exp2(highest - higher)
    scores = tl.exp2(scores * scale - higher[:, None])
    weight = weight * faded + tl.sum(scores, axis=1)
    acc = tl.dot(scores.to(value.dtype), value, acc * faded[:, None], input_precision="ieee")
    return acc, weight, higher


@triton.jit
def _flash_kernel(q, k, k_pe, v, out, tiles, scale, stride_qt, stride_qh, stride_kt, stride_kh, stride_pe, stride_vt,
                  stride_vh, stride_ot, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  PE: tl.constexpr, BLOCK_P: tl.constexpr, VALUE: tl.constexpr, BLOCK_V: tl.constexpr,
                  BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """Grid: heads, tiles. q [T, H, DIM + PE], k [L, KH, DIM], k_pe [L, PE], v [L, KH, VALUE], out [T, H, VALUE]."""
    allow_next(PDL)
    h = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    i, d, e, r = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_P)
    wait_for_previous(PDL)
    first, queries = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    first_key, seen_by_first = tl.load(tile + 2).to(tl.int64), tl.load(tile + 3)
    used = i < queries
    q_at = q + (first + tl.where(used, i, 0))[:, None] * stride_qt + h * stride_qh
    query = tl.load(q_at + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    query_pe = query
    if PE > 0:
        query_pe = tl.load(q_at + DIM + r[None, :], mask=(r < PE)[None, :], other=0.0)
    k_at = k + first_key * stride_kt + (h // GROUP) * stride_kh
    v_at = v + first_key * stride_vt + (h // GROUP) * stride_vh
    k_pe_at = k_pe + first_key * stride_pe
    keys = seen_by_first + queries - 1
    highest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    # Blocks that every query sees completely need no mask.
    seen_by_all = seen_by_first // BLOCK_KV * BLOCK_KV
    for start in tl.range(0, seen_by_all, BLOCK_KV, num_stages=STAGES):
        acc, weight, highest = _keys_of_a_block(
            acc, weight, highest, query, query_pe, start, keys, seen_by_first, k_at, k_pe_at, v_at, scale, stride_kt,
            stride_pe, stride_vt, DIM, BLOCK_D, PE, BLOCK_P, VALUE, BLOCK_V, BLOCK_Q, BLOCK_KV, False)  # fmt: skip
    for start in tl.range(seen_by_all, keys, BLOCK_KV, num_stages=STAGES):
        acc, weight, highest = _keys_of_a_block(
            acc, weight, highest, query, query_pe, start, keys, seen_by_first, k_at, k_pe_at, v_at, scale, stride_kt,
            stride_pe, stride_vt, DIM, BLOCK_D, PE, BLOCK_P, VALUE, BLOCK_V, BLOCK_Q, BLOCK_KV, True)  # fmt: skip
    o_at = out + (first + i)[:, None] * stride_ot + h * VALUE + e[None, :]
    tl.store(o_at, (acc / weight[:, None]).to(out.dtype.element_ty), mask=used[:, None] & (e < VALUE)[None, :])


def make_tiles(query_starts: list[int], key_starts: list[int], seen_by_first: list[int], device: torch.device) -> Tiles:
    """Chunk s has queries query_starts[s]..query_starts[s + 1], keys from row key_starts[s] on, of which its first
    query sees seen_by_first[s]."""
    rows: list[tuple[int, int, int, int]] = []
    for s, key_start in enumerate(key_starts):
        for start in range(query_starts[s], query_starts[s + 1], BLOCK_Q):
            count = min(BLOCK_Q, query_starts[s + 1] - start)
            rows.append((start, count, key_start, seen_by_first[s] + start - query_starts[s]))
    rows.sort(key=lambda row: -row[3])
    table = torch.tensor(rows, dtype=torch.int32)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return Tiles(table)


def flash_prefill(
    gpu: GpuDevice,
    q: Tensor,
    k: Tensor,
    k_pe: Tensor | None,
    v: Tensor,
    out: Tensor,
    tiles: Tiles,
    scale: float,
    config: FlashConfig | None = None,
) -> None:
    """q [T, H, D + P], k [L, KH, D], k_pe [L, P] or None, v [L, KH, V]; out [T, H, V] contiguous is written where
    tiles have queries. The last dimension of each is contiguous."""
    heads, dim, value = q.shape[1], k.shape[2], v.shape[2]
    pe = 0 if k_pe is None else k_pe.shape[1]
    config = config or (FlashConfig(32, 2, 8) if q.element_size() == 4 else FlashConfig())
    shared = q if k_pe is None else k_pe
    _flash_kernel[(heads, tiles.table.shape[0])](
        q, k, shared, v, out, tiles.table, scale * _LOG2E, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        shared.stride(0), v.stride(0), v.stride(1), out.stride(0), GROUP=heads // k.shape[1], DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), PE=pe, BLOCK_P=max(16, triton.next_power_of_2(pe)), VALUE=value,
        BLOCK_V=max(16, triton.next_power_of_2(value)), BLOCK_Q=BLOCK_Q, BLOCK_KV=config.block_kv,
        STAGES=config.stages, num_warps=config.warps, **gpu.overlap,
    )  # fmt: skip


def flash_prefill_torch(
    q: Tensor, k: Tensor, k_pe: Tensor | None, v: Tensor, out: Tensor, tiles: Tiles, scale: float
) -> None:
    """The same in plain torch, tile by tile."""
    group = q.shape[1] // k.shape[1]
    for first, queries, first_key, seen in tiles.table.tolist():
        keys = slice(first_key, first_key + seen + queries - 1)
        rows = slice(first, first + queries)
        key = k[keys].float().repeat_interleave(group, dim=1)
        if k_pe is not None:
            key = torch.cat((key, k_pe[keys].float().unsqueeze(1).expand(-1, key.shape[1], -1)), dim=-1)
        scores = torch.einsum("thd,lhd->htl", q[rows].float(), key) * scale
        at = torch.arange(scores.shape[2], device=q.device)
        visible = at[None, :] < seen + torch.arange(queries, device=q.device)[:, None]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        values = v[keys].float().repeat_interleave(group, dim=1)
        out[rows] = torch.einsum("htl,lhv->thv", weights, values).to(out.dtype)
