"""tile(): makes a function that emits LLVM IR callable in kernels; and short names for that IR."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types

from ziphius.kernels.cpu.jit import instruction

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F32 = ir.FloatType()
VOID = ir.VoidType()

_EXP2 = [math.log(2) ** n / math.factorial(n) for n in range(8)]
"""2^f = sum of (f ln 2)^n / n!; at |f| <= 1/2 the first term left out is below 6e-9."""

LOG2_E = math.log2(math.e)

Value = Any
"""An llvmlite value."""


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def tile(emit: Callable[..., None]) -> Callable[..., None]:
    """Make emit(emitter, *values) callable in kernels as tile(*values): addresses, counts and float32 bits, all int64.

    It is IR because a tile's speed depends on which values stay in registers, and Python loops cannot control that.
    """

    count = len(inspect.signature(emit).parameters) - 1

    @instruction(types.void, *[types.intp] * count)
    def emit_into(context: Any, builder: ir.IRBuilder, *values: Value) -> None:
        emit(Emitter(builder), *values)

    return emit_into


class Emitter:
    """Emits into one function. Addresses are 64-bit integers, offsets are in bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def offset(self, address: Value, offset: Value | int) -> Value:
        if isinstance(offset, int):
            return address if offset == 0 else self.builder.add(address, i64(offset))
        return self.builder.add(address, offset)

    def scaled(self, index: Value, size: int) -> Value:
        return self.builder.mul(index, i64(size))

    def addresses(self, base: Value, stride: Value, count: int) -> list[Value]:
        """base, base + stride, base + 2 stride ..."""
        out = [base]
        for _ in range(count - 1):
            out.append(self.builder.add(out[-1], stride))
        return out

    def load(self, kind: ir.Type, address: Value, offset: Value | int = 0, align: int = 1) -> Value:
        pointer = self.builder.inttoptr(self.offset(address, offset), kind.as_pointer())
        return self.builder.load(pointer, align=align)

    def store(self, value: Value, address: Value, offset: Value | int = 0, align: int = 1) -> None:
        pointer = self.builder.inttoptr(self.offset(address, offset), value.type.as_pointer())
        self.builder.store(value, pointer, align=align)

    def float_of(self, bits: Value) -> Value:
        """The float32 whose bits are the lower half of `bits`."""
        return self.builder.bitcast(self.builder.trunc(bits, I32), F32)

    def splat(self, scalar: Value, lanes: int) -> Value:
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.shuffle(first, [0] * lanes)

    def shuffle(self, value: Value, lanes: Sequence[int]) -> Value:
        undefined = ir.Constant(value.type, ir.Undefined)
        return self.builder.shuffle_vector(value, undefined, ir.Constant(vector(I32, len(lanes)), list(lanes)))

    def call(self, name: str, result: ir.Type, arguments: Sequence[Value]) -> Value:
        """An LLVM intrinsic (or any external function) by its full name."""
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.builder.call(function, list(arguments))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])

    def fold(self, combine: Callable[[Value, Value], Value], values: Sequence[Value]) -> Value:
        """All lanes of all vectors combined to one scalar, always in the same order: halves onto each other."""
        rest = list(values)
        while len(rest) > 1:
            half = len(rest) // 2
            rest = [combine(a, b) for a, b in zip(rest[:half], rest[half:], strict=False)] + rest[2 * half :]
        value = rest[0]
        lanes = value.type.count
        while lanes > 1:
            half = lanes // 2
            value = combine(self.shuffle(value, list(range(half))), self.shuffle(value, list(range(half, lanes))))
            lanes = half
        return self.builder.extract_element(value, ir.Constant(I32, 0))

    def maximum(self, a: Value, b: Value) -> Value:
        return self.call(f"llvm.maxnum.v{a.type.count}f32", a.type, [a, b])

    def minimum(self, a: Value, b: Value) -> Value:
        return self.call(f"llvm.minnum.v{a.type.count}f32", a.type, [a, b])

    def constant(self, value: float, lanes: int = 16) -> Value:
        return ir.Constant(vector(F32, lanes), [value] * lanes)

    def exp2(self, x: Value) -> Value:
        """2^x of float lanes, x < 127, within 2 units in the last place; 0 below -126.

        x = n + f with |f| <= 1/2; 2^f by its Taylor series in f ln 2; n goes into the exponent's bits.
        """
        lanes = x.type.count
        builder = self.builder
        vanishes = builder.fcmp_ordered("<", x, self.constant(-126.0, lanes))
        x = self.maximum(x, self.constant(-126.0, lanes))
        whole = self.call(f"llvm.rint.v{lanes}f32", x.type, [x])
        f = builder.fsub(x, whole)
        power = self.constant(_EXP2[-1], lanes)
        for coefficient in reversed(_EXP2[:-1]):
            power = self.fma(power, f, self.constant(coefficient, lanes))
        exponent = builder.add(
            builder.fptosi(whole, vector(I32, lanes)), ir.Constant(vector(I32, lanes), [127] * lanes)
        )
        bits = builder.shl(exponent, ir.Constant(vector(I32, lanes), [23] * lanes))
        value = builder.fmul(power, builder.bitcast(bits, x.type))
        return builder.select(vanishes, self.constant(0.0, lanes), value)

    def prefetch(self, address: Value, offset: Value | int = 0) -> None:
        """Prefetch into the second-level cache: the next tile must not push this one out of the first-level cache."""
        pointer = self.builder.inttoptr(self.offset(address, offset), I8.as_pointer())
        arguments = [pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)]
        self.call("llvm.prefetch.p0", VOID, arguments)

    def variants(self, count: Value, maximum: int, emit: Callable[[int], None]) -> None:
        """Emit a body for each count of 1..maximum and branch to the one for `count`; beyond, to the largest."""
        builder = self.builder
        end = builder.append_basic_block("end")
        blocks = [builder.append_basic_block(f"variant{n}") for n in range(1, maximum + 1)]
        choice = builder.switch(count, blocks[-1])
        for n, block in enumerate(blocks, 1):
            if n < maximum:
                choice.add_case(i64(n), block)
            builder.position_at_end(block)
            emit(n)
            builder.branch(end)
        builder.position_at_end(end)

    def loop(
        self, count: Value, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
    ) -> list[Value]:
        """for i in range(count), count >= 1: carried = body(i, carried). Returns the last `carried`."""
        builder = self.builder
        before = builder.block
        head = builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(i64(0), before)
        phis = []
        for value in carried:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            phis.append(phi)
        results = list(body(index, list(phis)))
        following = builder.add(index, i64(1))
        index.add_incoming(following, builder.block)
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), head, after)
        builder.position_at_end(after)
        return results


def byte_vector_arguments() -> bool:
    """Whether LLVM's vpdpbusd takes its bytes as vectors of i8 (from 22 on) and not as packed i32."""
    return bool(llvm.llvm_version_info[0] >= 22)
