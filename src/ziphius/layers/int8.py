"""The int8 format in plain torch: what is stored, and what is multiplied. It is slow, and defines what int8 means."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.formats import Format
from ziphius.kernels import int8_reference
from ziphius.layers.weights import ExpertWeights, LinearFormat, LinearWeight

ROWS_AT_ONCE = 1024
"""Rows quantized together while loading."""
_INT8_STD = ((255**2 - 1) / 12) ** 0.5
"""Standard deviation of whole numbers drawn evenly from -127..127."""


class Int8Weight(LinearWeight):
    """Symmetric int8 with one float32 scale for each output channel. Activations are quantized when they come.

    Scales are per token (by groups of its inputs), never per tensor: an answer must not depend on its batch.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device) -> None:
        super().__init__(out_features, in_features)
        self.weight = torch.empty((out_features, in_features), dtype=torch.int8, device=device)
        self.scale = torch.empty(out_features, dtype=torch.float32, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale)

    def load_rows(self, start: int, rows: Tensor) -> None:
        _store_int8(rows, self.weight[start:], self.scale[start:])

    def fill_random(self, std: float, generator: torch.Generator) -> None:
        random_int8(self.weight, self.scale, std, generator)


class Int8Experts(ExpertWeights):
    """As Int8Weight, [experts, out, in] with scales [experts, out]."""

    def __init__(self, experts: int, out_features: int, in_features: int, device: torch.device) -> None:
        self.weight = torch.empty((experts, out_features, in_features), dtype=torch.int8, device=device)
        self.scale = torch.empty((experts, out_features), dtype=torch.float32, device=device)

    def apply(self, expert: int, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight[expert], self.scale[expert])

    def load_rows(self, expert: int, start: int, rows: Tensor) -> None:
        _store_int8(rows, self.weight[expert, start:], self.scale[expert, start:])

    def fill_random(self, std: float, generator: torch.Generator) -> None:
        random_int8(self.weight, self.scale, std, generator)


class Int8Format(LinearFormat):
    """int8 weights, dynamic int8 activations, plain torch."""

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        return Int8Weight(out_features, in_features, device)

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return Int8Experts(experts, out_features, in_features, device)


def make_format(row: Format, device: torch.device, batch_invariant: bool) -> LinearFormat:
    """See select.make_linear_format."""
    return Int8Format()


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, k] -> (int8 [n, k], float32 scale [n]) with rows ~ int8 * scale, each row's largest value at 127."""
    values = rows.float()
    scale = values.abs().amax(dim=1).div_(127.0).clamp_min_(torch.finfo(torch.float32).tiny)
    return (values / scale.unsqueeze(1)).round_().to(torch.int8), scale


def _store_int8(rows: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Quantize `rows` into the first rows of `weight` and `scale`, in blocks, which keeps the memory needed small."""
    for start in range(0, rows.shape[0], ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE]
        quantized, block_scale = quantize_int8(block)
        weight[start : start + block.shape[0]].copy_(quantized)
        scale[start : start + block.shape[0]].copy_(block_scale)


def random_int8(weight: Tensor, scale: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill int8 `weight` evenly, and `scale` so that their product has standard deviation `std`."""
    weight.random_(-127, 128, generator=generator)
    scale.fill_(std / _INT8_STD)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, in] times int8 weight [out, in] with scale [out] -> [T, out] in x's type; see kernels/int8_reference."""
    return int8_reference.int8_linear(x.float(), weight, scale).to(x.dtype)
