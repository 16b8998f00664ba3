"""make_linear_format and make_ops: which bodies of layers a device and a weights format get."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from ziphius.formats import FORMATS, Format, auto_format, format_named, format_of_dtype, unknown_format
from ziphius.layers.ops import LayerOps, TorchOps
from ziphius.layers.weights import LinearFormat


def make_linear_format(
    name: str, dtype: torch.dtype, device: torch.device, batch_invariant: bool = False
) -> LinearFormat:
    """The format for --weights-format `name`: fp32, bf16, fp16, int8, auto (int8 on a CPU, else `dtype`) or dtype.

    `batch_invariant`: no bit of a result may depend on what else is in the batch. ConfigError for a format that
    the native engine does not have.
    """
    if name == "auto":
        name = auto_format(device.type) or "dtype"
    row = FORMATS[format_of_dtype(str(dtype).removeprefix("torch."))] if name == "dtype" else format_named(name)
    body = None if row is None else _body(row, device)
    if row is None or body is None:
        raise unknown_format(name)
    # Imported late: kernels take long to import, and the modules import the interfaces that are chosen among here.
    made = importlib.import_module(f"ziphius.layers.{body}").make_format(row, device, batch_invariant)
    assert isinstance(made, LinearFormat)
    return made


def _body(row: Format, device: torch.device) -> str | None:
    """The module of this folder that computes `row` fastest on `device`."""
    if device.type == "cuda" and has_gpu_kernels() and row.gpu_body is not None:
        return row.gpu_body
    if device.type == "cpu" and row.cpu_body is not None:
        return row.cpu_body
    return row.plain_body


def has_gpu_kernels() -> bool:
    """Whether there is a GPU, and Triton to compile kernels for it. On Linux, torch for CUDA installs Triton too."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def make_ops(device: torch.device, batch_invariant: bool = False) -> LayerOps:
    """The fastest bodies for `device`. See make_linear_format for `batch_invariant`."""
    if device.type == "cuda" and has_gpu_kernels():
        from ziphius.layers.cuda_ops import CudaOps

        return CudaOps(device, batch_invariant)
    return TorchOps()
