"""Matrix times one vector, with RMSNorm of the vector before it and the residual sum after it, for a single request.

The time depends on the weights' bytes. Each program loads a few whole rows of the matrix into registers before it waits
for the vector, so that memory is busy while the kernel before it ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous
from ziphius.kernels.gpu.norm import rms_norm_torch

_ELEMENTS_PER_THREAD = 64
"""Bytes of the matrix in registers: 128 bytes in flight for each thread are twice what keeps the memory busy."""


@triton.jit
def _gemv_kernel(x, weight, y, norm_weight, residual, rows, columns, stride, eps, BLOCK_N: tl.constexpr,
                 BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """y[n] = sum_k weight[n, k] x'[k] (+ residual[n]); x' is x, or rms_norm(x) * norm_weight.

    Columns are taken as two powers of two, BLOCK_A + BLOCK_B: 5120 is 4096 + 1024.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = weight + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * stride
    a = tl.arange(0, BLOCK_A)
    weight_a = tl.load(row + a[None, :], eviction_policy="evict_first")
    if NORM:
        norm_a = tl.load(norm_weight + a).to(tl.float32)
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        inside = b < columns
        weight_b = tl.load(row + b[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        if NORM:
            norm_b = tl.load(norm_weight + b, mask=inside, other=0.0).to(tl.float32)
    allow_next(PDL)
    wait_for_previous(PDL)
    x_a = tl.load(x + a).to(tl.float32)
    squares = tl.sum(x_a * x_a, axis=0)
    if NORM:
        x_a *= norm_a
    total = tl.sum(weight_a.to(tl.float32) * x_a[None, :], axis=1)
    if BLOCK_B > 0:
        x_b = tl.load(x + b, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(x_b * x_b, axis=0)
        if NORM:
            x_b *= norm_b
        total += tl.sum(weight_b.to(tl.float32) * x_b[None, :], axis=1)
    if NORM:
        total *= tl.rsqrt(squares / columns + eps)
    if RESIDUAL:
        total += tl.load(residual + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + n, total.to(y.dtype.element_ty), mask=n < rows)


def gemv(
    gpu: GpuDevice,
    x: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """x [1, K] times weight [N, K] -> [1, N]. `norm` (weight [K], eps) normalises x; `residual` [1, N] is added.

    `shape`: rows a program takes, and its warps.
    """
    rows, columns = weight.shape
    y = torch.empty((1, rows), dtype=out_dtype or x.dtype, device=x.device)
    block_a = 1 << (columns.bit_length() - 1)
    rest = columns - block_a
    block_b = triton.next_power_of_2(rest) if rest else 0
    block_n, warps = shape or gemv_shape(rows, block_a, gpu.processors, weight.element_size())
    norm_weight, eps = (x, 0.0) if norm is None else norm
    _gemv_kernel[(triton.cdiv(rows, block_n),)](
        x, weight, y, norm_weight, x if residual is None else residual, rows, columns, weight.stride(0), eps,
        BLOCK_N=block_n, BLOCK_A=block_a, BLOCK_B=block_b, NORM=norm is not None, RESIDUAL=residual is not None,
        num_warps=warps, **gpu.overlap,
    )  # fmt: skip
    return y


def gemv_shape(rows: int, block_a: int, processors: int, element_size: int) -> tuple[int, int]:
    """(rows a program, warps): registers limit the tile, and every processor should have a few programs."""
    warps = 8 if block_a >= 4096 else 4
    elements = _ELEMENTS_PER_THREAD * 32 * warps * 2 // element_size
    block_n = max(1, min(16, elements // block_a))
    while block_n > 1 and rows // block_n < 2 * processors:
        block_n //= 2
    return block_n, warps


def gemv_torch(
    x: Tensor, weight: Tensor, *, norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None
) -> Tensor:
    """The same in plain torch, for any number of rows of x."""
    if norm is not None:
        x = rms_norm_torch(x, *norm)
    y = F.linear(x, weight)
    return y if residual is None else y + residual
