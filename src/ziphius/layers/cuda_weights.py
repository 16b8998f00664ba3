"""CudaDenseFormat: float weights on a GPU; which kernel multiplies them, by the number of tokens. It holds no maths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.gemv import gemv
from ziphius.kernels.gpu.skinny import SplitWorkspace, skinny_linear
from ziphius.kernels.gpu.tuning import Tuned
from ziphius.layers.quantization import DenseExperts, DenseWeight, ExpertWeights, LinearWeight

if TYPE_CHECKING:
    from ziphius.layers.norm import RMSNorm


class CudaKernels:
    """What products on one GPU share. Belongs to one stream."""

    def __init__(self, gpu: GpuDevice, device: torch.device) -> None:
        self.gpu = gpu
        self.tuned = Tuned.of(gpu)
        self.workspace = SplitWorkspace.on(device)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [T, K], or norm(x), times weight [N, K] (+ residual [T, N], which may be overwritten) -> [T, N]."""
        tokens, (rows, columns) = x.shape[0], weight.shape
        if tokens == 1 and not self.gpu.batch_invariant and columns <= 16384:
            normed = None if norm is None else (norm.weight, norm.eps)
            shape = self.tuned.gemv(rows, columns)
            return gemv(self.gpu, x, weight, norm=normed, residual=residual, out_dtype=out_dtype, shape=shape)
        if norm is not None:
            x = norm(x)
        config = self.tuned.skinny(tokens, rows, columns)
        if config is not None:
            return skinny_linear(self.gpu, x, weight, self.workspace, config, residual=residual, out_dtype=out_dtype)
        if out_dtype is not None and out_dtype != x.dtype:
            y = torch.mm(x, weight.t(), out_dtype=out_dtype)
            return y if residual is None else y.add_(residual)
        # In place: the residual is not needed any more, and a copy of it would cost as much as a norm.
        return torch.mm(x, weight.t()) if residual is None else residual.addmm_(x, weight.t())


class CudaDenseWeight(DenseWeight):
    """Floating point, by matrix-vector kernels for few tokens and by the library for many."""

    def __init__(self, weight: Tensor, kernels: CudaKernels) -> None:
        super().__init__(weight)
        self._kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().__call__(x)
        return self._kernels.linear(x, self.weight)

    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().after_norm(x, norm)
        return self._kernels.linear(x, self.weight, norm=norm)

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().onto(x, residual)
        return self._kernels.linear(x, self.weight, residual=residual)


class CudaDenseFormat:
    """Weights in a float type, which need not be the activations'."""

    def __init__(self, dtype: torch.dtype, device: torch.device, batch_invariant: bool = False) -> None:
        self._dtype = dtype
        self.batch_invariant = batch_invariant
        self._kernels = CudaKernels(GpuDevice.of(device, batch_invariant), device)

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        weight = torch.empty((out_features, in_features), dtype=self._dtype, device=device)
        return CudaDenseWeight(weight, self._kernels)

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return DenseExperts(torch.empty((experts, out_features, in_features), dtype=self._dtype, device=device))

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        return CudaDenseWeight(embedding, self._kernels) if embedding.dtype == self._dtype else None
