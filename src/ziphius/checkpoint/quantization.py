"""Quantization: what a checkpoint's quantization_config says about how its weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziphius.errors import ModelError, UnsupportedModel
from ziphius.formats import FORMATS, WeightsFormat


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of a checkpoint that is quantized already are stored."""

    method: str
    """Its `quant_method`; empty when the config names none."""
    weights_format: WeightsFormat | None
    """None: the sizes of this quantization are not known here."""
    blocks: bool
    """Whether each block has a scale of its own, so that a rank's share must not cut a block."""
    unknown: str = ""
    """What is not known here, as `quant_method awq`; empty when everything is known."""

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Quantization | None:
        """From a Hugging Face config.json; None without quantization_config. It refuses nothing: require_known does."""
        found = data.get("quantization_config")
        if found is None:
            return None
        if not isinstance(found, Mapping) or not isinstance(found.get("quant_method"), str):
            return cls("", None, False, "no quant_method")
        method, block = found["quant_method"], found.get("weight_block_size")
        if method != "fp8":
            return cls(method, None, block is not None, f"quant_method {method}")
        if block not in (None, list(FORMATS["fp8"].block)):
            return cls(method, None, True, f"weight_block_size {block}")
        return cls(method, "fp8", block is not None)


def require_known(quantization: Quantization | None, config_file: Path) -> None:
    """ModelError for a quantization without a method, UnsupportedModel for one whose sizes are not known here."""
    if quantization is None or not quantization.unknown:
        return
    told = f"{config_file}: quantization_config has {quantization.unknown}"
    if not quantization.method:
        raise ModelError(told)
    raise UnsupportedModel(
        f"{told}, whose sizes are not known here (only fp8, whole or in blocks of {list(FORMATS['fp8'].block)})"
    )
