"""Predicted against measured: the lines for the log, and when they warn."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ziphius.planner.measured import compare


@dataclass
class Rank:
    weight_bytes: int
    kv_tokens: int
    predicted_weight_bytes: int = 100 << 30
    predicted_kv_tokens: int = 100_000


def test_more_than_three_percent_off_is_said() -> None:
    (weights, weights_off), (cache, cache_off) = compare(Rank(102 << 30, 96_000))
    assert weights == "weights: predicted 100.00 GiB, measured 102.00 GiB (+2.0%)"
    assert not weights_off
    assert cache == "KV cache: predicted 100,000, measured 96,000 tokens (-4.0%, more than 3% off)"
    assert cache_off


@pytest.mark.parametrize(("tokens", "off"), [(103_000, False), (97_000, False), (103_100, True), (96_900, True)])
def test_three_percent_either_way(tokens: int, off: bool) -> None:
    assert compare(Rank(100 << 30, tokens))[1][1] is off
