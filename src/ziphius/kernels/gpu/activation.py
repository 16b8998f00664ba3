"""SwiGLU's elementwise half: silu(gate) * up, over the two halves of one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous


@triton.jit
def _silu_and_mul_kernel(gate_up, y, width, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    allow_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    wait_for_previous(PDL)
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + at, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=inside)


def silu_and_mul(gpu: GpuDevice, gate_up: Tensor) -> Tensor:
    """[T, 2I] -> [T, I]: silu(first half) * second half."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(2048, triton.next_power_of_2(width))
        grid = (rows, triton.cdiv(width, block))
        _silu_and_mul_kernel[grid](gate_up, y, width, gate_up.stride(0), BLOCK=block, **gpu.overlap)
    return y


def silu_and_mul_torch(gate_up: Tensor) -> Tensor:
    """The same in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
