"""In which types a model is computed, cached and held: --device, --dtype and --weights-format made definite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from ziphius.config import ServeConfig
from ziphius.errors import ConfigError
from ziphius.planner.memory import WeightsFormat
from ziphius.planner.validity import format_of_dtype, require_deterministic

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        return _DTYPES[self.dtype_name]


def resolve_precision(config: ServeConfig) -> Precision:
    """`auto` made definite. ConfigError for a GPU that is not there, or --deterministic where it cannot be kept.

    On a CPU dtype is float32, and weights are int8 only where neither was asked for: whoever names a dtype
    gets weights in it. On a GPU dtype is bfloat16 and weights are held in dtype.
    """
    device = _device(config.device)
    dtype_name = config.dtype
    if dtype_name == "auto":
        dtype_name = "float32" if device.type == "cpu" else "bfloat16"
    weights_format = config.weights_format
    if weights_format == "auto":
        int8 = device.type == "cpu" and config.dtype == "auto"
        weights_format = "int8" if int8 else format_of_dtype(dtype_name)
    held = cast(WeightsFormat, weights_format)
    if config.deterministic:
        require_deterministic(device.type, dtype_name, held)
    return Precision(device, dtype_name, held, config.deterministic)


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("device is cuda, but torch finds no CUDA GPU here; use --device cpu", param="device")
    if name == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
