"""Matrix times a few vectors (a decode batch): y = x W^T + residual, limited by the weights' bytes.

The weights are the tensor cores' first operand and the tokens the second, so that no token slot below 8 is wasted
and Hopper reads the weights straight from shared memory. K may be split over programs: the last one to arrive adds
the parts in their order, so the sum does not depend on who was last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, prefetch_rows_l2, wait_for_previous

MAX_TOKENS = 128
"""A program takes at most this many tokens. For more tokens there are more programs."""
MAX_SPLITS = 16
COUNTERS = 4096
PARTIAL_VALUES = 1 << 23


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """The tiling of the product."""

    block_n: int
    """Rows of the weight a program takes."""
    block_k: int
    splits: int = 1
    """Programs that share one K."""
    stages: int = 4
    warps: int = 4
    prefetch: bool = True
    """Prefetch the weights into L2 while the kernel before this one ends."""

    def for_values_of(self, nbytes: int) -> SkinnyConfig:
        """The tiling for 4-byte values that needs as much shared memory as this one for 2-byte values."""
        return self if nbytes <= 2 else replace(self, block_k=max(16, self.block_k // 2), stages=min(2, self.stages))


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """Where programs that share one output add their parts. For one stream; `counters` are zero between kernels."""

    partials: Tensor
    """[PARTIAL_VALUES] float32."""
    counters: Tensor
    """[COUNTERS] int32."""

    @classmethod
    def on(cls, device: torch.device) -> SplitWorkspace:
        return cls(
            torch.empty(PARTIAL_VALUES, dtype=torch.float32, device=device),
            torch.zeros(COUNTERS, dtype=torch.int32, device=device),
        )


@triton.jit(do_not_specialize=["tokens"])
def _skinny_kernel(x, weight, y, residual, partials, counters, tokens, rows, columns, stride_x, stride_w, stride_y,
                   stride_r, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   SPLITS: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr, RESIDUAL: tl.constexpr,
                   PREFETCH: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y[t, n] = sum_k x[t, k] weight[n, k] (+ residual[t, n]). Grid: row blocks, token blocks, splits."""
    block_n, block_t, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(columns, BLOCK_K), SPLITS)
    begin = split * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, columns)
    w_at = weight + tl.minimum(n, rows - 1).to(tl.int64)[:, None] * stride_w + k[None, :]
    if PREFETCH:
        size: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        first = weight + tl.minimum(n, rows - 1).to(tl.int64) * stride_w + begin
        prefetch_rows_l2(first, tl.arange(0, BLOCK_N), (end - begin) * size, PDL)
    x_at = x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * stride_x + k[None, :]
    allow_next(PDL)
    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            w_tile = tl.load(w_at + start)
            x_tile = tl.load(x_at + start)
        else:
            inside = (start + k < end)[None, :]
            w_tile = tl.load(w_at + start, mask=inside, other=0.0)
            x_tile = tl.load(x_at + start, mask=inside, other=0.0)
        acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="ieee")
    if SPLITS > 1:
        tile = block_t * tl.num_programs(0) + block_n
        at = (tl.arange(0, BLOCK_N) * BLOCK_T)[:, None] + tl.arange(0, BLOCK_T)[None, :]
        base = partials + tile * SPLITS * BLOCK_N * BLOCK_T
        tl.store(base + split * BLOCK_N * BLOCK_T + at, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(base + part * BLOCK_N * BLOCK_T + at, cache_modifier=".cg")
            tl.store(counters + tile, 0)
            _store(y, residual, total, n, t, rows, tokens, stride_y, stride_r, RESIDUAL)
    else:
        _store(y, residual, acc, n, t, rows, tokens, stride_y, stride_r, RESIDUAL)


@triton.jit
def _store(y, residual, total, n, t, rows, tokens, stride_y, stride_r, RESIDUAL: tl.constexpr):
    """total [BLOCK_N, BLOCK_T] to y [tokens, rows], through a transposition so that stores are contiguous."""
    total = tl.trans(total)
    inside = (t < tokens)[:, None] & (n < rows)[None, :]
    if RESIDUAL:
        at = residual + t.to(tl.int64)[:, None] * stride_r + n[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t.to(tl.int64)[:, None] * stride_y + n[None, :], total.to(y.dtype.element_ty), mask=inside)


def skinny_linear(
    gpu: GpuDevice,
    x: Tensor,
    weight: Tensor,
    workspace: SplitWorkspace,
    config: SkinnyConfig,
    *,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] (rows may be strided) times weight [N, K] (+ residual [T, N]) -> [T, N]."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    y = torch.empty((tokens, rows), dtype=out_dtype or x.dtype, device=x.device)
    if tokens == 0:
        return y
    config = config.for_values_of(x.element_size())
    block_t = 16 if gpu.batch_invariant else token_block(tokens)
    splits = usable_splits(config, tokens, block_t, rows, columns)
    grid = (triton.cdiv(rows, config.block_n), triton.cdiv(tokens, block_t), splits)
    added = y if residual is None else residual
    _skinny_kernel[grid](
        x, weight, y, added, workspace.partials, workspace.counters, tokens, rows, columns,
        x.stride(0), weight.stride(0), y.stride(0), added.stride(0),
        BLOCK_T=block_t, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLITS=splits, STAGES=config.stages,
        EVEN_K=columns % (config.block_k * splits) == 0, RESIDUAL=residual is not None,
        PREFETCH=config.prefetch and columns % 8 == 0, num_warps=config.warps, **gpu.overlap,
    )  # fmt: skip
    return y


def token_block(tokens: int) -> int:
    """Tokens a program takes: 16 at least, because a tensor core's smallest tile costs the same."""
    return max(16, min(MAX_TOKENS, triton.next_power_of_2(tokens)))


def usable_splits(config: SkinnyConfig, tokens: int, block_t: int, rows: int, columns: int) -> int:
    """`config.splits`, or what K and the workspace allow."""
    tiles = triton.cdiv(rows, config.block_n) * triton.cdiv(tokens, block_t)
    splits = min(config.splits, triton.cdiv(columns, config.block_k), MAX_SPLITS)
    if tiles > COUNTERS:
        return 1
    while splits > 1 and tiles * splits * config.block_n * block_t > PARTIAL_VALUES:
        splits -= 1
    return splits


def skinny_linear_torch(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """The same in plain torch."""
    y = F.linear(x, weight)
    return y if residual is None else y + residual
