"""RMSNorm kernels, alone and after the residual addition, with one program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous


@triton.jit
def _rms_norm_kernel(x, residual, weight, y, size, stride_x, stride_y, eps, BLOCK: tl.constexpr, ADD: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """y[t] = norm(x[t] + residual[t]) * weight, and residual[t] = the sum, where ADD."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    allow_next(PDL)
    wait_for_previous(PDL)
    value = tl.load(x + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * size + at, mask=inside, other=0.0).to(tl.float32)
        # Normalise the rounded value, which is the one that is kept.
        value = value.to(residual.dtype.element_ty).to(tl.float32)
        tl.store(residual + row * size + at, value.to(residual.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    # Published models round before they multiply with the weight.
    normed = (value * scale).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * stride_y + at, (normed * w).to(y.dtype.element_ty), mask=inside)


def rms_norm(gpu: GpuDevice, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, size], rows may be strided -> [T, size] contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(gpu, x, x, weight, y, eps, add=False)
    return y


def add_rms_norm(gpu: GpuDevice, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); `residual` [T, size] contiguous becomes the sum."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(gpu, x, residual, weight, y, eps, add=True)
    return y, residual


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in plain torch."""
    value = x.float()
    return (value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _launch(gpu: GpuDevice, x: Tensor, residual: Tensor, weight: Tensor, y: Tensor, eps: float, add: bool) -> None:
    rows, size = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 512))
    _rms_norm_kernel[(rows,)](
        x, residual, weight, y, size, x.stride(0), y.stride(0), eps, BLOCK=block, ADD=add, num_warps=warps,
        **gpu.overlap,
    )  # fmt: skip
