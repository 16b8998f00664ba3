"""Rotary embedding of query and key heads, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous


@triton.jit
def _rotate_kernel(x, cos, sin, heads, stride_t, stride_h, HALF: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Grid: tokens, head blocks."""
    allow_next(PDL)
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    inside = (h < heads)[:, None] & (i < HALF)[None, :]
    c = tl.load(cos + t * HALF + i, mask=i < HALF, other=0.0)[None, :]
    s = tl.load(sin + t * HALF + i, mask=i < HALF, other=0.0)[None, :]
    if INTERLEAVED:
        a_at = x + t * stride_t + h[:, None] * stride_h + 2 * i[None, :]
        b_at = a_at + 1
    else:
        a_at = x + t * stride_t + h[:, None] * stride_h + i[None, :]
        b_at = a_at + HALF
    a = tl.load(a_at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(a_at, (a * c - b * s).to(x.dtype.element_ty), mask=inside)
    tl.store(b_at, (b * c + a * s).to(x.dtype.element_ty), mask=inside)


def rotate(gpu: GpuDevice, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, heads, D], any strides but the last's; cos and sin [T, D / 2] float32. Rotates in place, returns x.

    TorchOps.rotate is the same in plain torch.
    """
    tokens, heads, dim = x.shape
    if tokens:
        block_h = min(16, triton.next_power_of_2(heads))
        _rotate_kernel[(tokens, triton.cdiv(heads, block_h))](
            x, cos, sin, heads, x.stride(0), x.stride(1), HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2),
            BLOCK_H=block_h, INTERLEAVED=interleaved, **gpu.overlap,
        )  # fmt: skip
    return x
