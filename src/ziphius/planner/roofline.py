"""Upper bounds of speed, from the bytes that a step reads and the operations that it needs.

Every number is what the data sheet's bandwidth and arithmetic would allow if nothing else cost time: kernels and
communication do not appear here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.checkpoint.config import ModelConfig
from ziphius.formats import FORMATS, WeightsFormat
from ziphius.planner.hardware import Card
from ziphius.planner.memory import kv_bytes_per_token, matrices, matrix_bytes

BATCHES = (1, 8, 32, 128)
CONTEXT_TOKENS = 1024
"""Tokens in the cache of each request for which decode is estimated."""


@dataclass(frozen=True, slots=True)
class DecodeBound:
    """At most `tokens_per_s` over the whole batch, where each request has CONTEXT_TOKENS in its cache."""

    batch: int
    tokens_per_s: float
    step_ms: float
    bytes_touched: int
    """On one rank in one step: weights, and cache read."""
    distinct_experts: float
    """Expected in each layer; 0 for a dense model."""


@dataclass(frozen=True, slots=True)
class Roofline:
    decode: tuple[DecodeBound, ...]
    prefill_tokens_per_s: float


def expected_distinct_experts(experts: int, per_token: int, batch: int) -> float:
    """How many of `experts` a batch touches: E x (1 - (1 - k/E)^b), every expert being equally likely.

    Groups (`group_limited_greedy`) do not change it: a token still takes each expert with probability k/E, and the
    expectation does not depend on how the choices of one token are related. Uneven routing touches fewer experts
    (for a fixed sum of p, the sum of 1 - (1 - p)^b is largest for equal p), so this never counts too few bytes.
    """
    return experts * (1.0 - (1.0 - per_token / experts) ** batch)


def roofline(config: ModelConfig, tp: int, weights_format: WeightsFormat, card: Card, kv_dtype: str) -> Roofline:
    """Bounds for `tp` ranks on equal cards. Communication between ranks and launches of kernels cost nothing here."""
    decode = tuple(_decode(config, tp, weights_format, card, kv_dtype, batch) for batch in BATCHES)
    flops = prefill_flops_per_token(config, tp)
    return Roofline(decode, peak_flops(card, weights_format) / flops)


def peak_flops(card: Card, weights_format: WeightsFormat) -> float:
    """Of matrix products in this format: fp8 where the card has it, 16 bits otherwise (int4 is unpacked)."""
    fp8 = card.fp8_tflops if weights_format == "fp8" else None
    return (fp8 or card.bf16_tflops) * 1e12


def prefill_flops_per_token(config: ModelConfig, tp: int) -> int:
    """Multiplications and additions of one prompt token on one rank, attention scores and head left out."""
    active = 0
    for matrix in matrices(config, tp):
        if matrix.part in ("embedding", "head", "norms"):
            continue
        share = 1.0
        if matrix.part == "routed_experts" and config.moe is not None:
            share = config.moe.num_experts_per_tok / config.moe.n_routed_experts
        active += int(matrix.parameters * share)
    return 2 * active


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token uses: without the routed experts that it does not take and the other embedding rows."""
    head = config.vocab_size * config.hidden_size
    return prefill_flops_per_token(config, 1) // 2 + head


def decode_bytes(
    config: ModelConfig, tp: int, weights_format: WeightsFormat, batch: int, kv_dtype: str, context: int
) -> int:
    """Bytes that one rank reads in one decode step: each weight once, and the cache.

    Of the routed experts only those count that some token takes, of the embedding only the batch's rows.
    """
    float_bytes = FORMATS[weights_format].usual_float_bytes
    total = batch * config.hidden_size * float_bytes
    for matrix in matrices(config, tp):
        if matrix.part == "embedding":
            continue
        size = matrix_bytes(matrix, weights_format, float_bytes)
        if matrix.kind == "tied_head" and size == 0:
            size = matrix.out_features * matrix.in_features * float_bytes
        if matrix.part == "routed_experts" and config.moe is not None:
            moe = config.moe
            hit = expected_distinct_experts(moe.n_routed_experts, moe.num_experts_per_tok, batch)
            size = int(size * hit / moe.n_routed_experts)
        total += size
    return total + batch * context * kv_bytes_per_token(config, tp, kv_dtype)


def _decode(
    config: ModelConfig, tp: int, weights_format: WeightsFormat, card: Card, kv_dtype: str, batch: int
) -> DecodeBound:
    touched = decode_bytes(config, tp, weights_format, batch, kv_dtype, CONTEXT_TOKENS)
    reading = touched / (card.bandwidth_gb_s * 1e9)
    computing = batch * prefill_flops_per_token(config, tp) / peak_flops(card, weights_format)
    step = max(reading, computing)
    hit = 0.0
    if config.moe is not None:
        hit = expected_distinct_experts(config.moe.n_routed_experts, config.moe.num_experts_per_tok, batch)
    return DecodeBound(batch, batch / step, step * 1e3, touched, hit)
