"""The int8 linear layer: QUANTIZE_ROWS, then MULTIPLY, which takes each tile of 32 output columns as a task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ziphius.kernels.cpu.int8_tile import GROUP_STEPS, MAX_ROWS, TILE_COLUMNS, int8_tile
from ziphius.kernels.cpu.jit import PoolJob, kernel
from ziphius.kernels.cpu.memory import floats, ints64
from ziphius.kernels.cpu.pool import Program, ThreadPool
from ziphius.kernels.cpu.quantize import PackedWeight, quantize_row, row_bytes
from ziphius.kernels.cpu.sync import next_task, rows_of_task
from ziphius.kernels.int8_reference import GROUP, int8_linear

ROW_BLOCK = 512
"""How many rows stay in the second-level cache while the tiles are read."""


class Int8Linear:
    """y = x W^T on a thread pool. Not for two threads at once."""

    def __init__(self, pool: ThreadPool) -> None:
        self.pool = pool
        self._rows = np.zeros(1, dtype=np.int64)
        self._program = Program()
        self._quantize = self._program.add(QUANTIZE_ROWS, *[0] * 4)
        self._multiply = self._program.add(MULTIPLY, *[0] * 9)

    def __call__(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """x [rows, in] -> float32 [rows, out]."""
        rows, k, n = x.shape[0], weight.in_features, weight.out_features
        y = torch.empty((rows, n))
        if rows == 0:
            return y
        x = x.float().contiguous()
        quantized = torch.empty(rows * row_bytes(k), dtype=torch.uint8)
        edge = torch.empty((self.pool.threads, min(rows, ROW_BLOCK), TILE_COLUMNS))
        count = self._rows.ctypes.data
        self._rows[0] = rows
        self._quantize[:] = (count, x.data_ptr(), k, quantized.data_ptr())
        self._multiply[:] = (
            count, quantized.data_ptr(), k, weight.data.data_ptr(), weight.scale.data_ptr(), n, y.data_ptr(), 0,
            edge.data_ptr(),
        )  # fmt: skip
        self.pool.run(self._program)
        return y


def int8_linear_reference(x: Tensor, weight: PackedWeight) -> Tensor:
    """Int8Linear in plain torch."""
    return int8_linear(x.float(), weight.unpack(), weight.scale[: weight.out_features])


@kernel
def multiply_tile(x: int, rows: int, k: int, w: int, w_scale: int, y: int, y_stride: int, add: int, ahead: int) -> None:
    """y[rows, 32] (+)= quantized rows at x times the tile at w; fetches the tile at `ahead` meanwhile."""
    padded = (k + 3) // 4 * 4
    groups = (k + GROUP - 1) // GROUP
    stride = padded + 8 * groups
    last = padded // 4 - (groups - 1) * GROUP_STEPS
    panels = (rows + MAX_ROWS - 1) // MAX_ROWS
    step = 4 * TILE_COLUMNS // panels
    share = padded * TILE_COLUMNS // panels
    for panel in range(panels):
        first = rows * panel // panels
        count = rows * (panel + 1) // panels - first
        int8_tile(count, x + first * stride, stride, padded, w, groups, last, w_scale, y + first * y_stride, y_stride,
                  add, ahead + share * panel, step)  # fmt: skip


@kernel
def _copy_edge(edge: int, rows: int, columns: int, y: int, n: int) -> None:
    source, target = floats(edge, rows * TILE_COLUMNS), floats(y, rows * n)
    for row in range(rows):
        for column in range(columns):
            target[row * n + column] = source[row * TILE_COLUMNS + column]


def _quantize_rows(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 4)
    rows, x, k, out = ints64(a[0], 1)[0], a[1], a[2], a[3]
    stride = (k + 3) // 4 * 4 + 8 * ((k + GROUP - 1) // GROUP)
    chunk = rows_of_task(rows)
    while True:
        task = next_task(sync, thread, threads, (rows + chunk - 1) // chunk)
        if task < 0:
            return
        for row in range(task * chunk, min(rows, (task + 1) * chunk)):
            quantize_row(x + 4 * k * row, k, out + row * stride)


def _multiply(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 9)
    rows, x, k, w, w_scale, n, y, add, edges = ints64(a[0], 1)[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    tiles = (n + TILE_COLUMNS - 1) // TILE_COLUMNS
    padded = (k + 3) // 4 * 4
    stride = padded + 8 * ((k + GROUP - 1) // GROUP)
    blocks = (rows + ROW_BLOCK - 1) // ROW_BLOCK
    line = 4 * TILE_COLUMNS
    edge = edges + thread * min(rows, ROW_BLOCK) * line
    while True:
        task = next_task(sync, thread, threads, tiles * blocks)
        if task < 0:
            return
        first, column = task // tiles * ROW_BLOCK, task % tiles * TILE_COLUMNS
        size = min(ROW_BLOCK, rows - first)
        here, target, target_stride = w + column * padded, y + 4 * (first * n + column), 4 * n
        if column + TILE_COLUMNS > n:
            target, target_stride = edge, line
        multiply_tile(x + first * stride, size, k, here, w_scale + 4 * column, target, target_stride, add,
                      here + padded * TILE_COLUMNS)  # fmt: skip
        if column + TILE_COLUMNS > n:
            _copy_edge(edge, size, n - column, y + 4 * (first * n + column), n)


QUANTIZE_ROWS = PoolJob(_quantize_rows)
"""Arguments: the address of the number of rows; x float32 [rows, k]; k; where the quantized rows go."""

MULTIPLY = PoolJob(_multiply)
"""y [rows, n] (+)= rows times weight. Arguments: the address of the number of rows; quantized rows; k; packed weight;
its scales; n; y; whether to add to y; each thread's float32 [min(rows, ROW_BLOCK), 32], used where 32 does not divide
n (then y cannot be added to)."""
