"""Rotary position embedding: frequencies (plain, YaRN, llama3) and the angles of a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ziphius.checkpoint.config import Llama3RopeConfig, YarnConfig


def plain_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for i in [0, dim/2), float32 (arXiv:2104.09864)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def llama3_frequencies(dim: int, theta: float, scaling: Llama3RopeConfig) -> Tensor:
    """Llama 3.1 divides frequencies of long waves by `factor`, keeps those of short waves, and blends those between.

    Waves are long above original_max_position_embeddings / low_freq_factor tokens a turn, and short below
    original_max_position_embeddings / high_freq_factor.
    """
    frequencies = plain_frequencies(dim, theta)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def yarn_frequencies(dim: int, theta: float, scaling: YarnConfig) -> Tensor:
    """YaRN's "NTK by parts" (arXiv:2309.00071, section 3.2), as DeepSeek's published model computes it.

    Pairs that turn more than beta_fast times within the original context keep their frequency; for those that turn
    less than beta_slow times it is divided by `factor`. Between the two pair indices (rounded outwards) it changes
    along a linear ramp.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    kept = 1.0 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    # Equal to the published model in every bit: at position 160,000 one bit moves an angle by 0.001.
    slowed = 1.0 / (scaling.factor * theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return slowed * (1 - kept) + plain_frequencies(dim, theta) * kept


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1, or 1 where `factor` does not stretch the context."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_rotary_scale(scaling: YarnConfig) -> float:
    """The factor of cos and sin: the temperature of mscale divided by that of mscale_all_dim.

    This is the published model's ratio. transformers 5 agrees while both are set. With mscale_all_dim 0 it ignores
    mscale, which DeepSeek's modeling_deepseek.py and this function do not.
    """
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def yarn_softmax_scale(scaling: YarnConfig) -> float:
    """The factor of DeepSeek's softmax scale: mscale_all_dim's temperature, squared (once for q, once for k)."""
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


class RotaryEmbedding:
    """Computes the angles of positions, once a step for all layers."""

    def __init__(
        self, dim: int, theta: float, scaling: YarnConfig | Llama3RopeConfig | None, device: torch.device
    ) -> None:
        self.scale = 1.0
        if isinstance(scaling, YarnConfig):
            frequencies = yarn_frequencies(dim, theta, scaling)
            self.scale = yarn_rotary_scale(scaling)
        elif isinstance(scaling, Llama3RopeConfig):
            frequencies = llama3_frequencies(dim, theta, scaling)
        else:
            frequencies = plain_frequencies(dim, theta)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, dim / 2] float32, of positions [T]."""
        angles = positions.float().unsqueeze(1) * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)
