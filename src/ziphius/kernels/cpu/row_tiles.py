"""What happens to one row between products, as tiles in float32: norm, gate, rotation and quantization.

Every argument is an address or a count of 16-lane chunks, unless it says otherwise.
"""

from __future__ import annotations

from llvmlite import ir

from ziphius.kernels.cpu.vector_ir import F32, I8, I32, LOG2_E, Emitter, Value, tile, vector
from ziphius.kernels.int8_reference import ONE_127TH

LANES = 16

_KIND = vector(F32, LANES)
_ZERO = ir.Constant(_KIND, None)


@tile
def rms_norm_row(ir_: Emitter, x: Value, weight: Value, chunks: Value, eps: Value, out: Value) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; eps: a float32's bits."""
    builder = ir_.builder

    def square(index: Value, sums: list[Value]) -> list[Value]:
        value = ir_.load(_KIND, x, ir_.scaled(index, 64))
        return [ir_.fma(value, value, sums[0])]

    total = ir_.fold(builder.fadd, ir_.loop(chunks, [_ZERO], square))
    size = builder.fmul(builder.sitofp(chunks, F32), ir.Constant(F32, float(LANES)))
    root = ir_.call("llvm.sqrt.f32", F32, [builder.fadd(builder.fdiv(total, size), ir_.float_of(eps))])
    factor = ir_.splat(builder.fdiv(ir.Constant(F32, 1.0), root), LANES)

    def scale(index: Value, _: list[Value]) -> list[Value]:
        at = ir_.scaled(index, 64)
        value = builder.fmul(ir_.load(_KIND, x, at), factor)
        ir_.store(builder.fmul(value, ir_.load(_KIND, weight, at)), out, at)
        return []

    ir_.loop(chunks, [], scale)


@tile
def silu_mul_row(ir_: Emitter, gate: Value, up: Value, chunks: Value, out: Value) -> None:
    """out = gate / (1 + exp(-gate)) * up."""
    builder = ir_.builder

    def chunk(index: Value, _: list[Value]) -> list[Value]:
        at = ir_.scaled(index, 64)
        value = ir_.load(_KIND, gate, at)
        # Above 2^126 the quotient is 0 in any case, but the exponent would overflow into the sign.
        power = ir_.minimum(builder.fmul(value, ir_.constant(-LOG2_E)), ir_.constant(126.0))
        below = builder.fadd(ir_.exp2(power), ir_.constant(1.0))
        ir_.store(builder.fmul(builder.fdiv(value, below), ir_.load(_KIND, up, at)), out, at)
        return []

    ir_.loop(chunks, [], chunk)


@tile
def rotate_row(ir_: Emitter, x: Value, cos: Value, sin: Value, chunks: Value, factor: Value, out: Value) -> None:
    """Rotary embedding of the pairs (x[i], x[i + half]), half = 16 * chunks, times `factor` (a float32's bits)."""
    builder = ir_.builder
    half = ir_.scaled(chunks, 64)
    factors = ir_.splat(ir_.float_of(factor), LANES)

    def chunk(index: Value, _: list[Value]) -> list[Value]:
        at = ir_.scaled(index, 64)
        behind = builder.add(at, half)
        a, b = ir_.load(_KIND, x, at), ir_.load(_KIND, x, behind)
        c, s = ir_.load(_KIND, cos, at), ir_.load(_KIND, sin, at)
        first = builder.fsub(builder.fmul(a, c), builder.fmul(b, s))
        second = builder.fadd(builder.fmul(b, c), builder.fmul(a, s))
        ir_.store(builder.fmul(first, factors), out, at)
        ir_.store(builder.fmul(second, factors), out, behind)
        return []

    ir_.loop(chunks, [], chunk)


@tile
def copy_row(ir_: Emitter, x: Value, chunks: Value, out: Value) -> None:
    def chunk(index: Value, _: list[Value]) -> list[Value]:
        ir_.store(ir_.load(_KIND, x, ir_.scaled(index, 64)), out, ir_.scaled(index, 64))
        return []

    ir_.loop(chunks, [], chunk)


@tile
def quantize_group(ir_: Emitter, x: Value, values: Value, pair: Value) -> None:
    """64 floats at x to int8 at `values`, and (float32 scale, int32 -128 * sum) at `pair`."""
    builder = ir_.builder
    parts = [ir_.load(_KIND, x, 64 * i) for i in range(4)]
    peaks = [ir_.call("llvm.fabs.v16f32", _KIND, [part]) for part in parts]
    largest = ir_.fold(ir_.maximum, peaks)
    # A group that is (nearly) zero counts as zero: its reciprocal would overflow.
    inverse = builder.select(
        builder.fcmp_ordered(">", largest, ir.Constant(F32, 1e-30)),
        builder.fdiv(ir.Constant(F32, 127.0), largest),
        ir.Constant(F32, 0.0),
    )
    factor = ir_.splat(inverse, LANES)
    whole = []
    for i, part in enumerate(parts):
        rounded = ir_.call("llvm.rint.v16f32", _KIND, [builder.fmul(part, factor)])
        whole.append(builder.fptosi(rounded, vector(I32, LANES)))
        ir_.store(builder.trunc(whole[-1], vector(I8, LANES)), values, LANES * i)
    total = ir_.fold(builder.add, whole)
    ir_.store(builder.fmul(largest, ir.Constant(F32, ONE_127TH)), pair)
    ir_.store(builder.mul(total, ir.Constant(I32, -128)), pair, 4)
