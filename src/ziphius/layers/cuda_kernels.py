"""CudaKernels: what all weights on one GPU share: tuned sizes, workspaces, and the product with a float matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.gemv import gemv
from ziphius.kernels.gpu.routing import RouteWorkspace
from ziphius.kernels.gpu.skinny import SplitWorkspace, skinny_linear
from ziphius.kernels.gpu.tuning import Tuned
from ziphius.layers.weights import Norm


class CudaKernels:
    """Belongs to one stream."""

    def __init__(self, gpu: GpuDevice, device: torch.device) -> None:
        self.gpu = gpu
        self.tuned = Tuned.of(gpu)
        self.split = SplitWorkspace.on(device)
        self.routing = RouteWorkspace.on(device)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        norm: Norm | None = None,
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
            return skinny_linear(self.gpu, x, weight, self.split, config, residual=residual, out_dtype=out_dtype)
        if out_dtype is not None and out_dtype != x.dtype:
            y = torch.mm(x, weight.t(), out_dtype=out_dtype)
            return y if residual is None else y.add_(residual)
        # In place: the residual is not needed any more, and a copy of it would cost as much as a norm.
        return torch.mm(x, weight.t()) if residual is None else residual.addmm_(x, weight.t())
