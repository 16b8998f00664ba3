"""How large the KV pool may be: the rule that the engine and the planner share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.checkpoint.config import ModelConfig
from ziphius.errors import DoesNotFit
from ziphius.planner.memory import GIB
from ziphius.planner.pool import PoolLimits, kv_pool_tokens, pool_room

CPU = PoolLimits(
    device="cpu", dtype="float32", context_length=8192, max_running_requests=4, page_size=16, free_bytes=100 * GIB
)
CUDA = replace(CPU, device="cuda", dtype="bfloat16", free_bytes=20 * GIB, free_before_bytes=130 * GIB,
               reserve_bytes=2 * GIB)  # fmt: skip


def test_a_cpu_pool_holds_every_request(llama3_8b: ModelConfig) -> None:
    size = kv_pool_tokens(llama3_8b, 1, CPU)
    assert (size.tokens, size.limited_by) == (4 * 8192, "requests")
    assert size.bytes_per_token == 262_144
    assert size.nbytes == 4 * 8192 * 262_144
    assert size.pages(16) == 4 * 512


def test_a_cpu_pool_takes_a_quarter_of_what_is_left(llama3_8b: ModelConfig) -> None:
    size = kv_pool_tokens(llama3_8b, 1, replace(CPU, free_bytes=20 * GIB))
    assert size.limited_by == "memory"
    assert size.tokens == 5 * GIB // 262_144


def test_a_cpu_pool_takes_the_share_that_is_asked_for(llama3_8b: ModelConfig) -> None:
    size = kv_pool_tokens(llama3_8b, 1, replace(CPU, free_bytes=10 * GIB, mem_fraction=0.5))
    assert size.tokens == 5 * GIB // 262_144


def test_one_context_is_worth_more_than_the_share(llama3_8b: ModelConfig) -> None:
    # 8192 tokens are 2 GiB: more than a quarter of 4 GiB, less than 90%.
    size = kv_pool_tokens(llama3_8b, 1, replace(CPU, free_bytes=4 * GIB))
    assert size.tokens == 8192


def test_ranks_share_main_memory(llama3_8b: ModelConfig) -> None:
    size = kv_pool_tokens(llama3_8b, 2, replace(CPU, free_bytes=20 * GIB, ranks_on_host=2))
    assert size.bytes_per_token == 131_072
    assert size.tokens == 5 * GIB // 2 // 131_072


def test_no_room_for_one_context_tells_the_numbers_and_what_to_do(llama3_8b: ModelConfig) -> None:
    with pytest.raises(DoesNotFit) as raised:
        kv_pool_tokens(llama3_8b, 1, replace(CPU, free_bytes=2 * GIB))
    message = raised.value.message
    assert "8192 tokens needs 2.00 GiB" in message
    assert "1.80 GiB are there" in message
    fits = int(message.split("--context-length ")[1].split()[0])
    assert kv_pool_tokens(llama3_8b, 1, replace(CPU, free_bytes=2 * GIB, context_length=fits)).tokens == fits


def test_a_gpu_pool_takes_all_but_the_reserve(llama3_8b: ModelConfig) -> None:
    size = kv_pool_tokens(llama3_8b, 1, CUDA)
    assert size.tokens == 18 * GIB // 131_072
    assert size.limited_by == "memory"


def test_a_fraction_counts_weights_and_cache(llama3_8b: ModelConfig) -> None:
    # 10% of 130 GiB stay free: 20 - 13 = 7 GiB.
    size = kv_pool_tokens(llama3_8b, 1, replace(CUDA, mem_fraction=0.9))
    assert abs(size.tokens - 7 * GIB // 131_072) <= 16


def test_max_total_tokens_is_taken_or_refused(llama3_8b: ModelConfig) -> None:
    size = kv_pool_tokens(llama3_8b, 1, replace(CUDA, max_total_tokens=1000))
    assert (size.tokens, size.limited_by) == (992, "option")
    with pytest.raises(DoesNotFit, match="lower --max-total-tokens to 147456"):
        kv_pool_tokens(llama3_8b, 1, replace(CUDA, max_total_tokens=200_000))
    with pytest.raises(DoesNotFit, match="less than one page"):
        kv_pool_tokens(llama3_8b, 1, replace(CUDA, max_total_tokens=15))


@given(
    device=st.sampled_from(["cpu", "cuda"]),
    free=st.integers(0, 40 * GIB),
    context=st.integers(1, 100_000),
    rows=st.integers(1, 64),
    page=st.sampled_from([1, 16, 64]),
    fraction=st.none() | st.floats(0.01, 0.99),
)
def test_a_pool_is_whole_pages_within_its_room(
    device: str, free: int, context: int, rows: int, page: int, fraction: float | None
) -> None:
    config = ModelConfig.from_hf(
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 64, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}
    )  # fmt: skip
    limits = replace(CUDA if device == "cuda" else CPU, free_bytes=free, context_length=context, page_size=page,
                     max_running_requests=rows, mem_fraction=fraction)  # fmt: skip
    try:
        size = kv_pool_tokens(config, 1, limits)
    except DoesNotFit:
        assert pool_room(limits) < -(-context // page) * page * 1024
        return
    assert size.tokens % page == 0
    assert size.tokens >= context
    assert size.nbytes <= pool_room(limits)
