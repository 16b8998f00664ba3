"""The int8 format on the CPU kernels; its meaning is that of layers/int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ziphius.formats import Format
from ziphius.layers import int8
from ziphius.layers.int8 import quantize_int8, random_int8
from ziphius.layers.weights import ExpertWeights, LinearFormat, LinearWeight

if TYPE_CHECKING:
    from ziphius.kernels.cpu.linear import Int8Linear
    from ziphius.kernels.cpu.quantize import PackedWeight


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


class PackedInt8Format(LinearFormat):
    """int8 weights, dynamic int8 activations, by the CPU kernels; the meaning is Int8Format's."""

    def __init__(self, kernel: Int8Linear, zeros: Callable[[int, int], PackedWeight]) -> None:
        """`zeros` makes the packed weight [out, in]."""
        self.kernel = kernel
        self._zeros = zeros

    def linear(self, out_features: int, in_features: int, device: torch.device) -> LinearWeight:
        return PackedInt8Weight(self._zeros(out_features, in_features), self.kernel)

    def experts(self, experts: int, out_features: int, in_features: int, device: torch.device) -> ExpertWeights:
        return PackedInt8Experts([self._zeros(out_features, in_features) for _ in range(experts)], self.kernel)


def make_format(row: Format, device: torch.device, batch_invariant: bool) -> LinearFormat:
    """See select.make_linear_format."""
    # These imports take a second, and only this format needs them.
    from ziphius.kernels.cpu.linear import Int8Linear
    from ziphius.kernels.cpu.pool import ThreadPool, default_threads
    from ziphius.kernels.cpu.quantize import PackedWeight

    return PackedInt8Format(Int8Linear(ThreadPool(default_threads())), PackedWeight.zeros)


def _without_padding(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Views of as many bytes as Int8Weight holds: the planner does not count what fills the last tile."""
    size = packed.out_features * packed.in_features
    return packed.data.view(-1)[:size], packed.scale[: packed.out_features]


def _pack_int8(rows: Tensor, packed: PackedWeight, start: int) -> None:
    for at in range(0, rows.shape[0], int8.ROWS_AT_ONCE):
        packed.store_rows(start + at, *quantize_int8(rows[at : at + int8.ROWS_AT_ONCE]))


def _pack_random_int8(packed: PackedWeight, std: float, generator: torch.Generator) -> None:
    for start in range(0, packed.out_features, int8.ROWS_AT_ONCE):
        rows = min(int8.ROWS_AT_ONCE, packed.out_features - start)
        weight, scale = torch.empty((rows, packed.in_features), dtype=torch.int8), torch.empty(rows)
        random_int8(weight, scale, std, generator)
        packed.store_rows(start, weight, scale)
