"""LinearFormat: how linear weights are held and multiplied; the only place that knows a weight's format.

A new format (fp8, int4) is a new pair of weight classes and a LinearFormat that makes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels import int8_reference
from ziphius.layers.layer import CheckpointTensor, Layer, Shard

if TYPE_CHECKING:
    from ziphius.kernels.cpu.linear import Int8Linear
    from ziphius.kernels.cpu.quantize import PackedWeight
    from ziphius.layers.norm import RMSNorm

_ROWS_AT_ONCE = 1024
"""Rows quantized together while loading."""
_INT8_STD = ((255**2 - 1) / 12) ** 0.5
"""Standard deviation of whole numbers drawn evenly from -127..127."""


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """A matrix of the checkpoint that becomes rows of a weight: merged projections have several parts."""

    shape: tuple[int, int]
    """[out, in] of the whole matrix in the checkpoint."""
    shard: Shard | None
    """What this rank keeps of it."""
    start: int
    """The first row of the weight that it fills."""

    @property
    def rows(self) -> int:
        """Rows of the weight that it fills."""
        return self.shard.length if self.shard is not None and self.shard.dim == 0 else self.shape[0]


class LinearWeight(Layer, ABC):
    """One matrix [out, in] of this rank, in some format."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], in x's type."""

    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """self(norm(x)); a format that can do both at once does."""
        return self(norm(x))

    def onto(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + self(x), [T, out]; `residual` may be overwritten. A format that can do both at once does."""
        return residual + self(x)

    @abstractmethod
    def load_rows(self, start: int, rows: Tensor) -> None:
        """Convert `rows` [n, in], any float type, and keep them from row `start` on."""

    @abstractmethod
    def fill_random(self, std: float, generator: torch.Generator) -> None:
        """Random values of standard deviation `std` in place of a checkpoint's."""

    def checkpoint_tensors(self, name: str, part: MatrixPart) -> Iterator[CheckpointTensor]:
        """What the checkpoint holds of `part`. A format whose checkpoints hold scales as well names them here."""
        start = part.start
        yield CheckpointTensor(f"{name}.weight", part.shape, part.shard, lambda t: self.load_rows(start, t))


class ExpertWeights(Layer, ABC):
    """The same matrix [out, in] of every expert, stacked, so that a fused kernel can take all of them."""

    @abstractmethod
    def apply(self, expert: int, x: Tensor) -> Tensor:
        """x [T, in] through one expert -> [T, out], in x's type."""

    @abstractmethod
    def load_rows(self, expert: int, start: int, rows: Tensor) -> None:
        """Convert `rows` [n, in], any float type, and keep them from row `start` of `expert` on."""

    @abstractmethod
    def fill_random(self, std: float, generator: torch.Generator) -> None:
        """Random values of standard deviation `std` in place of a checkpoint's."""

    def checkpoint_tensors(self, name: str, expert: int, part: MatrixPart) -> Iterator[CheckpointTensor]:
        """What the checkpoint holds of `part` of one expert."""
        start = part.start
        yield CheckpointTensor(f"{name}.weight", part.shape, part.shard, lambda t: self.load_rows(expert, start, t))


class LinearFormat(Protocol):
    """Makes the weights of a model's linear layers."""

    @property
    def batch_invariant(self) -> bool:
        """Whether no result depends, bit for bit, on what else is in the batch, because that was asked for."""

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        """An uninitialised weight."""

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        """Uninitialised weights of all experts."""

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        """A head that reads the embedding's own memory [vocab, hidden]; None when this format needs a copy."""


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
class DenseFormat:
    """Weights in a float type, which need not be the activations'."""

    dtype: torch.dtype
    batch_invariant: bool = False

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        return DenseWeight(torch.empty((out_features, in_features), dtype=self.dtype, device=device))

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return DenseExperts(torch.empty((experts, out_features, in_features), dtype=self.dtype, device=device))

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        return DenseWeight(embedding) if embedding.dtype == self.dtype else None


class Int8Weight(LinearWeight):
    """Symmetric int8 with one float32 scale an output channel; activations are quantized per token as they come.

    Per token (by groups of its inputs), never per tensor: an answer must not depend on what else is in the batch.
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
        _random_int8(self.weight, self.scale, std, generator)


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
        _random_int8(self.weight, self.scale, std, generator)


@dataclass(frozen=True, slots=True)
class Int8Format:
    """int8 weights, dynamic int8 activations, plain torch."""

    batch_invariant: bool = False

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        return Int8Weight(out_features, in_features, device)

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return Int8Experts(experts, out_features, in_features, device)

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        return None


class PackedInt8Weight(LinearWeight):
    """As Int8Weight, in the order of the CPU kernels' tiles."""

    def __init__(self, packed: PackedWeight, kernel: Int8Linear) -> None:
        super().__init__(packed.out_features, packed.in_features)
        self.packed = packed
        self.held = _without_padding(packed)
        self._kernel = kernel

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernel(x, self.packed).to(x.dtype)

    def load_rows(self, start: int, rows: Tensor) -> None:
        _pack_int8(rows, self.packed, start)

    def fill_random(self, std: float, generator: torch.Generator) -> None:
        _pack_random_int8(self.packed, std, generator)


class PackedInt8Experts(ExpertWeights):
    """As Int8Experts, in the order of the CPU kernels' tiles."""

    def __init__(self, packed: Sequence[PackedWeight], kernel: Int8Linear) -> None:
        self._packed = packed
        self.held = [_without_padding(weight) for weight in packed]
        self._kernel = kernel

    def apply(self, expert: int, x: Tensor) -> Tensor:
        return self._kernel(x, self._packed[expert]).to(x.dtype)

    def load_rows(self, expert: int, start: int, rows: Tensor) -> None:
        _pack_int8(rows, self._packed[expert], start)

    def fill_random(self, std: float, generator: torch.Generator) -> None:
        for packed in self._packed:
            _pack_random_int8(packed, std, generator)


class PackedInt8Format:
    """int8 weights, dynamic int8 activations, by the CPU kernels; the meaning is Int8Format's."""

    def __init__(self, kernel: Int8Linear, zeros: Callable[[int, int], PackedWeight]) -> None:
        """`zeros` makes the packed weight [out, in]."""
        self.kernel = kernel
        self.batch_invariant = False
        self._zeros = zeros

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        return PackedInt8Weight(self._zeros(out_features, in_features), self.kernel)

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return PackedInt8Experts([self._zeros(out_features, in_features) for _ in range(experts)], self.kernel)

    def tied(self, embedding: Tensor) -> LinearWeight | None:
        return None


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times weight [out, in], in the weight's type -> [T, out] in x's type."""
    if x.dtype == weight.dtype:
        return F.linear(x, weight)
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, k] -> (int8 [n, k], float32 scale [n]) with rows ~ int8 * scale, each row's largest value at 127."""
    values = rows.float()
    scale = values.abs().amax(dim=1).div_(127.0).clamp_min_(torch.finfo(torch.float32).tiny)
    return (values / scale.unsqueeze(1)).round_().to(torch.int8), scale


def _store_int8(rows: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Quantize `rows` into the first rows of `weight` and `scale`, by blocks that need little memory."""
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        block = rows[start : start + _ROWS_AT_ONCE]
        quantized, block_scale = quantize_int8(block)
        weight[start : start + block.shape[0]].copy_(quantized)
        scale[start : start + block.shape[0]].copy_(block_scale)


def _without_padding(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """As many bytes as Int8Weight holds: the planner counts those, not what fills up the last tile."""
    size = packed.out_features * packed.in_features
    return packed.data.view(-1)[:size], packed.scale[: packed.out_features]


def _pack_int8(rows: Tensor, packed: PackedWeight, start: int) -> None:
    for at in range(0, rows.shape[0], _ROWS_AT_ONCE):
        packed.store_rows(start + at, *quantize_int8(rows[at : at + _ROWS_AT_ONCE]))


def _random_int8(weight: Tensor, scale: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill int8 `weight` evenly, and `scale` so that the values it stands for have standard deviation `std`."""
    weight.random_(-127, 128, generator=generator)
    scale.fill_(std / _INT8_STD)


def _pack_random_int8(packed: PackedWeight, std: float, generator: torch.Generator) -> None:
    for start in range(0, packed.out_features, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, packed.out_features - start)
        weight, scale = torch.empty((rows, packed.in_features), dtype=torch.int8), torch.empty(rows)
        _random_int8(weight, scale, std, generator)
        packed.store_rows(start, weight, scale)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [T, in] times int8 weight [out, in] with scale [out] -> [T, out] in x's type; see kernels/int8_reference."""
    return int8_reference.int8_linear(x.float(), weight, scale).to(x.dtype)
