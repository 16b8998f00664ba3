"""Which tensor-parallel sizes a model allows, dimension by dimension, with the remainders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ziphius.checkpoint.config import ModelConfig
from ziphius.errors import ConfigError
from ziphius.formats import FORMATS, Use, WeightsFormat, format_of_dtype

Engine = Literal["native", "sglang"]
SGLANG_VOCAB_PADDING = 64
"""SGLang pads the vocabulary to a multiple of this before the ranks share it."""
LARGEST_TP = 128


def require_deterministic(device: str, dtype: str, weights_format: WeightsFormat) -> None:
    """ConfigError where --deterministic cannot be kept: how other products split their sums depends on the batch."""
    if device != "cuda":
        raise ConfigError("deterministic is for a GPU, and this would run on a CPU", param="deterministic")
    if weights_format != format_of_dtype(dtype):
        raise ConfigError(
            f"deterministic needs weights in the dtype: weights_format {weights_format} beside dtype {dtype} is "
            f"multiplied in another way; leave weights_format at {format_of_dtype(dtype)}",
            param="deterministic",
        )


@dataclass(frozen=True, slots=True)
class TpFailure:
    """One dimension that a tensor-parallel size does not divide, or whose share breaks a quantization block."""

    dimension: str
    """Its name in config.json; several joined with ` x ` for a product."""
    size: int
    divisor: int
    """tp, or the side of a block where the share of a rank must be whole blocks."""
    remainder: int
    message: str


def tp_failures(config: ModelConfig, tp: int, weights_format: WeightsFormat, engine: Engine) -> tuple[TpFailure, ...]:
    """Why `tp` ranks cannot share this model; () when they can.

    Every rank takes an equal share of the vocabulary, the attention heads and each MLP's width (expert,
    shared, dense). The ranks share a Llama's key/value heads; with more ranks than heads, heads are replicated.
    With blocks (fp8) or groups (int4 experts) and tp > 1 every share must be a whole number of them.
    """
    if tp == 1:
        return ()
    failures = list(_undivided(config, tp, engine))
    if not failures and FORMATS[weights_format].block != (1, 1) and engine == "native":
        failures = list(_broken_blocks(config, tp, weights_format))
    return tuple(failures)


def block_failures(config: ModelConfig, tp: int) -> tuple[TpFailure, ...]:
    """Shares that cut fp8's blocks: for checkpoints that are quantized already, on any engine."""
    return tuple(_broken_blocks(config, tp, "fp8")) if tp > 1 else ()


def valid_tp_sizes(config: ModelConfig, weights_format: WeightsFormat, engine: Engine) -> tuple[int, ...]:
    """Every size from 1 to 128 that divides the model."""
    return tuple(tp for tp in range(1, LARGEST_TP + 1) if not tp_failures(config, tp, weights_format, engine))


def require_tp(config: ModelConfig, tp: int, weights_format: WeightsFormat, engine: Engine = "native") -> None:
    """ConfigError that names every dimension which `tp` ranks do not divide, and the nearest sizes that do."""
    failures = tp_failures(config, tp, weights_format, engine)
    if not failures:
        return
    sizes = valid_tp_sizes(config, weights_format, engine)
    near = [max((s for s in sizes if s < tp), default=None), min((s for s in sizes if s > tp), default=None)]
    nearest = " and ".join(str(size) for size in near if size is not None)
    raise ConfigError(
        f"{tp} ranks (--tp) cannot share this model: {'; '.join(f.message for f in failures)}. "
        f"Nearest sizes that can: {nearest} (all: {', '.join(map(str, sizes))})",
        param="tp",
    )


def require_context(config: ModelConfig, asked: int | None) -> int:
    """The context length that is wanted: `asked`, else the model's. ConfigError for one beyond the model's."""
    longest = config.max_position_embeddings
    if asked is not None and asked > longest:
        raise ConfigError(f"context_length {asked} is beyond the {longest} of this model", param="context_length")
    return asked or longest


def _undivided(config: ModelConfig, tp: int, engine: Engine) -> Iterator[TpFailure]:
    vocab = config.vocab_size
    if engine == "sglang":
        vocab = -(-vocab // SGLANG_VOCAB_PADDING) * SGLANG_VOCAB_PADDING
    sizes = [("vocab_size", "vocabulary", vocab), ("num_attention_heads", "heads", config.num_attention_heads)]
    sizes += _widths(config)
    for dimension, label, size in sizes:
        if size % tp:
            text = f"{label} {size:,} = {tp} x {size // tp:,} + {size % tp}"
            yield TpFailure(dimension, size, tp, size % tp, text)
    kv_heads = config.num_key_value_heads
    if not config.attention.shares_cache(tp):
        text = f"key/value heads {kv_heads} and {tp} ranks: neither divides the other"
        yield TpFailure("num_key_value_heads", kv_heads, tp, kv_heads % tp, text)


def _widths(config: ModelConfig) -> list[tuple[str, str, int]]:
    """The MLP widths that ranks share: (name in config.json, name for a person, size)."""
    widths: list[tuple[str, str, int]] = []
    if config.moe is not None:
        widths.append(("moe_intermediate_size", "expert width", config.moe.moe_intermediate_size))
        if config.moe.n_shared_experts:
            name = "n_shared_experts x moe_intermediate_size"
            widths.append((name, "shared width", config.moe.shared_intermediate_size))
    if not all(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
        widths.append(("intermediate_size", "dense width", config.intermediate_size))
    return widths


def _broken_blocks(config: ModelConfig, tp: int, weights_format: WeightsFormat) -> Iterator[TpFailure]:
    sizes = [*_widths(config), *config.attention.sharded_dimensions(tp)]
    for dimension, label, size in sizes:
        use: Use = "expert" if label == "expert width" else "linear"
        stored = FORMATS[weights_format].of(use)
        if stored is None or stored.scales is None:
            continue
        share, side = size // tp, max(stored.block)
        if share % side:
            blocks = f"{share // side} x {side} + {share % side} ({stored.scales.unit})"
            text = f"{label} {size:,} / {tp} = {share:,} = {blocks}"
            yield TpFailure(dimension, size, side, share % side, text)
