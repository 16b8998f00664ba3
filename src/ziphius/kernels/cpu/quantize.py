"""int8 as the tiles read it: packed weights and quantized rows.

int8_reference.py says what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.cpu.int8_tile import GROUP_STEPS, TILE_COLUMNS
from ziphius.kernels.cpu.jit import kernel
from ziphius.kernels.cpu.memory import aligned_bytes, bytes8, floats, ints32
from ziphius.kernels.cpu.row_tiles import quantize_group
from ziphius.kernels.int8_reference import GROUP, ONE_127TH

assert GROUP == 4 * GROUP_STEPS


def padded_inputs(in_features: int) -> int:
    return (in_features + 3) // 4 * 4


def row_bytes(in_features: int) -> int:
    """Bytes of one quantized row: int8 [padded_inputs], then (float32 scale, int32 -128 * sum) of each group."""
    return padded_inputs(in_features) + 8 * ((in_features + GROUP - 1) // GROUP)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """An int8 weight [out, in] in the order a tile reads it."""

    data: Tensor
    """uint8 [ceil(out / 32), ceil(in / 4), 32, 4], each weight + 128; 128 (zero) beyond the matrix."""
    scale: Tensor
    """float32 [ceil(out / 32) * 32], of each output channel; 0 beyond the matrix."""
    out_features: int
    in_features: int

    @classmethod
    def zeros(cls, out_features: int, in_features: int) -> PackedWeight:
        tiles, inputs = -(-out_features // TILE_COLUMNS), padded_inputs(in_features)
        data = aligned_bytes(tiles * TILE_COLUMNS * inputs).fill_(128).view(tiles, inputs // 4, TILE_COLUMNS, 4)
        return cls(data, torch.zeros(tiles * TILE_COLUMNS), out_features, in_features)

    def store_rows(self, start: int, rows: Tensor, scale: Tensor) -> None:
        """rows int8 [n, in] in -127..127 with scale [n]. Store them as the rows from `start` on."""
        count = rows.shape[0]
        steps = self.data.shape[1]
        values = F.pad(rows, (0, steps * 4 - self.in_features)).to(torch.int16).add_(128).to(torch.uint8)
        if start % TILE_COLUMNS == 0 and count % TILE_COLUMNS == 0:
            first = start // TILE_COLUMNS
            tiles = values.view(-1, TILE_COLUMNS, steps, 4).transpose(1, 2)
            self.data[first : first + tiles.shape[0]].copy_(tiles)
        else:
            index = torch.arange(start, start + count)
            self.data[index // TILE_COLUMNS, :, index % TILE_COLUMNS] = values.view(count, steps, 4)
        self.scale[start : start + count].copy_(scale)

    def unpack(self) -> Tensor:
        """The int8 weight [out, in]."""
        tiles, steps = self.data.shape[:2]
        weight = self.data.transpose(1, 2).reshape(tiles * TILE_COLUMNS, steps * 4)
        return weight[: self.out_features, : self.in_features].to(torch.int16).sub_(128).to(torch.int8)


def pack_weight(weight: Tensor, scale: Tensor) -> PackedWeight:
    """weight int8 [out, in] in -127..127, scale [out]."""
    packed = PackedWeight.zeros(*weight.shape)
    packed.store_rows(0, weight, scale)
    return packed


@kernel
def quantize_row(x: int, k: int, row: int) -> None:
    """x: the address of floats [k]; row: the address of row_bytes(k) bytes to fill."""
    padded = (k + 3) // 4 * 4
    full = k // GROUP
    for group in range(full):
        quantize_group(x + 4 * GROUP * group, row + GROUP * group, row + padded + 8 * group)
    if full * GROUP < k:
        _quantize_rest(x + 4 * GROUP * full, k - GROUP * full, row + GROUP * full, row + padded + 8 * full)


@kernel
def _quantize_rest(x: int, size: int, row: int, pair: int) -> None:
    inputs, values = floats(x, size), bytes8(row, (size + 3) // 4 * 4)
    largest = np.float32(0)
    for i in range(size):
        largest = max(largest, abs(inputs[i]))
    inverse = np.float32(127) / largest if largest > np.float32(1e-30) else np.float32(0)
    total = np.int32(0)
    for i in range(size):
        value = np.int32(np.rint(inputs[i] * inverse))
        values[i] = value
        total += value
    for i in range(size, (size + 3) // 4 * 4):
        values[i] = 0
    floats(pair, 1)[0] = largest * np.float32(ONE_127TH)
    ints32(pair, 2)[1] = np.int32(-128) * total
