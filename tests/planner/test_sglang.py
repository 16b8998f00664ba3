"""SGLang's own rule, against what it documents and what was measured on an H200."""

from __future__ import annotations

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.planner import sglang
from ziphius.planner.hardware import CARDS
from ziphius.planner.memory import CUDA_CONTEXT, GIB, MIB

H200 = CARDS["H200"]
FREE_BEFORE = H200.usable_mib * MIB - CUDA_CONTEXT


@pytest.mark.parametrize(("tp", "fraction"), [(4, 0.900), (8, 0.897)])
def test_default_fraction_on_an_h200(tp: int, fraction: float) -> None:
    assert sglang.defaults(143_771, tp).mem_fraction_static == fraction


@pytest.mark.parametrize(
    ("memory_mib", "tp", "chunk", "graph"),
    [
        (16_000, 4, 2048, 8),
        (24_564, 1, 2048, 24),
        (24_564, 4, 2048, 80),
        (46_068, 2, 4096, 32),
        (46_068, 8, 4096, 160),
        (81_559, 1, 8192, 256),
        (81_559, 4, 8192, 512),
        (143_771, 2, 8192, 256),
        (183_359, 1, 16_384, 512),
    ],
)
def test_tiers(memory_mib: int, tp: int, chunk: int, graph: int) -> None:
    found = sglang.defaults(memory_mib, tp)
    assert (found.chunked_prefill_size, found.cuda_graph_max_bs) == (chunk, graph)
    assert found.reserved_mib >= (10 * 1024 if memory_mib > 60 * 1024 else 0)


def test_one_rank_of_four_as_measured(v25_rank: ModelConfig) -> None:
    loaded = sglang.loaded_bytes(v25_rank, 1, "bf16")
    # SGLang prints GiB and calls them GB: 111.47 after load.
    assert loaded / GIB == pytest.approx(111.47, rel=0.02)
    tokens = sglang.kv_tokens(v25_rank, 1, "bfloat16", free_before=FREE_BEFORE, loaded=loaded, fraction=0.93)
    assert tokens == pytest.approx(278_067, rel=0.02)
    assert tokens * 69_120 / GIB == pytest.approx(17.90, rel=0.02)


def test_the_four_rank_model_gives_what_its_rank_gives(v25: ModelConfig, v25_rank: ModelConfig) -> None:
    assert sglang.loaded_bytes(v25, 4, "bf16") == sglang.loaded_bytes(v25_rank, 1, "bf16")


def test_the_fraction_that_tokens_need(v25_rank: ModelConfig) -> None:
    loaded = sglang.loaded_bytes(v25_rank, 1, "bf16")
    needed = sglang.smallest_fraction(v25_rank, 1, "bfloat16", free_before=FREE_BEFORE, loaded=loaded, tokens=278_067)
    assert needed == 0.93


def test_weights_that_fill_the_gpu_leave_no_tokens(v25_rank: ModelConfig) -> None:
    assert sglang.kv_tokens(v25_rank, 1, "bfloat16", free_before=GIB, loaded=2 * GIB, fraction=0.9) == 0
