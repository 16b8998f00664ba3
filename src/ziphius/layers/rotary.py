"""Rotary position embedding: frequencies (plain, YaRN, llama3) and the angles of a step; it caches nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ziphius.checkpoint.config import Llama3RopeConfig, YarnConfig


def plain_frequencies(dim: int, theta: float) -> Tensor:
    """theta^(-2i/dim) for i in [0, dim/2), float32 (arXiv:2104.09864)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def llama3_frequencies(dim: int, theta: float, scaling: Llama3RopeConfig) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended.

    The bands are original_max_position_embeddings / low_freq_factor and / high_freq_factor, in tokens a turn.
    """
    frequencies = plain_frequencies(dim, theta)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def yarn_frequencies(dim: int, theta: float, scaling: YarnConfig) -> Tensor:
    """YaRN's "NTK by parts" (arXiv:2309.00071, section 3.2), as DeepSeek's published model computes it.

    Pairs that turn more than beta_fast times within the original context are kept, those that turn less than
    beta_slow times are slowed by `factor`; between the two pair indices (rounded outwards) a linear ramp.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    kept = 1.0 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    # To the last bit as published: at position 160,000 one bit of a frequency is 0.001 of an angle.
    slowed = 1.0 / (scaling.factor * theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return slowed * (1 - kept) + plain_frequencies(dim, theta) * kept


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1; 1 when nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_rotary_scale(scaling: YarnConfig) -> float:
    """What cos and sin are multiplied with: mscale's temperature over mscale_all_dim's.

    This is the published model's ratio. transformers 5 agrees while both are set; with mscale_all_dim 0 it drops
    mscale, DeepSeek's modeling_deepseek.py does not, and neither does this.
    """
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def yarn_softmax_scale(scaling: YarnConfig) -> float:
    """What DeepSeek multiplies the softmax scale with: mscale_all_dim's temperature, squared (for q and for k)."""
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


class RotaryEmbedding:
    """Angles of positions. Every layer of a step shares one result."""

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
