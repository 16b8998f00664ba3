"""The lines for the log that compare predicted with measured memory, once a rank has loaded."""

from __future__ import annotations

from typing import Protocol

from ziphius.planner.memory import gib

TOLERANCE = 0.03
"""A measured value that is further than this from the predicted one is logged as a warning."""


class Loaded(Protocol):
    """The numbers of one rank, as `messages.Ready` has them."""

    weight_bytes: int
    kv_tokens: int
    predicted_weight_bytes: int
    predicted_kv_tokens: int


def gap_of(predicted: int, measured: int) -> float:
    """How far off a prediction was, as a share of it; 0 where nothing was predicted."""
    return (measured - predicted) / predicted if predicted else 0.0


def compare(loaded: Loaded) -> tuple[tuple[str, bool], ...]:
    """(a line for the log, whether it is further off than TOLERANCE) for weights and for KV tokens."""
    weights = gap_of(loaded.predicted_weight_bytes, loaded.weight_bytes)
    tokens = gap_of(loaded.predicted_kv_tokens, loaded.kv_tokens)
    return (
        _line("weights", gib(loaded.predicted_weight_bytes), gib(loaded.weight_bytes), weights),
        _line("KV cache", f"{loaded.predicted_kv_tokens:,}", f"{loaded.kv_tokens:,} tokens", tokens),
    )


def _line(what: str, predicted: str, measured: str, gap: float) -> tuple[str, bool]:
    off = abs(gap) > TOLERANCE
    more = f", more than {TOLERANCE:.0%} off" if off else ""
    return f"{what}: predicted {predicted}, measured {measured} ({gap:+.1%}{more})", off
