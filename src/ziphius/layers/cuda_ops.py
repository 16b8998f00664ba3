"""CudaOps: the operations between matrix products on a GPU, and the whole mixture of experts; it holds no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.distributed import ParallelState
from ziphius.kernels.gpu import activation, experts, norm, rotary, routing
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.experts import ExpertMatrices, PairConfig
from ziphius.kernels.gpu.routing import Routes
from ziphius.kernels.gpu.tuning import ExpertsPlan, GroupedPlan
from ziphius.layers.cuda_weights import CudaKernels
from ziphius.layers.quantization import DenseExperts, DenseWeight

if TYPE_CHECKING:
    from ziphius.layers.mlp import GatedMLP
    from ziphius.layers.moe import RoutedExperts
    from ziphius.layers.norm import RMSNorm

_ROUTE_AT_ONCE = 20480
"""Values of all tokens up to which norm, router and top-k are one kernel, where each token reads the router alone."""


class CudaOps:
    def __init__(self, device: torch.device, batch_invariant: bool = False) -> None:
        self._gpu = GpuDevice.of(device, batch_invariant)
        self._kernels = CudaKernels(self._gpu, device)
        self._routing = routing.RouteWorkspace.on(device)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(self._gpu, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(self._gpu, x, residual, weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return activation.silu_and_mul(self._gpu, gate_up)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return rotary.rotate(self._gpu, x, cos, sin, interleaved)

    def mixture(
        self,
        x: Tensor,
        norm: RMSNorm,
        gate: Tensor,
        routed: RoutedExperts,
        shared: GatedMLP | None,
        moe: MoEConfig,
        parallel: ParallelState,
    ) -> Tensor | None:
        """See LayerOps."""
        matrices = _matrices(routed)
        if matrices is None or gate.dtype != x.dtype:
            return None
        count, hidden, width = matrices.down.shape
        plan = self._kernels.tuned.experts(x.shape[0], count, hidden, width, moe.num_experts_per_tok)
        together = _with_shared(matrices, shared, moe)
        # For prompts the library is faster at shared experts.
        if together is not None and not (isinstance(plan, GroupedPlan) and plan.prompt):
            matrices, shared = together, None
        normed, routes = self._route(x, norm, gate, moe, matrices)
        # Several ranks: one of them brings the residual into the sum, as the sum comes after.
        residual = x if parallel.rank == 0 else None
        if shared is not None:
            act = shared.activations(normed)
            part = shared.down_proj.weight(act) if residual is None else shared.down_proj.weight.onto(act, residual)
            residual = part
        return parallel.all_reduce(self._experts(normed, routes, matrices, residual, plan))

    def _route(
        self, x: Tensor, norm: RMSNorm, gate: Tensor, moe: MoEConfig, matrices: ExpertMatrices
    ) -> tuple[Tensor, Routes]:
        shared = matrices.shared
        if x.numel() <= _ROUTE_AT_ONCE and not self._gpu.batch_invariant:
            return routing.route(self._gpu, x, norm.weight, norm.eps, gate, moe, shared, self._routing)
        normed = norm(x)
        logits = self._kernels.linear(normed, gate, out_dtype=torch.float32)
        return normed, routing.top_k(self._gpu, logits, moe, shared, self._routing)

    def _experts(
        self, x: Tensor, routes: Routes, matrices: ExpertMatrices, residual: Tensor | None, plan: ExpertsPlan
    ) -> Tensor:
        gpu = self._gpu
        if isinstance(plan, PairConfig):
            return experts.pair_experts(gpu, x, routes, matrices, residual, plan)
        count = matrices.down.shape[0] + matrices.shared
        blocks = routing.align(gpu, routes, count, plan.block_m, self._routing)
        compute = experts.prompt_experts if plan.prompt else experts.grouped_experts
        return compute(gpu, x, routes, blocks, matrices, residual, plan.first, plan.second)


def _matrices(routed: RoutedExperts) -> ExpertMatrices | None:
    gate_up, down = routed.gate_up, routed.down
    if isinstance(gate_up, DenseExperts) and isinstance(down, DenseExperts):
        return ExpertMatrices(gate_up.weight, down.weight)
    return None


def _with_shared(matrices: ExpertMatrices, shared: GatedMLP | None, moe: MoEConfig) -> ExpertMatrices | None:
    """With the shared experts as further experts, where they are whole multiples of one and of the same type."""
    if shared is None:
        return None
    gate_up, down = shared.gate_up_proj.weight, shared.down_proj.weight
    if not isinstance(gate_up, DenseWeight) or not isinstance(down, DenseWeight):
        return None
    if (
        down.weight.shape[1] != moe.n_shared_experts * matrices.down.shape[2]
        or down.weight.dtype != matrices.down.dtype
    ):
        return None
    return ExpertMatrices(matrices.gate_up, matrices.down, gate_up.weight, down.weight)
