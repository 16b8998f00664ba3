"""Precision: the device and the types that --device, --dtype and --weights-format mean on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ziphius.config import ServeConfig
from ziphius.errors import ConfigError
from ziphius.formats import Device, WeightsFormat, resolve_formats
from ziphius.layers.weights import torch_dtype
from ziphius.planner.validity import require_deterministic


@dataclass(frozen=True, slots=True)
class Precision:
    device: torch.device
    dtype_name: str
    """float32, bfloat16 or float16: of activations and cache."""
    weights_format: WeightsFormat
    """Of linear weights: fp32, bf16, fp16 or int8."""
    batch_invariant: bool = False
    """Whether no result may depend, bit for bit, on what else is in the batch (--deterministic)."""

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype_name)


def resolve_precision(config: ServeConfig) -> Precision:
    """`auto` made definite by the rule of formats.resolve_formats.

    ConfigError for a GPU that is not there, and for --deterministic where it cannot be kept.
    """
    device = _device(config.device)
    kind: Device = "cuda" if device.type == "cuda" else "cpu"
    dtype_name, weights_format = resolve_formats(kind, config.dtype, config.weights_format)
    if config.deterministic:
        require_deterministic(kind, dtype_name, weights_format)
    return Precision(device, dtype_name, weights_format, config.deterministic)


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("device is cuda, but torch finds no CUDA GPU here; use --device cpu", param="device")
    if name == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
