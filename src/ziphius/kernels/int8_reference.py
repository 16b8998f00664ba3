"""The int8 product in plain torch: the reference of the kernels, and what runs where there is no kernel.

A weight has one scale per output channel. A row of activations has one scale per 64 inputs (the last group may be
shorter): with one scale per row the outliers of a small model cost several percent of perplexity. Scales belong to
a row, so a result does not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
"""Inputs that share a scale of the activations."""

ONE_127TH = torch.tensor(1 / 127, dtype=torch.float32).item()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 [rows, k] -> (int8 [rows, k], float32 scales [rows, ceil(k / 64)]), each group's largest at 127."""
    rows, k = x.shape
    groups = F.pad(x, (0, -k % GROUP)).view(rows, -1, GROUP)
    largest = groups.abs().amax(dim=2)
    # Divide a tensor by a tensor: torch would replace a number by a tensor with a product. A group that is
    # (nearly) zero counts as zero: its reciprocal would overflow.
    inverse = torch.where(largest > 1e-30, torch.full_like(largest, 127.0) / largest, 0.0)
    values = (groups * inverse.unsqueeze(2)).round_().to(torch.int8)
    return values.view(rows, -1)[:, :k].contiguous(), largest * ONE_127TH


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x float32 [rows, in] times int8 weight [out, in] with scale [out] -> float32 [rows, out].

    Sums of integers within a group of 64 inputs are exact; the groups are added in float32, in order.
    """
    values, scales = quantize_rows(x)
    total = x.new_zeros((x.shape[0], weight.shape[0]))
    for group in range(scales.shape[1]):
        part = slice(group * GROUP, (group + 1) * GROUP)
        # Sums of 64 byte products are whole numbers far below 2^24: exact in float32.
        total += (values[:, part].float() @ weight[:, part].float().t()) * scales[:, group : group + 1]
    return total * scale
