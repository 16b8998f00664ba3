"""The tile of an int8 product: the sums that are kept in registers.

Every argument is an address or a count of at least 1. Strides are in bytes.
"""

from __future__ import annotations

from llvmlite import ir

from ziphius.kernels.cpu.target import TARGET
from ziphius.kernels.cpu.vector_ir import F32, I8, I16, I32, Emitter, Value, byte_vector_arguments, i64, tile, vector

TILE_COLUMNS = 32
"""Output columns of an int8 tile."""
GROUP_STEPS = 16
"""Steps (of four inputs) that share one scale of the activations."""
MAX_ROWS = TARGET.byte_rows
"""Rows of a tile at most."""


@tile
def int8_tile(
    ir_: Emitter, rows: Value, x: Value, x_stride: Value, scales: Value, w: Value, groups: Value, last: Value,
    w_scale: Value, y: Value, y_stride: Value, add: Value, ahead: Value, ahead_stride: Value,
) -> None:  # fmt: skip
    """y[rows, 32] (+)= sum over groups of x_scale[row, group] * (x[row, group] . w[group, column]) * w_scale[column].

    1 <= rows <= MAX_ROWS. x: int8 rows, quantize.py's layout, whose (scale, -128 * sum) pairs start `scales` bytes
    into each row. w: packed bytes, w + 128. `last`: steps of the last group. `add` != 0 adds to y. While it runs it
    fetches two cache lines a step from `ahead` on, `ahead_stride` bytes further each step.
    """
    arguments = [x, x_stride, scales, w, groups, last, w_scale, y, y_stride, add, ahead, ahead_stride]
    ir_.variants(rows, MAX_ROWS, lambda count: _Int8Tile(ir_, count, arguments).emit())


