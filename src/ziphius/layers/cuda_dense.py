"""The float formats on a GPU: which kernel multiplies them, by the number of tokens, and their fused mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.checkpoint.config import MoEConfig
from ziphius.formats import Format
from ziphius.kernels.gpu import experts, routing
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.experts import ExpertMatrices, PairConfig
from ziphius.kernels.gpu.routing import Routes
from ziphius.kernels.gpu.tuning import ExpertsPlan
from ziphius.layers.cuda_kernels import CudaKernels
from ziphius.layers.cuda_mixture import CudaMixture
from ziphius.layers.dense import DenseExperts, DenseWeight
from ziphius.layers.weights import (
    ExpertWeights,
    FusedMixture,
    LinearFormat,
    LinearWeight,
    MixtureWeights,
    Norm,
    torch_dtype_of,
)


class CudaDenseWeight(DenseWeight):
    """Floating point, by matrix-vector kernels for few tokens and by the library for many."""

    def __init__(self, weight: Tensor, kernels: CudaKernels) -> None:
        super().__init__(weight)
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().__call__(x)
        return self._kernels.linear(x, self.weight)

    def after_norm(self, x: Tensor, norm: Norm) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().after_norm(x, norm)
        return self._kernels.linear(x, self.weight, norm=norm)

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().onto(x, residual)
        return self._kernels.linear(x, self.weight, residual=residual)


class DenseExpertKernels:
    """The expert products of one mixture with float weights."""

    def __init__(self, kernels: CudaKernels, matrices: ExpertMatrices) -> None:
        self._kernels = kernels
        self._matrices = matrices
        self.shared = matrices.shared

    def __call__(self, x: Tensor, routes: Routes, residual: Tensor | None, plan: ExpertsPlan) -> Tensor:
        """See cuda_mixture.ExpertKernels."""
        gpu, matrices = self._kernels.gpu, self._matrices
        if isinstance(plan, PairConfig):
            return experts.pair_experts(gpu, x, routes, matrices, residual, plan)
        count = matrices.down.shape[0] + matrices.shared
        blocks = routing.align(gpu, routes, count, plan.block_m, self._kernels.routing)
        compute = experts.prompt_experts if plan.prompt else experts.grouped_experts
        return compute(gpu, x, routes, blocks, matrices, residual, plan.first, plan.second)


class CudaDenseFormat(LinearFormat):
    """Weights in a float type, which need not be the activations'."""

    def __init__(self, dtype: torch.dtype, device: torch.device, batch_invariant: bool = False) -> None:
        self._dtype = dtype
        self._kernels = CudaKernels(GpuDevice.of(device, batch_invariant), device)
        self._batch_invariant = batch_invariant

    @property
    def batch_invariant(self) -> bool:
        return self._batch_invariant

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        weight = torch.empty((out_features, in_features), dtype=self._dtype, device=device)
        return CudaDenseWeight(weight, self._kernels)

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return DenseExperts(torch.empty((experts, out_features, in_features), dtype=self._dtype, device=device))

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        return CudaDenseWeight(embedding, self._kernels) if embedding.dtype == self._dtype else None

    def mixture(self, weights: MixtureWeights, moe: MoEConfig) -> FusedMixture | None:
        gate_up, down = weights.gate_up, weights.down
        if not isinstance(gate_up, DenseExperts) or not isinstance(down, DenseExperts):
            return None
        routed = ExpertMatrices(gate_up.weight, down.weight)
        together = _with_shared(routed, weights, moe)
        return CudaMixture(
            self._kernels,
            weights,
            moe,
            routed=DenseExpertKernels(self._kernels, routed),
            together=None if together is None else DenseExpertKernels(self._kernels, together),
        )


def _with_shared(routed: ExpertMatrices, weights: MixtureWeights, moe: MoEConfig) -> ExpertMatrices | None:
    """With the shared experts as further experts, where they are whole multiples of one and of the same type."""
    gate_up, down = weights.shared_gate_up, weights.shared_down
    if not isinstance(gate_up, DenseWeight) or not isinstance(down, DenseWeight):
        return None
    if down.weight.shape[1] != moe.n_shared_experts * routed.down.shape[2] or down.weight.dtype != routed.down.dtype:
        return None
    return ExpertMatrices(routed.gate_up, routed.down, gate_up.weight, down.weight)


def make_format(row: Format, device: torch.device, batch_invariant: bool) -> LinearFormat:
    """See select.make_linear_format."""
    return CudaDenseFormat(torch_dtype_of(row), device, batch_invariant)
