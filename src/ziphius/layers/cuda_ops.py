"""CudaOps: the operations between matrix products on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.kernels.gpu import activation, norm, rotary
from ziphius.kernels.gpu.device import GpuDevice


class CudaOps:
    """LayerOps by Triton's kernels."""

    def __init__(self, device: torch.device, batch_invariant: bool = False) -> None:
        self._gpu = GpuDevice.of(device, batch_invariant)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(self._gpu, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(self._gpu, x, residual, weight, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return activation.silu_and_mul(self._gpu, gate_up)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return rotary.rotate(self._gpu, x, cos, sin, interleaved)
