"""The jobs of a Llama layer that no other file has: norm, rotation and cache, the gated half of the MLP."""

from __future__ import annotations

import numpy as np

from ziphius.kernels.cpu.attention import read_block, slot_bytes, store_key
from ziphius.kernels.cpu.int8_tile import TILE_COLUMNS
from ziphius.kernels.cpu.jit import PoolJob
from ziphius.kernels.cpu.linear import multiply_tile
from ziphius.kernels.cpu.memory import ints64
from ziphius.kernels.cpu.quantize import quantize_row
from ziphius.kernels.cpu.row_tiles import LANES, copy_row, rms_norm_row, rotate_row, silu_mul_row
from ziphius.kernels.cpu.sync import next_task, rows_of_task
from ziphius.kernels.int8_reference import GROUP

GATE_ROWS = 48
"""How many rows of gate and up are computed together: both tiles and the results fit into the first-level cache."""
_ONE = 0x3F800000
"""The bits of float32 1."""


def _norm_rows(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 7)
    rows, x, weight, size, eps, out, quantized = ints64(a[0], 1)[0], a[1], a[2], a[3], a[4], a[5], a[6]
    stride = (size + 3) // 4 * 4 + 8 * ((size + GROUP - 1) // GROUP)
    chunk = rows_of_task(rows)
    while True:
        task = next_task(sync, thread, threads, (rows + chunk - 1) // chunk)
        if task < 0:
            return
        for row in range(task * chunk, min(rows, (task + 1) * chunk)):
            rms_norm_row(x + 4 * size * row, weight, size // LANES, eps, out + 4 * size * row)
            if quantized != 0:
                quantize_row(out + 4 * size * row, size, quantized + row * stride)


def _rotate_and_store(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 8)
    rows, shape, inputs = ints64(a[0], 1)[0], read_block(a[1]), ints64(a[2], 3)
    qkv, stride, k_cache, v_cache, q_factor = a[3], a[4], a[5], a[6], a[7]
    slots = ints64(inputs[2], rows)
    half, size = shape.head_dim // 2, 4 * shape.head_dim
    chunk = rows_of_task(rows)
    while True:
        task = next_task(sync, thread, threads, (rows + chunk - 1) // chunk)
        if task < 0:
            return
        for row in range(task * chunk, min(rows, (task + 1) * chunk)):
            x, cos, sin = qkv + row * stride, inputs[0] + 4 * half * row, inputs[1] + 4 * half * row
            for head in range(shape.heads + shape.kv_heads):
                factor = q_factor if head < shape.heads else _ONE
                rotate_row(x + head * size, cos, sin, half // LANES, factor, x + head * size)
            keys = x + shape.heads * size
            store_key(shape, k_cache, slots[row], keys)
            values, target = keys + shape.kv_heads * size, v_cache + slots[row] * slot_bytes(shape)
            copy_row(values, shape.kv_heads * shape.head_dim // LANES, target)


def _gate_up(thread: int, threads: int, sync: int, arguments: int) -> None:
    a = ints64(arguments, 8)
    rows, quantized, k, w, w_scale, width, gates, gated = ints64(a[0], 1)[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    stride = (k + 3) // 4 * 4 + 8 * ((k + GROUP - 1) // GROUP)
    tile_bytes = (k + 3) // 4 * 4 * TILE_COLUMNS
    tiles = width // TILE_COLUMNS
    line = 4 * TILE_COLUMNS
    gate = gates + thread * 2 * GATE_ROWS * line
    up = gate + GATE_ROWS * line
    overwrite = int(np.int64(0))  # with the literal 0 numba would compile multiply_tile a second time
    while True:
        tile = next_task(sync, thread, threads, tiles)
        if tile < 0:
            return
        w_gate, w_up = w + tile * tile_bytes, w + (tiles + tile) * tile_bytes
        for first in range(0, rows, GATE_ROWS):
            count = min(GATE_ROWS, rows - first)
            x = quantized + first * stride
            for i in range(2):
                here, ahead = (w_up, w_gate + tile_bytes) if i else (w_gate, w_up)
                scale = w_scale + line * (tiles * i + tile)
                multiply_tile(x, count, k, here, scale, up if i else gate, line, overwrite, ahead)
            for row in range(count):
                target = gated + 4 * ((first + row) * width + tile * TILE_COLUMNS)
                silu_mul_row(gate + row * line, up + row * line, TILE_COLUMNS // LANES, target)


NORM_ROWS = PoolJob(_norm_rows)
"""RMSNorm. Arguments: the address of the number of rows; x float32 [rows, size], size a multiple of 16; weight; size;
eps, a float32's bits; where the result goes, and its quantized rows (0: nowhere)."""

ROTATE_AND_STORE = PoolJob(_rotate_and_store)
"""Rotates q (times a factor) and k in place and puts k and v into the cache. Arguments: the address of the number of
tokens; of an AttentionBlock; of (cos, sin, slots), which are float32 [tokens, head_dim / 2] twice and int64 [tokens];
qkv float32; bytes from a token to the next; this layer's keys and values; the factor, a float32's bits."""

GATE_UP = PoolJob(_gate_up)
"""silu(gate) * up; a task is 32 columns of both. Arguments: the address of the number of rows; quantized rows; k; the
packed weight, all of gate before all of up; its scales; columns of gate, a multiple of 32; each thread's float32
[2, GATE_ROWS, 32]; where the result goes, float32 [rows, columns]."""
