"""Upper bounds of speed, against the floors worked out beside the measurements."""

from __future__ import annotations

import random

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.planner.hardware import CARDS
from ziphius.planner.roofline import active_parameters, decode_bytes, expected_distinct_experts, roofline

H200 = CARDS["H200"]


@pytest.mark.parametrize(("batch", "gigabytes"), [(8, 36.5), (32, 86)])
def test_bytes_of_a_decode_step(v25: ModelConfig, batch: int, gigabytes: float) -> None:
    assert decode_bytes(v25, 4, "bf16", batch, "bfloat16", 0) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_measured_speeds_stay_below(v25: ModelConfig, v2_lite: ModelConfig) -> None:
    measured = {1: 102, 8: 509, 32: 1113, 128: 3432}
    found = roofline(v25, 4, "bf16", H200, "bfloat16")
    assert {bound.batch for bound in found.decode} == set(measured)
    for bound in found.decode:
        assert bound.tokens_per_s > measured[bound.batch]
        assert bound.step_ms == pytest.approx(1000 * bound.batch / bound.tokens_per_s)
    assert found.prefill_tokens_per_s > 30_300
    assert roofline(v2_lite, 1, "bf16", H200, "bfloat16").prefill_tokens_per_s > 68_000


def test_fewer_bits_are_faster_where_bytes_are_the_bound(v25: ModelConfig) -> None:
    speeds = [roofline(v25, 4, f, H200, "bfloat16").decode[0].tokens_per_s for f in ("bf16", "fp8", "int4")]
    assert speeds == sorted(speeds)
    # Without fp8 arithmetic the matrices are multiplied in 16 bits.
    a100 = CARDS["A100-80"]
    assert (
        roofline(v25, 4, "fp8", a100, "bfloat16").prefill_tokens_per_s
        == roofline(v25, 4, "bf16", a100, "bfloat16").prefill_tokens_per_s
    )


def test_active_parameters(v25: ModelConfig, llama3_8b: ModelConfig) -> None:
    assert active_parameters(v25) / 1e9 == pytest.approx(20.9, abs=0.1)
    assert active_parameters(llama3_8b) / 1e9 == pytest.approx(8.03 - 0.525, abs=0.01)


def test_a_dense_model_has_no_experts(llama3_8b: ModelConfig) -> None:
    assert all(bound.distinct_experts == 0 for bound in roofline(llama3_8b, 1, "bf16", H200, "bfloat16").decode)


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_groups_do_not_change_the_expected_number_of_experts(batch: int) -> None:
    """Best 3 of 8 groups, then 6 of their 60 experts, as V2.5 chooses; scores drawn at random."""
    draw = random.Random(0)
    rounds = 300
    total = 0
    for _ in range(rounds):
        hit: set[int] = set()
        for _ in range(batch):
            scores = [draw.random() for _ in range(160)]
            groups = sorted(range(8), key=lambda g: -max(scores[g * 20 : g * 20 + 20]))[:3]
            allowed = [e for g in groups for e in range(g * 20, g * 20 + 20)]
            hit.update(sorted(allowed, key=lambda e: -scores[e])[:6])
        total += len(hit)
    assert total / rounds == pytest.approx(expected_distinct_experts(160, 6, batch), rel=0.02)
