"""Two and four ranks against one: the same tokens, logits within float32 noise; real processes, a real group."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from ranked import Run, run_all

SHAPES = {"llama": tiny_models.LLAMA, "qwen2": tiny_models.QWEN2, "qwen3": tiny_models.QWEN3,
          "v2-lite": tiny_models.V2_LITE, "v2": tiny_models.V2}  # fmt: skip
SIZES = (1, 2, 4)
LONG = [(7 * i) % 120 + 3 for i in range(40)]
GREEDY = {"temperature": 0.0}
REQUESTS: list[dict[str, Any]] = [
    {"rid": "greedy", "ids": [5, 6, 7], "sampling": {**GREEDY, "logprobs": True, "top_logprobs": 3}},
    {"rid": "long", "ids": LONG, "sampling": {**GREEDY, "max_new_tokens": 20}},
    {"rid": "warm", "ids": [9, 8], "sampling": {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_new_tokens": 24}},
    {"rid": "hot", "ids": LONG[:9], "sampling": {"temperature": 1.3, "top_k": 20, "seed": 12, "max_new_tokens": 24}},
    {"rid": "penalized", "ids": [4, 4, 4, 5], "sampling": {**GREEDY, "repetition_penalty": 1.3,
                                                           "frequency_penalty": 0.5, "logit_bias": {"9": 2.0}}},
    {"rid": "scored", "ids": LONG[:14], "sampling": {**GREEDY, "logprobs": True, "prompt_logprobs_from": 0}},
    {"rid": "again", "ids": [*LONG, 3, 4], "sampling": GREEDY, "after": "long"},
    {"rid": "one", "ids": [3], "sampling": {**GREEDY, "max_new_tokens": 1}, "after": "long"},
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Run]:
    """Every shape on every size: one process that forks the ranks, because importing torch is what takes long."""
    return run_all(tmp_path_factory.mktemp("tp"), SHAPES, SIZES, REQUESTS)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_tokens(runs: dict[tuple[str, int], Run], shape: str, tp: int) -> None:
    one, many = runs[shape, 1].answers, runs[shape, tp].answers
    assert {rid: a["ids"] for rid, a in many.items()} == {rid: a["ids"] for rid, a in one.items()}
    assert {a["finish"] for a in many.values()} == {"length"}
    assert many["again"]["cached"] > 0
    for rid in ("greedy", "scored"):
        for kind in ("logprobs", "prompt_logprobs"):
            assert many[rid][kind] == pytest.approx(one[rid][kind], abs=1e-4), (rid, kind)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_within_float32_noise(runs: dict[tuple[str, int], Run], shape: str, tp: int) -> None:
    one, many = runs[shape, 1].logits[0], runs[shape, tp].logits
    for rank in many[1:]:
        # Those of the warm-up come before; rank 0 was not watched yet then.
        assert torch.equal(rank[-len(many[0]) :], many[0]), "ranks must gather the same logits"
    # Steps may be cut differently, so rows are compared as a set: each has its equal on the other side.
    distance = torch.cdist(one.double(), many[0].double())
    size = one.double().norm(dim=1).mean()
    assert distance.min(dim=1).values.max() < 2e-5 * size
    assert distance.min(dim=0).values.max() < 2e-5 * size


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_share_the_weights_as_predicted(runs: dict[tuple[str, int], Run], shape: str) -> None:
    for tp in SIZES:
        told = runs[shape, tp].told
        assert told["weight_bytes"] == told["predicted_weight_bytes"]
        assert told["kv_tokens"] == 80
    assert (
        runs[shape, 4].told["weight_bytes"] < runs[shape, 2].told["weight_bytes"] < runs[shape, 1].told["weight_bytes"]
    )
    assert runs[shape, 4].told["device"] == "cpu x 4"


def test_preemption_was_part_of_it(runs: dict[tuple[str, int], Run]) -> None:
    assert any(a["preemptions"] for a in runs["llama", 4].answers.values())
