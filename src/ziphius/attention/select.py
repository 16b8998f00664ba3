"""make_backend: which implementation of attention a device gets."""

from __future__ import annotations

import torch

from ziphius.attention.backend import AttentionBackend
from ziphius.layers.select import has_gpu_kernels


def make_backend(device: torch.device, batch_invariant: bool = False) -> AttentionBackend:
    """The fastest implementation for `device`. See make_linear_format for `batch_invariant`."""
    if device.type == "cuda" and has_gpu_kernels():
        from ziphius.attention.cuda import CudaBackend

        return CudaBackend(device, batch_invariant)
    if device.type == "cpu":
        from ziphius.attention.cpu import CpuBackend

        return CpuBackend()
    from ziphius.attention.torch_reference import TorchBackend

    return TorchBackend()
