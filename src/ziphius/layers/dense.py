"""The float formats in plain torch: weights in a float type, which need not be the activations'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.formats import Format
from ziphius.layers.weights import ExpertWeights, LinearFormat, LinearWeight, torch_dtype_of


class DenseWeight(LinearWeight):
    """Floating point, as torch multiplies it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape)
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return dense_linear(x, self.weight)

    def load_rows(self, start: int, rows: Tensor) -> None:
        self.weight[start : start + rows.shape[0]].copy_(rows)

    def fill_random(self, std: float, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, std, generator=generator)


class DenseExperts(ExpertWeights):
    """Floating point, [experts, out, in]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def apply(self, expert: int, x: Tensor) -> Tensor:
        return dense_linear(x, self.weight[expert])

    def load_rows(self, expert: int, start: int, rows: Tensor) -> None:
        self.weight[expert, start : start + rows.shape[0]].copy_(rows)

    def fill_random(self, std: float, generator: torch.Generator) -> None:
        self.weight.normal_(0.0, std, generator=generator)


@dataclass(frozen=True, slots=True)
class DenseFormat(LinearFormat):
    """Weights in a float type, which need not be the activations'."""

    dtype: torch.dtype

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        return DenseWeight(torch.empty((out_features, in_features), dtype=self.dtype, device=device))

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return DenseExperts(torch.empty((experts, out_features, in_features), dtype=self.dtype, device=device))

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        return DenseWeight(embedding) if embedding.dtype == self.dtype else None


def make_format(row: Format, device: torch.device, batch_invariant: bool) -> LinearFormat:
    """See select.make_linear_format."""
    return DenseFormat(torch_dtype_of(row))


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times weight [out, in], in the weight's type -> [T, out] in x's type."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight)
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)
