"""Tiles of attention in float32: the sums that are kept in registers. The caller decides which keys a tile sees.

Every argument is an address or a count. Queries come scaled with softmax_scale * log2(e), so that all exponentials
are powers of two. attention.py describes the cache's layout in memory.

A query is compared with its keys in blocks of 64. A block gives its largest score, the sum of 2^(score - largest) and
the weighted sum of the values; blocks are joined in order. A decode row and a row of a prefill tile do exactly the
same operations in the same order, so a token's result is the same whichever way it is computed.
"""

from __future__ import annotations

from llvmlite import ir

from ziphius.kernels.cpu.target import TARGET
from ziphius.kernels.cpu.vector_ir import F32, I32, I64, Emitter, Value, i64, tile, vector

LANES = 16
BLOCK = 64
"""Keys that are attended together."""
KEY_GROUP = 16
"""How many keys are stored together in the cache, with each dimension's values side by side."""
MASKED = -1e30
"""The score of a key that must not be seen; finite, so that the difference of two such scores is a number."""
KEY_TILE = 8 if TARGET.float_vectors >= 24 else 4
"""Keys (then values' dimensions) of a prefill tile."""
MAX_TILE_HEADS = max(1, TARGET.float_vectors // 8)
"""Query heads of a prefill tile, 16 tokens each."""

_KIND = vector(F32, LANES)
_ZERO = ir.Constant(_KIND, None)


@tile
def decode_scores(
    ir_: Emitter, q: Value, keys: Value, groups: Value, size: Value, ahead: Value, offsets: Value, out: Value
) -> None:
    """out[64] = q [size] . keys. groups: int64 [4], where each 16 keys lie from `keys` on, as [size][16].

    Meanwhile it fetches 128 bytes at `ahead` plus each of the int64 [64] `offsets`.
    """
    rows = [ir_.builder.add(keys, ir_.load(I64, groups, 8 * i)) for i in range(BLOCK // KEY_GROUP)]

    def dimension(index: Value, sums: list[Value]) -> list[Value]:
        key = ir_.builder.and_(index, i64(BLOCK - 1))
        target = ir_.builder.add(ahead, ir_.load(I64, offsets, ir_.scaled(key, 8)))
        ir_.prefetch(target)
        ir_.prefetch(target, 64)
        part = ir_.splat(ir_.load(F32, q, ir_.scaled(index, 4)), LANES)
        at = ir_.scaled(index, 4 * KEY_GROUP)
        return [ir_.fma(part, ir_.load(_KIND, row, at), total) for row, total in zip(rows, sums, strict=True)]

    for i, total in enumerate(ir_.loop(size, [_ZERO] * len(rows), dimension)):
        ir_.store(total, out, 64 * i)


@tile
def decode_weights(ir_: Emitter, scores: Value, count: Value, largest: Value) -> None:
    """scores[64] = 2^(score - largest), those from `count` on 0; `largest` gets the largest score."""
    builder = ir_.builder
    parts = []
    limit = ir_.splat(builder.trunc(count, I32), LANES)
    for start in range(0, BLOCK, LANES):
        index = ir.Constant(vector(I32, LANES), list(range(start, start + LANES)))
        seen = builder.icmp_signed("<", index, limit)
        parts.append(builder.select(seen, ir_.load(_KIND, scores, 4 * start), ir_.constant(MASKED)))
    peak = ir_.fold(ir_.maximum, parts)
    for i, part in enumerate(parts):
        ir_.store(ir_.exp2(builder.fsub(part, ir_.splat(peak, LANES))), scores, 64 * i)
    ir_.store(peak, largest)


@tile
def decode_values(
    ir_: Emitter, chunks: Value, weights: Value, values: Value, offsets: Value, count: Value, total: Value, out: Value
) -> None:
    """out[16 * chunks] = sum over `count` keys of weights[key] * values[key]; `total`: the sum of the weights.

    offsets: int64 [count], where each key's values lie from `values` on. 1 <= chunks <= 4.
    """
    builder = ir_.builder

    def emit(width: int) -> None:
        def key(index: Value, sums: list[Value]) -> list[Value]:
            row = builder.add(values, ir_.load(I64, offsets, ir_.scaled(index, 8)))
            weight = ir_.load(F32, weights, ir_.scaled(index, 4))
            factor = ir_.splat(weight, LANES)
            added = [ir_.fma(ir_.load(_KIND, row, 64 * i), factor, part) for i, part in enumerate(sums[1:])]
            return [builder.fadd(sums[0], weight), *added]

        sums = ir_.loop(count, [ir.Constant(F32, 0.0)] + [_ZERO] * width, key)
        ir_.store(sums[0], total)
        for i, part in enumerate(sums[1:]):
            ir_.store(part, out, 64 * i)

    ir_.variants(chunks, 4, emit)


@tile
def join_decode(ir_: Emitter, parts: Value, stride: Value, count: Value, chunks: Value, out: Value) -> None:
    """out[16 * chunks] from `count` blocks, each (largest, sum) at `parts` and values 64 bytes later."""
    builder = ir_.builder

    def clear(index: Value, _: list[Value]) -> list[Value]:
        ir_.store(_ZERO, out, ir_.scaled(index, 64))
        return []

    def block(index: Value, state: list[Value]) -> list[Value]:
        part = builder.add(parts, builder.mul(index, stride))
        peak, total = (ir_.splat(ir_.load(F32, part, at), LANES) for at in (0, 4))
        largest, before, now = _join(ir_, state[0], peak)

        def chunk(number: Value, _: list[Value]) -> list[Value]:
            at = ir_.scaled(number, 64)
            value = ir_.load(_KIND, part, builder.add(at, i64(64)))
            ir_.store(ir_.fma(value, now, builder.fmul(ir_.load(_KIND, out, at), before)), out, at)
            return []

        ir_.loop(chunks, [], chunk)
        return [largest, ir_.fma(total, now, builder.fmul(state[1], before))]

    ir_.loop(chunks, [], clear)
    inverse = builder.fdiv(ir_.constant(1.0), ir_.loop(count, [ir_.constant(MASKED), _ZERO], block)[1])

    def divide(index: Value, _: list[Value]) -> list[Value]:
        at = ir_.scaled(index, 64)
        ir_.store(builder.fmul(ir_.load(_KIND, out, at), inverse), out, at)
        return []

    ir_.loop(chunks, [], divide)


def _join(ir_: Emitter, largest: Value, peak: Value) -> tuple[Value, Value, Value]:
    """(the larger one, the factor of what was summed before, the factor of the new block)."""
    larger = ir_.maximum(largest, peak)
    return larger, ir_.exp2(ir_.builder.fsub(largest, larger)), ir_.exp2(ir_.builder.fsub(peak, larger))


@tile
def prefill_scores(ir_: Emitter, heads: Value, q: Value, keys: Value, size: Value, out: Value) -> None:
    """out[KEY_TILE][heads][16 tokens] = keys . q. q [size][heads][16 tokens]; keys [size][16], the first of them.

    1 <= heads <= MAX_TILE_HEADS.
    """

    def emit(width: int) -> None:
        def dimension(index: Value, sums: list[Value]) -> list[Value]:
            at, row = ir_.scaled(index, 64 * width), ir_.offset(keys, ir_.scaled(index, 4 * KEY_GROUP))
            columns = [ir_.load(_KIND, q, ir_.offset(at, 64 * j)) for j in range(width)]
            values = [ir_.splat(ir_.load(F32, row, 4 * i), LANES) for i in range(KEY_TILE)]
            return [ir_.fma(columns[i % width], values[i // width], total) for i, total in enumerate(sums)]

        for i, total in enumerate(ir_.loop(size, [_ZERO] * (KEY_TILE * width), dimension)):
            ir_.store(total, out, 64 * i)

    ir_.variants(heads, MAX_TILE_HEADS, emit)


@tile
def prefill_weights(
    ir_: Emitter, heads: Value, scores: Value, first_key: Value, positions: Value, state: Value
) -> None:
    """scores[64][heads][16] = 2^(score - the block's largest), 0 for keys after a token's position (int32 [16]).

    state, each [heads][16]: the largest and the sum so far, which are brought up to date, and the factors for the
    values so far and for this block's. 1 <= heads <= MAX_TILE_HEADS.
    """
    first = ir_.splat(ir_.builder.trunc(first_key, I32), LANES)
    last_seen = ir_.builder.sub(ir_.load(vector(I32, LANES), positions), first)
    ir_.variants(heads, MAX_TILE_HEADS, lambda width: _prefill_weights(ir_, width, scores, last_seen, state))


def _prefill_weights(ir_: Emitter, width: int, scores: Value, last_seen: Value, state: Value) -> None:
    builder = ir_.builder

    def at(index: Value, head: int) -> Value:
        return ir_.offset(ir_.scaled(index, 64 * width), 64 * head)

    def score(index: Value, head: int) -> Value:
        hidden = builder.icmp_signed("<", last_seen, ir_.splat(builder.trunc(index, I32), LANES))
        return builder.select(hidden, ir_.constant(MASKED), ir_.load(_KIND, scores, at(index, head)))

    def widen(index: Value, best: list[Value]) -> list[Value]:
        return [ir_.maximum(b, score(index, h)) for h, b in enumerate(best)]

    peaks = ir_.loop(i64(BLOCK), [ir_.constant(MASKED)] * width, widen)

    def key(index: Value, sums: list[Value]) -> list[Value]:
        weights = [ir_.exp2(builder.fsub(score(index, h), peak)) for h, peak in enumerate(peaks)]
        for h, weight in enumerate(weights):
            ir_.store(weight, scores, at(index, h))
        return [builder.fadd(total, weight) for total, weight in zip(sums, weights, strict=True)]

    sums = ir_.loop(i64(BLOCK), [_ZERO] * width, key)
    for h in range(width):
        largest, before, now = _join(ir_, ir_.load(_KIND, state, 64 * h), peaks[h])
        total = builder.fmul(ir_.load(_KIND, state, 64 * (width + h)), before)
        for i, value in enumerate((largest, ir_.fma(sums[h], now, total), before, now)):
            ir_.store(value, state, 64 * (i * width + h))


@tile
def prefill_values(
    ir_: Emitter, heads: Value, weights: Value, values: Value, offsets: Value, count: Value, factors: Value, out: Value
) -> None:
    """out[KEY_TILE dimensions][heads][16] = out * factors[0] + factors[1] * sum over `count` keys of
    values[key][dimension] * weights[key][heads][16]; factors [2][heads][16]. 1 <= heads <= MAX_TILE_HEADS.
    """
    builder = ir_.builder

    def emit(width: int) -> None:
        def key(index: Value, sums: list[Value]) -> list[Value]:
            row = builder.add(values, ir_.load(I64, offsets, ir_.scaled(index, 8)))
            at = ir_.scaled(index, 64 * width)
            columns = [ir_.load(_KIND, weights, ir_.offset(at, 64 * j)) for j in range(width)]
            parts = [ir_.splat(ir_.load(F32, row, 4 * d), LANES) for d in range(KEY_TILE)]
            return [ir_.fma(parts[i // width], columns[i % width], total) for i, total in enumerate(sums)]

        for i, total in enumerate(ir_.loop(count, [_ZERO] * (KEY_TILE * width), key)):
            before, now = (ir_.load(_KIND, factors, 64 * (j * width + i % width)) for j in range(2))
            old = builder.fmul(ir_.load(_KIND, out, 64 * i), before)
            ir_.store(ir_.fma(total, now, old), out, 64 * i)

    ir_.variants(heads, MAX_TILE_HEADS, emit)
