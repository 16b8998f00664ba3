"""RoutedExperts: the weighted sum of the experts that were chosen; gate and shared experts belong to the model.

DeepSeek-V2 (arXiv:2405.04434), as DeepSeek's published modeling_deepseek.py computes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer, Shard
from ziphius.layers.quantization import MatrixPart


class RoutedExperts(Layer):
    """Every expert's SwiGLU, stacked; each rank has an equal share of each expert's width."""

    def __init__(self, hidden_size: int, moe: MoEConfig, context: LayerContext) -> None:
        parallel, width = context.parallel, moe.moe_intermediate_size
        local = parallel.shard(width, "moe_intermediate_size")
        start, shape = parallel.rank * local, (width, hidden_size)
        self._experts = moe.n_routed_experts
        self._gate = MatrixPart(shape, Shard(0, start, local), 0)
        self._up = MatrixPart(shape, Shard(0, start, local), local)
        self._down = MatrixPart((hidden_size, width), Shard(1, start, local), 0)
        self._ops = context.ops
        make = context.linear_format.experts
        self.gate_up = make(self._experts, 2 * local, hidden_size, context.device)
        self.down = make(self._experts, hidden_size, local, context.device)

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [T, hidden], weights and ids [T, k] -> this rank's part of the weighted sum [T, hidden].

        Tokens are sorted by expert; only experts that are hit are computed. The sum over a token's experts runs in
        the order of their ids, whatever else is in the batch.
        """
        top_k = ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        tokens, shares = order // top_k, weights.flatten()[order].unsqueeze(1)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in enumerate(torch.bincount(ids.flatten(), minlength=self._experts).tolist()):
            if count == 0:
                continue
            rows = tokens[start : start + count]
            hidden = self._ops.silu_and_mul(self.gate_up.apply(expert, x[rows]))
            out.index_add_(0, rows, self.down.apply(expert, hidden).float() * shares[start : start + count])
            start += count
        return out.to(x.dtype)

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        """`name`: of the list of experts."""
        for expert in range(self._experts):
            yield from self.gate_up.checkpoint_tensors(f"{name}.{expert}.gate_proj", expert, self._gate)
            yield from self.gate_up.checkpoint_tensors(f"{name}.{expert}.up_proj", expert, self._up)
            yield from self.down.checkpoint_tensors(f"{name}.{expert}.down_proj", expert, self._down)
