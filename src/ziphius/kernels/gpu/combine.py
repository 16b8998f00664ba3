"""The end of split decode attention: it adds the splits' sums, and turns latent sums into head values (w_uv)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous
from ziphius.kernels.gpu.paged_decode import Parts


@triton.jit(do_not_specialize=["rows"])
def _combine_splits_kernel(sums, logs, y, rows, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
                           SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[row] = the splits' sum of that (token, head). Grid: row blocks, blocks of the dimension."""
    allow_next(PDL)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = tl.minimum(row, rows - 1).to(tl.int64) * SPLITS
    wait_for_previous(PDL)
    highest = tl.max(tl.load(logs + at[:, None] + tl.arange(0, SPLITS)[None, :]), axis=1)
    total = tl.zeros((BLOCK_R,), tl.float32)
    mixed = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in tl.range(0, SPLITS, BLOCK_S):
        split = at[:, None] + (start + tl.arange(0, BLOCK_S))[None, :]
        share = tl.exp2(tl.load(logs + split) - highest[:, None])
        # An empty split's sum was never written.
        inside = (share > 0.0)[:, :, None] & (d < DIM)[None, None, :]
        part = tl.load(sums + split[:, :, None] * DIM + d[None, None, :], mask=inside, other=0.0)
        total += tl.sum(share, axis=1)
        mixed += tl.sum(part * share[:, :, None], axis=1)
    mixed = (mixed / total[:, None]).to(y.dtype.element_ty)
    inside_y = (row < rows)[:, None] & (d < DIM)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * DIM + d[None, :], mixed, mask=inside_y)


@triton.jit(do_not_specialize=["tokens"])
def _values_kernel(mixed, w_uv, y, tokens, HEADS: tl.constexpr, LORA: tl.constexpr, VALUE: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[t, h] = mixed[t, h] w_uv[h]. Grid: heads, value blocks, token blocks."""
    h = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, LORA)
    inside = (v < VALUE)[None, :]
    w = tl.load(w_uv + (h * LORA + c)[:, None] * VALUE + v[None, :], mask=inside, other=0.0)
    allow_next(PDL)
    wait_for_previous(PDL)
    row = tl.minimum(t, tokens - 1).to(tl.int64) * HEADS + h
    value = tl.dot(tl.load(mixed + row[:, None] * LORA + c[None, :]), w, input_precision="ieee")
    at = y + (t.to(tl.int64)[:, None] * HEADS + h) * VALUE + v[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & inside)


def combine_values(gpu: GpuDevice, parts: Parts, w_uv: Tensor) -> Tensor:
    """parts of [T, H, splits, lora], w_uv [H, lora, v] -> [T, H, v]."""
    mixed = combine(gpu, parts, w_uv.dtype)
    (tokens, heads, lora), value = mixed.shape, w_uv.shape[2]
    y = torch.empty((tokens, heads, value), dtype=w_uv.dtype, device=w_uv.device)
    block_t = 16 if gpu.batch_invariant or tokens <= 16 else 32
    block_v = min(32, max(16, triton.next_power_of_2(value)))
    _values_kernel[(heads, triton.cdiv(value, block_v), triton.cdiv(tokens, block_t))](
        mixed, w_uv, y, tokens, HEADS=heads, LORA=lora, VALUE=value, BLOCK_T=block_t, BLOCK_V=block_v, num_warps=4,
        **gpu.overlap,
    )  # fmt: skip
    return y


def combine(gpu: GpuDevice, parts: Parts, dtype: torch.dtype) -> Tensor:
    """parts of [T, H, splits, D] -> [T, H, D]."""
    tokens, heads, splits, dim = parts.sums.shape
    if splits == 1:
        return parts.sums.squeeze(2)
    y = torch.empty((tokens, heads, dim), dtype=dtype, device=parts.sums.device)
    rows, padded = tokens * heads, triton.next_power_of_2(dim)
    if gpu.batch_invariant:
        block_s, block_d, block_r = 1, padded, 1
    else:
        # About 8192 values a program, and enough programs.
        block_s = min(splits, 32)
        block_d = min(padded, max(64, 8192 // block_s))
        while block_d > 64 and rows * padded // block_d < gpu.processors:
            block_d //= 2
        block_r = max(1, min(8, 8192 // (block_s * block_d), rows // gpu.processors))
        block_r = 1 << (block_r.bit_length() - 1)
    _combine_splits_kernel[(triton.cdiv(rows, block_r), triton.cdiv(dim, block_d))](
        parts.sums, parts.logs, y, rows, DIM=dim, BLOCK_R=block_r, BLOCK_D=block_d, SPLITS=splits, BLOCK_S=block_s,
        **gpu.overlap,
    )  # fmt: skip
    return y


def combine_torch(parts: Parts) -> Tensor:
    """`combine` in plain torch, float32."""
    shares = (parts.logs - parts.logs.amax(-1, keepdim=True)).exp2()
    shares = (shares / shares.sum(-1, keepdim=True)).unsqueeze(-1)
    return torch.where(shares > 0, parts.sums.float() * shares, 0.0).sum(2)


def combine_values_torch(parts: Parts, w_uv: Tensor) -> Tensor:
    """`combine_values` in plain torch."""
    return torch.einsum("thc,hcv->thv", combine_torch(parts).to(w_uv.dtype), w_uv)
