"""All experts of one layer in two launches, pair by pair or sorted by expert, as `routing` has decided.

First launch: gather, both halves of the first product, silu(gate) * up. Second: the second product times the route's
weight, one row a pair. A third, small one sums a token's pairs onto the residual. For few tokens shared experts are
pairs of experts E, E + 1, ...: equal slices, of one expert's width, of the shared MLP's own matrices.

Weights in bf16, fp16 or float32; another format is another pair of kernels behind layers/cuda_dense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.expert_kernels import (
    down_kernel,
    gate_up_kernel,
    pair_down_kernel,
    pair_gate_up_kernel,
    sum_pairs_kernel,
)
from ziphius.kernels.gpu.expert_prompt_kernels import prompt_down_kernel, prompt_gate_up_kernel
from ziphius.kernels.gpu.routing import ExpertBlocks, Routes


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One layer's weights on this rank."""

    gate_up: Tensor
    """[E, 2I, hidden]: gate rows, then up rows."""
    down: Tensor
    """[E, hidden, I]."""
    shared_gate_up: Tensor | None = None
    """[2SI, hidden], of S shared experts in one MLP."""
    shared_down: Tensor | None = None
    """[hidden, SI]."""

    @property
    def shared(self) -> int:
        """How many shared experts go along with the routed ones."""
        return 0 if self.shared_down is None else self.shared_down.shape[1] // self.down.shape[2]

    @property
    def shared_or_own(self) -> tuple[Tensor, Tensor]:
        """The shared experts' two matrices; without shared experts, other matrices that no kernel reads."""
        if self.shared_gate_up is None or self.shared_down is None:
            return self.gate_up, self.down
        return self.shared_gate_up, self.shared_down


