"""MixtureOfExperts: a gate, the routed experts that it chooses for each token, and experts that all tokens share.

DeepSeek-V2 (arXiv:2405.04434), as DeepSeek's published modeling_deepseek.py computes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.kernels.routing_reference import select_experts
from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer, Shard
from ziphius.layers.linear import equal_share, require_whole_blocks
from ziphius.layers.mlp import GatedMLP
from ziphius.layers.weights import MatrixPart, MixtureWeights, Norm


class RoutedExperts(Layer):
    """The SwiGLU of every expert. Each rank has an equal share of each expert's width."""

    def __init__(self, hidden_size: int, moe: MoEConfig, context: LayerContext) -> None:
        width = moe.moe_intermediate_size
        rows = equal_share(width, 0, context, "moe_intermediate_size")
        columns = Shard(1, rows.start, rows.length)
        for share in (rows, columns):
            require_whole_blocks("moe_intermediate_size", width, share, context.linear_format.expert_block)
        local, shape = rows.length, (width, hidden_size)
        self.width = local
        """Of an expert on this rank."""
        self._experts = moe.n_routed_experts
        self._gate = MatrixPart(shape, rows, 0)
        self._up = MatrixPart(shape, rows, local)
        self._down = MatrixPart((hidden_size, width), columns, 0)
        self._ops = context.ops
        make = context.linear_format.experts
        self.gate_up = make(self._experts, 2 * local, hidden_size, context.device)
        self.down = make(self._experts, hidden_size, local, context.device)

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [T, hidden], weights and ids [T, k] -> this rank's part of the weighted sum [T, hidden].

        Tokens are sorted by expert, and only experts that some token takes are computed. A token's experts are summed
        in the order of their ids, whatever else is in the batch.
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
        """`name` is that of the list of experts."""
        for expert in range(self._experts):
            yield from self.gate_up.checkpoint_tensors(f"{name}.{expert}.gate_proj", expert, self._gate)
            yield from self.gate_up.checkpoint_tensors(f"{name}.{expert}.up_proj", expert, self._up)
            yield from self.down.checkpoint_tensors(f"{name}.{expert}.down_proj", expert, self._down)


class MixtureOfExperts(Layer):
    """Routed experts chosen by a gate, beside shared experts that every token passes."""

    def __init__(self, hidden_size: int, moe: MoEConfig, context: LayerContext) -> None:
        self._moe = moe
        self._parallel = context.parallel
        shape = (moe.n_routed_experts, hidden_size)
        self.gate = torch.empty(shape, dtype=context.dtype, device=context.device)
        self.experts = RoutedExperts(hidden_size, moe, context)
        width = moe.shared_intermediate_size
        self.shared_experts = GatedMLP(hidden_size, width, context, reduce=False) if width else None
        self.fused = context.linear_format.mixture(self._weights(), moe)
        """The format's own kernels for the whole mixture; None where it is computed layer by layer."""

    def onto(self, x: Tensor, norm: Norm) -> Tensor:
        """x [T, hidden] -> x + the mixture for norm(x), [T, hidden]; x may be overwritten."""
        if self.fused is None:
            return x + self(norm(x))
        # One of the ranks brings the residual into the sum over ranks, which comes after.
        return self._parallel.all_reduce(self.fused(x, norm, x if self._parallel.rank == 0 else None))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        # In float32, as published: a near tie between experts must not be decided by rounding.
        weights, ids = select_experts(x.float() @ self.gate.float().t(), self._moe)
        out = self.experts(x, weights, ids)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return self._parallel.all_reduce(out)

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield CheckpointTensor(f"{name}.gate.weight", tuple(self.gate.shape), None, self._load_gate)
        yield from self.experts.checkpoint_tensors(f"{name}.experts")
        if self.shared_experts is not None:
            yield from self.shared_experts.checkpoint_tensors(f"{name}.shared_experts")

    def _load_gate(self, weight: Tensor) -> None:
        self.gate.copy_(weight)

    def _weights(self) -> MixtureWeights:
        shared = self.shared_experts
        return MixtureWeights(
            gate=self.gate,
            gate_up=self.experts.gate_up,
            down=self.experts.down,
            shared_gate_up=None if shared is None else shared.gate_up_proj.weight,
            shared_down=None if shared is None else shared.down_proj.weight,
            width=self.experts.width,
        )
