"""make_linear_format and make_ops: which bodies of layers a device and a format get; it computes nothing."""

from __future__ import annotations

import importlib.util

import torch

from ziphius.errors import ConfigError
from ziphius.layers.ops import LayerOps, TorchOps
from ziphius.layers.quantization import DenseFormat, Int8Format, LinearFormat, PackedInt8Format


def make_linear_format(
    name: str, dtype: torch.dtype, device: torch.device, batch_invariant: bool = False
) -> LinearFormat:
    """The format for --weights-format `name`: fp32, bf16, fp16, int8, or auto (int8 on a CPU, else `dtype`).

    `batch_invariant`: no result may depend, bit for bit, on what else is in the batch.
    """
    if name == "auto":
        name = "int8" if device.type == "cpu" else "dtype"
    if name == "int8":
        return _int8_on_cpu() if device.type == "cpu" else Int8Format()
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "dtype": dtype}
    if name not in types:
        raise ConfigError(f"weights_format {name!r} is not one of fp32, bf16, fp16, int8", param="weights_format")
    if device.type == "cuda" and has_gpu_kernels():
        from ziphius.layers.cuda_weights import CudaDenseFormat

        return CudaDenseFormat(types[name], device, batch_invariant)
    return DenseFormat(types[name])


def has_gpu_kernels() -> bool:
    """Whether there is a GPU, and Triton to compile for it: torch for CUDA brings it along on Linux."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def _int8_on_cpu() -> LinearFormat:
    # Imported late: it takes a second, and only this format needs it.
    from ziphius.kernels.cpu.linear import Int8Linear
    from ziphius.kernels.cpu.pool import ThreadPool, default_threads
    from ziphius.kernels.cpu.quantize import PackedWeight

    return PackedInt8Format(Int8Linear(ThreadPool(default_threads())), PackedWeight.zeros)


def make_ops(device: torch.device, batch_invariant: bool = False) -> LayerOps:
    """The fastest bodies there are for `device`; see make_linear_format for `batch_invariant`."""
    if device.type == "cuda" and has_gpu_kernels():
        from ziphius.layers.cuda_ops import CudaOps

        return CudaOps(device, batch_invariant)
    return TorchOps()