class _Int8Tile:
    """Emits one int8 tile: float accumulators over the groups, int32 accumulators within one."""

    def __init__(self, ir_: Emitter, rows: int, arguments: list[Value]) -> None:
        self.ir = ir_
        (self.x, self.x_stride, self.scales, self.w, self.groups, self.last, self.w_scale, self.y, self.y_stride,
         self.add, self.ahead, self.ahead_stride) = arguments  # fmt: skip
        self.rows = ir_.addresses(self.x, self.x_stride, rows)
        self.lanes = TARGET.byte_lanes
        self.vectors = TILE_COLUMNS // self.lanes

    def emit(self) -> None:
        kind = vector(F32, self.lanes)
        zeros = [ir.Constant(kind, None)] * (len(self.rows) * self.vectors)
        sums = self.ir.loop(self.groups, zeros, self._group)
        builder = self.ir.builder
        scales = [self.ir.load(kind, self.w_scale, 4 * self.lanes * j) for j in range(self.vectors)]
        scaled = [builder.fmul(s, scales[i % self.vectors]) for i, s in enumerate(sums)]
        targets = self.ir.addresses(self.y, self.y_stride, len(self.rows))
        adds = builder.icmp_signed("!=", self.add, i64(0))
        with builder.if_else(adds) as (then, otherwise):
            with then:
                for i, value in enumerate(scaled):
                    row, j = divmod(i, self.vectors)
                    old = self.ir.load(kind, targets[row], 4 * self.lanes * j)
                    self.ir.store(builder.fadd(old, value), targets[row], 4 * self.lanes * j)
            with otherwise:
                for i, value in enumerate(scaled):
                    row, j = divmod(i, self.vectors)
                    self.ir.store(value, targets[row], 4 * self.lanes * j)

    def _group(self, group: Value, sums: list[Value]) -> list[Value]:
        builder = self.ir.builder
        is_last = builder.icmp_signed("==", group, builder.sub(self.groups, i64(1)))
        steps = builder.select(is_last, self.last, i64(GROUP_STEPS))
        first = builder.mul(group, i64(GROUP_STEPS))
        pair = self.ir.offset(self.ir.scaled(group, 8), self.scales)
        starts = []
        for row in self.rows:
            start = self._start(self.ir.load(I32, self.ir.offset(row, pair), 4))
            starts += [start] * self.vectors
        ahead = self.ir.offset(self.ahead, builder.mul(first, self.ahead_stride))
        products = self.ir.loop(steps, starts, lambda i, sums: self._step(builder.add(first, i), i, ahead, sums))
        out = []
        for i, (total, product) in enumerate(zip(sums, products, strict=True)):
            scale = self.ir.splat(self.ir.load(F32, self.ir.offset(self.rows[i // self.vectors], pair)), self.lanes)
            out.append(self.ir.fma(builder.sitofp(product, total.type), scale, total))
        return out

    def _start(self, offset: Value) -> Value:
        """-128 * sum(x) undoes the +128 of unsigned weights; the dots that restore the sign start at zero."""
        if TARGET.byte_dot.startswith("vnni"):
            return self.ir.splat(offset, self.lanes)
        return ir.Constant(vector(I32, self.lanes), None)

    def _step(self, step: Value, in_group: Value, ahead: Value, sums: list[Value]) -> list[Value]:
        size = 4 * self.lanes
        weights = self.ir.offset(self.w, self.ir.scaled(step, 4 * TILE_COLUMNS))
        columns = [self.ir.load(vector(I8, size), weights, size * j) for j in range(self.vectors)]
        target = self.ir.offset(ahead, self.ir.builder.mul(in_group, self.ahead_stride))
        self.ir.prefetch(target)
        self.ir.prefetch(target, 64)
        inputs = self.ir.scaled(step, 4)
        out = []
        for r, row in enumerate(self.rows):
            four = self.ir.splat(self.ir.load(I32, row, inputs), self.lanes)
            for j in range(self.vectors):
                out.append(byte_dot(self.ir, sums[r * self.vectors + j], columns[j], four))
        return out


def byte_dot(ir_: Emitter, total: Value, weights: Value, inputs: Value) -> Value:
    """total[lane] + the sum of four (weight + 128 or weight) * input; which of the two, _Int8Tile._start knows.

    weights: 4 * lanes bytes (weight + 128). inputs: lanes int32, each the same four int8.
    """
    if TARGET.byte_dot == "vnni512":
        return _vnni(ir_, "llvm.x86.avx512.vpdpbusd.512", total, weights, inputs)
    if TARGET.byte_dot == "vnni256":
        return _vnni(ir_, "llvm.x86.avx512.vpdpbusd.256", total, weights, inputs)
    bytes_ = ir_.builder.bitcast(inputs, weights.type)
    signed = ir_.builder.xor(weights, ir.Constant(weights.type, [-128] * weights.type.count))
    if TARGET.byte_dot == "avx2":
        return _avx2(ir_, total, signed, bytes_)
    return _generic(ir_, total, signed, bytes_)


def _vnni(ir_: Emitter, name: str, total: Value, weights: Value, inputs: Value) -> Value:
    if byte_vector_arguments():
        return ir_.call(name, total.type, [total, weights, ir_.builder.bitcast(inputs, weights.type)])
    return ir_.call(name, total.type, [total, ir_.builder.bitcast(weights, total.type), inputs])


def _avx2(ir_: Emitter, total: Value, weights: Value, inputs: Value) -> Value:
    # vpmaddubsw saturates at 16 bits, so the unsigned side is |input| <= 127: 2 * 127 * 127 fits.
    absolute = ir_.call("llvm.abs.v32i8", inputs.type, [inputs, ir.Constant(ir.IntType(1), 0)])
    signed = ir_.call("llvm.x86.avx2.psign.b", inputs.type, [weights, inputs])
    pairs = ir_.call("llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), [absolute, signed])
    ones = ir.Constant(vector(I16, 16), [1] * 16)
    return ir_.builder.add(total, ir_.call("llvm.x86.avx2.pmadd.wd", vector(I32, 8), [pairs, ones]))


def _generic(ir_: Emitter, total: Value, weights: Value, inputs: Value) -> Value:
    wide = vector(I16, weights.type.count)
    products = ir_.builder.mul(ir_.builder.sext(weights, wide), ir_.builder.sext(inputs, wide))
    for start in range(4):
        lanes = ir_.shuffle(products, list(range(start, weights.type.count, 4)))
        total = ir_.builder.add(total, ir_.builder.sext(lanes, total.type))
    return total
