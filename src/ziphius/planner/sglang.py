"""SGLang's own memory rule, with its flags, as far as a plan needs it.

Rule of `server_args._handle_gpu_memory_settings` in SGLang 0.5.16; measured beside it: docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.checkpoint.config import ModelConfig, YarnConfig
from ziphius.formats import FORMATS, WeightsFormat
from ziphius.planner.memory import kv_bytes_per_token, matrices, weight_bytes

# GPU memory below this many MiB -> (chunked prefill, graph batch, graph batch when tp >= 4).
_TIERS = (
    (20 * 1024, 2048, 8, 8),
    (35 * 1024, 2048, 24, 80),
    (60 * 1024, 4096, 32, 160),
    (90 * 1024, 8192, 256, 512),
    (160 * 1024, 8192, 256, 512),
)
_LARGEST = (16384, 512, 512)
_AT_LEAST_ABOVE_MIB = 60 * 1024
_AT_LEAST_RESERVED_MIB = 10 * 1024


@dataclass(frozen=True, slots=True)
class SglangDefaults:
    """What SGLang chooses by itself for GPUs of this size."""

    chunked_prefill_size: int
    cuda_graph_max_bs: int
    reserved_mib: float
    mem_fraction_static: float


def defaults(memory_total_mib: int, tp: int, *, chunked_prefill_size: int | None = None) -> SglangDefaults:
    """For a smallest GPU of `memory_total_mib` (nvidia-smi's number), with pipeline size 1 and without dp attention."""
    chunk, few_ranks, many_ranks = _LARGEST
    for limit, tier_chunk, tier_few, tier_many in _TIERS:
        if memory_total_mib < limit:
            chunk, few_ranks, many_ranks = tier_chunk, tier_few, tier_many
            break
    chunk = chunked_prefill_size or chunk
    graph_batch = many_ranks if tp >= 4 else few_ranks
    reserved = 512 + 1.5 * max(chunk, 2048) + 2 * graph_batch + 1024 * tp / 8
    if memory_total_mib > _AT_LEAST_ABOVE_MIB:
        reserved = max(reserved, _AT_LEAST_RESERVED_MIB)
    fraction = round((memory_total_mib - reserved) / memory_total_mib, 3)
    return SglangDefaults(chunk, graph_batch, reserved, fraction)


def loaded_bytes(config: ModelConfig, tp: int, weights_format: WeightsFormat) -> int:
    """What SGLang holds on one rank after loading: the weights, and what it derives from them.

    For MLA it keeps kv_b twice: the projection for prefill, and contiguous halves for absorbed decode; and
    one table of rotary cosines and sines in float32.
    """
    weights = weight_bytes(config, tp, weights_format)
    kv_b = sum(m.parameters for m in matrices(config, tp) if m.kind == "latent_up")
    stored = FORMATS[weights_format].of("latent_up")
    extra = kv_b * (2 if stored is None else stored.bits // 8)
    return weights.total + extra + rotary_table_bytes(config)


def rotary_table_bytes(config: ModelConfig) -> int:
    positions = config.max_position_embeddings
    if isinstance(config.rope_scaling, YarnConfig):
        scaling = config.rope_scaling
        positions = int(scaling.original_max_position_embeddings * scaling.factor)
    return positions * config.attention.rotary_dim * 4


def kv_tokens(config: ModelConfig, tp: int, dtype: str, *, free_before: int, loaded: int, fraction: float) -> int:
    """Tokens that SGLang's pool gets: (free after - free before x (1 - fraction)) / bytes a token; 0 when negative.

    `free_before`: bytes free on the GPU once CUDA and NCCL are up, before loading.
    """
    room = free_before - loaded - free_before * (1 - fraction)
    return max(0, int(room // kv_bytes_per_token(config, tp, dtype)))


def smallest_fraction(config: ModelConfig, tp: int, dtype: str, *, free_before: int, loaded: int, tokens: int) -> float:
    """The least `--mem-fraction-static` that gives a pool of `tokens`, rounded up to a hundredth (above 1: none)."""
    needed = (loaded + tokens * kv_bytes_per_token(config, tp, dtype)) / free_before
    return -(-int(needed * 10_000) // 100) / 100


def reserved_bytes(free_before: int, fraction: float) -> int:
    """What a fraction leaves to activations and CUDA graphs."""
    return int(free_before * (1 - fraction))
