"""Rotary embedding as a config describes it: its base, and how longer contexts scale it."""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.checkpoint.keys import Keys
from ziphius.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN's parameters (Peng et al. 2023, arXiv:2309.00071), under Hugging Face's names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True)
class Llama3RopeConfig:
    """Llama 3.1's frequency scaling, under Hugging Face's names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = YarnConfig | Llama3RopeConfig


def read_rope(keys: Keys) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). UnsupportedModel for a kind of scaling that is not known."""
    # transformers 5 writes rope_parameters, with rope_theta inside; 4 wrote rope_scaling beside rope_theta.
    scaling = keys.child("rope_parameters") or keys.child("rope_scaling")
    theta = (scaling.get("rope_theta", float, None) if scaling else None) or keys.get("rope_theta", float, 10000.0)
    if scaling is None:
        return theta, None
    kind = scaling.get("rope_type", str, None) or scaling.get("type", str, "default")
    if kind == "default":
        return theta, None
    if kind == "yarn":
        return theta, YarnConfig(
            factor=scaling.get("factor", float),
            original_max_position_embeddings=scaling.size("original_max_position_embeddings"),
            beta_fast=scaling.get("beta_fast", float, 32.0),
            beta_slow=scaling.get("beta_slow", float, 1.0),
            mscale=scaling.get("mscale", float, 1.0),
            mscale_all_dim=scaling.get("mscale_all_dim", float, 0.0),
        )
    if kind == "llama3":
        return theta, Llama3RopeConfig(
            factor=scaling.get("factor", float),
            low_freq_factor=scaling.get("low_freq_factor", float),
            high_freq_factor=scaling.get("high_freq_factor", float),
            original_max_position_embeddings=scaling.size("original_max_position_embeddings"),
        )
    raise UnsupportedModel(f"config.json: rope scaling {kind!r} is not supported (only yarn and llama3)")