@dataclass(frozen=True, slots=True)
class GroupedConfig:
    """The tiling of a product over expert blocks."""

    block_n: int
    block_k: int
    stages: int = 4
    warps: int = 4
    tiles: int = 1
    """Second product: blocks of block_n rows that a program computes one after another."""

    def for_values_of(self, nbytes: int) -> GroupedConfig:
        """The tiling for 4-byte values that needs as much shared memory as this one for 2-byte values."""
        return self if nbytes <= 2 else replace(self, block_k=max(16, self.block_k // 2), stages=min(2, self.stages))


@dataclass(frozen=True, slots=True)
class PairConfig:
    """The tiling of products of single pairs: rows of the weight for a program, and its warps."""

    gate_rows: int
    """The number of gate rows, and of up rows."""
    gate_warps: int
    down_rows: int
    down_warps: int


def pair_experts(
    gpu: GpuDevice,
    x: Tensor,
    routes: Routes,
    matrices: ExpertMatrices,
    residual: Tensor | None,
    config: PairConfig | None = None,
) -> Tensor:
    """Few tokens x [T, hidden] -> residual + the weighted sum of each token's experts, [T, hidden]; two launches."""
    width = matrices.down.shape[2]
    act = torch.empty((routes.ids.numel(), width), dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = config or pair_config(x.shape[1], width, x.element_size())
    pair_first(gpu, x, routes, matrices, act, config)
    pair_second(gpu, act, routes, matrices, residual, y, config)
    return y


def pair_config(hidden: int, width: int, element_size: int) -> PairConfig:
    """About 64 weights for a thread in the first product, and 32 for each pair in the second."""
    warps = 8 if hidden >= 4096 else 4
    gate_rows = 1 << max(0, (64 * 32 * warps * 2 // element_size // (2 * hidden)).bit_length() - 1)
    return PairConfig(min(8, gate_rows), warps, max(2, min(8, 4096 // triton.next_power_of_2(width))), 4)


def grouped_experts(
    gpu: GpuDevice,
    x: Tensor,
    routes: Routes,
    blocks: ExpertBlocks,
    matrices: ExpertMatrices,
    residual: Tensor | None,
    first: GroupedConfig,
    second: GroupedConfig,
) -> Tensor:
    """Tokens x [T, hidden], their pairs sorted into `blocks` -> residual + weighted sums [T, hidden]."""
    act = grouped_first(gpu, x, routes, blocks, matrices, first)
    return _sum_pairs(gpu, grouped_second(gpu, act, routes, blocks, matrices, second), x.shape[0], residual)


def grouped_first(
    gpu: GpuDevice, x: Tensor, routes: Routes, blocks: ExpertBlocks, matrices: ExpertMatrices, config: GroupedConfig
) -> Tensor:
    """x [T, hidden] -> silu(gate) * up of each pair [pairs, I]."""
    hidden, width, pairs = x.shape[1], matrices.down.shape[2], routes.ids.numel()
    config = config.for_values_of(x.element_size())
    act = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    gate_up_kernel[(triton.cdiv(width, config.block_n), blocks.experts.shape[0])](
        x, matrices.gate_up, matrices.shared_or_own[0], act, blocks.pairs, blocks.experts, pairs, hidden,
        x.stride(0), EXPERTS=matrices.down.shape[0], WIDTH=width, SHARED=matrices.shared,
        PAIRS_PER_TOKEN=routes.ids.shape[1], BLOCK_M=blocks.block_size, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, STAGES=config.stages, EVEN_K=hidden % config.block_k == 0, num_warps=config.warps,
        **gpu.overlap,
    )  # fmt: skip
    return act


def grouped_second(
    gpu: GpuDevice, act: Tensor, routes: Routes, blocks: ExpertBlocks, matrices: ExpertMatrices, config: GroupedConfig
) -> Tensor:
    """act [pairs, I] -> each pair's share of its token's sum [pairs, hidden]."""
    (pairs, width), hidden = act.shape, matrices.down.shape[1]
    config = config.for_values_of(act.element_size())
    out = torch.empty((pairs, hidden), dtype=act.dtype, device=act.device)
    down_kernel[(triton.cdiv(hidden, config.block_n * config.tiles), blocks.experts.shape[0])](
        act, matrices.down, matrices.shared_or_own[1], out, routes.weights, blocks.pairs, blocks.experts, pairs,
        hidden, EXPERTS=matrices.down.shape[0], WIDTH=width, SHARED=matrices.shared, BLOCK_M=blocks.block_size,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, TILES=config.tiles, STAGES=config.stages,
        num_warps=config.warps, **gpu.overlap,
    )  # fmt: skip
    return out


def prompt_experts(
    gpu: GpuDevice,
    x: Tensor,
    routes: Routes,
    blocks: ExpertBlocks,
    matrices: ExpertMatrices,
    residual: Tensor | None,
    first: GroupedConfig,
    second: GroupedConfig,
) -> Tensor:
    """As `grouped_experts`, for many tokens an expert, and without shared experts."""
    act = prompt_first(gpu, x, routes, blocks, matrices, first)
    return _sum_pairs(gpu, prompt_second(gpu, act, routes, blocks, matrices, second), x.shape[0], residual)


def prompt_first(
    gpu: GpuDevice, x: Tensor, routes: Routes, blocks: ExpertBlocks, matrices: ExpertMatrices, config: GroupedConfig
) -> Tensor:
    """x [T, hidden] -> silu(gate) * up in the blocks' order [blocks * block_size, I]; unused places unwritten."""
    hidden, width, size = x.shape[1], matrices.down.shape[2], blocks.block_size
    config = config.for_values_of(x.element_size())
    act = torch.empty((blocks.pairs.shape[0], width), dtype=x.dtype, device=x.device)
    gate_up = TensorDescriptor.from_tensor(matrices.gate_up.flatten(0, 1), [config.block_n, config.block_k])
    prompt_gate_up_kernel[(triton.cdiv(width, config.block_n), blocks.experts.shape[0])](
        x, gate_up, act, blocks.pairs, blocks.experts, routes.ids.numel(), hidden, x.stride(0), WIDTH=width,
        PAIRS_PER_TOKEN=routes.ids.shape[1], BLOCK_M=size, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        STAGES=config.stages, EVEN_K=hidden % config.block_k == 0, num_warps=config.warps, **gpu.overlap,
    )  # fmt: skip
    return act


def prompt_second(
    gpu: GpuDevice, act: Tensor, routes: Routes, blocks: ExpertBlocks, matrices: ExpertMatrices, config: GroupedConfig
) -> Tensor:
    """act in the blocks' order -> each pair's share of its token's sum [pairs, hidden]."""
    hidden, width = matrices.down.shape[1:]
    config = config.for_values_of(act.element_size())
    out = torch.empty((routes.ids.numel(), hidden), dtype=act.dtype, device=act.device)
    places = TensorDescriptor.from_tensor(act, [blocks.block_size, config.block_k])
    down = TensorDescriptor.from_tensor(matrices.down.flatten(0, 1), [config.block_n, config.block_k])
    prompt_down_kernel[(triton.cdiv(hidden, config.block_n * config.tiles), blocks.experts.shape[0])](
        places, down, out, routes.weights, blocks.pairs, blocks.experts, routes.ids.numel(), hidden, WIDTH=width,
        BLOCK_M=blocks.block_size, BLOCK_N=config.block_n, BLOCK_K=config.block_k, TILES=config.tiles,
        STAGES=config.stages, num_warps=config.warps, **gpu.overlap,
    )  # fmt: skip
    return out


def experts_torch(x: Tensor, routes: Routes, matrices: ExpertMatrices, residual: Tensor | None) -> Tensor:
    """Both ways in plain torch."""
    width = matrices.down.shape[2]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token in range(x.shape[0]):
        for expert, weight in zip(routes.ids[token].tolist(), routes.weights[token].tolist(), strict=True):
            if expert < matrices.down.shape[0]:
                gate_up, down = matrices.gate_up[expert], matrices.down[expert]
            else:
                assert matrices.shared_gate_up is not None
                assert matrices.shared_down is not None
                mine = slice((expert - matrices.down.shape[0]) * width, (expert - matrices.down.shape[0] + 1) * width)
                gate, up = matrices.shared_gate_up.chunk(2)
                gate_up, down = torch.cat((gate[mine], up[mine])), matrices.shared_down[:, mine]
            gate, up = F.linear(x[token].float(), gate_up.float()).chunk(2)
            act = (F.silu(gate) * up).to(x.dtype).float()
            total[token] += weight * F.linear(act, down.float())
    return (total if residual is None else total + residual.float()).to(x.dtype)


def pair_first(
    gpu: GpuDevice, x: Tensor, routes: Routes, matrices: ExpertMatrices, act: Tensor, config: PairConfig
) -> None:
    hidden, (pairs, width) = x.shape[1], act.shape
    block_a, block_b = _two_blocks(hidden)
    pair_gate_up_kernel[(pairs, triton.cdiv(width, config.gate_rows))](
        x, matrices.gate_up, matrices.shared_or_own[0], act, routes.ids, hidden, x.stride(0),
        EXPERTS=matrices.down.shape[0], WIDTH=width, SHARED=matrices.shared,
        PAIRS_PER_TOKEN=routes.ids.shape[1], BLOCK_N=config.gate_rows, BLOCK_A=block_a, BLOCK_B=block_b,
        num_warps=config.gate_warps, **gpu.overlap,
    )  # fmt: skip


def pair_second(
    gpu: GpuDevice,
    act: Tensor,
    routes: Routes,
    matrices: ExpertMatrices,
    residual: Tensor | None,
    y: Tensor,
    config: PairConfig,
) -> None:
    (tokens, hidden), width = y.shape, act.shape[1]
    block_a, block_b = _two_blocks(width)
    added = y if residual is None else residual
    pair_down_kernel[(tokens, triton.cdiv(hidden, config.down_rows))](
        act, matrices.down, matrices.shared_or_own[1], added, y, routes.ids, routes.weights,
        hidden, added.stride(0), EXPERTS=matrices.down.shape[0], WIDTH=width, SHARED=matrices.shared,
        PAIRS_PER_TOKEN=routes.ids.shape[1],
        BLOCK_P=triton.next_power_of_2(routes.ids.shape[1]), BLOCK_N=config.down_rows, BLOCK_A=block_a, BLOCK_B=block_b,
        RESIDUAL=residual is not None, num_warps=config.down_warps, **gpu.overlap,
    )  # fmt: skip


def _sum_pairs(gpu: GpuDevice, pair_out: Tensor, tokens: int, residual: Tensor | None) -> Tensor:
    hidden = pair_out.shape[1]
    y = torch.empty((tokens, hidden), dtype=pair_out.dtype, device=pair_out.device)
    added = y if residual is None else residual
    block = min(1024, triton.next_power_of_2(hidden))
    sum_pairs_kernel[(tokens, triton.cdiv(hidden, block))](
        pair_out, added, y, hidden, added.stride(0), PAIRS_PER_TOKEN=pair_out.shape[0] // tokens, BLOCK=block,
        RESIDUAL=residual is not None, **gpu.overlap,
    )  # fmt: skip
    return y


def _two_blocks(size: int) -> tuple[int, int]:
    first = 1 << (size.bit_length() - 1)
    return first, triton.next_power_of_2(size - first) if size > first else 0
