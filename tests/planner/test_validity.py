"""Which tensor-parallel sizes divide a model: the hand-written table of 1, 2, 3, 4 and its mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ziphius.checkpoint.config import GroupedQueryAttention, ModelConfig
from ziphius.errors import ConfigError
from ziphius.planner.validity import block_failures, require_tp, tp_failures, valid_tp_sizes


def remainders(config: ModelConfig, tp: int) -> dict[str, int]:
    return {f.dimension: f.remainder for f in tp_failures(config, tp, "bf16", "native")}


def test_v25_sizes(v25: ModelConfig) -> None:
    assert valid_tp_sizes(v25, "bf16", "native") == (1, 2, 4, 8, 16, 32, 64, 128)
    assert valid_tp_sizes(v25, "fp8", "native") == (1, 2, 4)
    assert valid_tp_sizes(v25, "int4", "native") == (1, 2, 4)
    # SGLang quantizes a bf16 checkpoint by channels, which break nowhere.
    assert valid_tp_sizes(v25, "fp8", "sglang") == (1, 2, 4, 8, 16, 32, 64, 128)


@pytest.mark.parametrize("tp", [3, 6, 12])
def test_v25_vocabulary_and_heads_fail(v25: ModelConfig, tp: int) -> None:
    assert remainders(v25, tp) == {"vocab_size": 102_400 % tp, "num_attention_heads": 128 % tp}


@pytest.mark.parametrize("tp", [5, 10])
def test_v25_vocabulary_passes_but_heads_and_widths_fail(v25: ModelConfig, tp: int) -> None:
    found = remainders(v25, tp)
    assert "vocab_size" not in found
    assert found["num_attention_heads"] == 128 % tp
    assert found["moe_intermediate_size"] == 1536 % tp


def test_640_divides_the_vocabulary_only(v25: ModelConfig) -> None:
    assert set(remainders(v25, 640)) >= {"num_attention_heads", "moe_intermediate_size"}
    assert "vocab_size" not in remainders(v25, 640)


def test_a_failure_shows_its_sum(v25: ModelConfig) -> None:
    first, second = tp_failures(v25, 3, "bf16", "native")
    assert first.message == "vocabulary 102,400 = 3 x 34,133 + 1"
    assert second.message == "heads 128 = 3 x 42 + 2"


def test_blocks_of_128(v25: ModelConfig, v2_lite: ModelConfig) -> None:
    (failure,) = tp_failures(v25, 8, "fp8", "native")
    assert (failure.dimension, failure.divisor, failure.remainder) == ("moe_intermediate_size", 128, 64)
    assert failure.message == "expert width 1,536 / 8 = 192 = 1 x 128 + 64 (fp8 blocks)"
    assert "int4 groups" in tp_failures(v25, 8, "int4", "native")[0].message
    assert block_failures(v25, 4) == ()
    assert block_failures(v25, 8) != ()
    # 1408 = 11 x 128 cannot be halved; one rank takes it whole.
    assert valid_tp_sizes(v2_lite, "fp8", "native") == (1,)


def test_v2_lite(v2_lite: ModelConfig) -> None:
    assert valid_tp_sizes(v2_lite, "bf16", "native") == (1, 2, 4, 8, 16)


def test_llama_replicates_key_value_heads(llama3_8b: ModelConfig) -> None:
    assert valid_tp_sizes(llama3_8b, "bf16", "native") == (1, 2, 4, 8, 16, 32)
    heads = GroupedQueryAttention(36, 6, 128)
    uneven = replace(llama3_8b, attention=heads, vocab_size=36 * 64, intermediate_size=36)
    assert "num_key_value_heads" in remainders(uneven, 4)
    assert remainders(uneven, 12) == {}


def test_sglang_pads_the_vocabulary(llama3_8b: ModelConfig) -> None:
    odd = replace(llama3_8b, vocab_size=32_001)
    assert [f.dimension for f in tp_failures(odd, 2, "bf16", "native")] == ["vocab_size"]
    assert tp_failures(odd, 2, "bf16", "sglang") == ()


def test_a_refused_size_names_each_dimension_and_the_nearest_sizes(v25: ModelConfig) -> None:
    with pytest.raises(ConfigError) as raised:
        require_tp(v25, 6, "bf16")
    assert raised.value.param == "tp"
    assert raised.value.message == (
        "6 ranks (--tp) cannot share this model: vocabulary 102,400 = 6 x 17,066 + 4; heads 128 = 6 x 21 + 2. "
        "Nearest sizes that can: 4 and 8 (all: 1, 2, 4, 8, 16, 32, 64, 128)"
    )
    with pytest.raises(ConfigError, match="Nearest sizes that can: 4 "):
        require_tp(v25, 8, "fp8")
    for tp in (1, 2, 4, 8):
        require_tp(v25, tp, "bf16")
