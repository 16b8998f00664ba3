"""Bytes of weights and cache, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.planner.memory import (
    GIB,
    BatchLimits,
    activation_bytes,
    gib,
    kv_bytes_per_token,
    matrices,
    parameter_count,
    weight_bytes,
)


def test_a_step_takes_what_suits_the_device_unless_told_otherwise() -> None:
    assert BatchLimits.of("cpu", None, None) == BatchLimits(requests=32, prompt_tokens=512)
    assert BatchLimits.of("cuda", None, None) == BatchLimits(requests=128, prompt_tokens=8192)
    assert BatchLimits.of("cuda", 7, None) == BatchLimits(requests=7, prompt_tokens=8192)
    assert BatchLimits.of("cpu", None, 100) == BatchLimits(requests=32, prompt_tokens=100)


def test_parameters_of_the_published_models(v25: ModelConfig, v2_lite: ModelConfig, llama3_8b: ModelConfig) -> None:
    assert parameter_count(v25) == 235_741_434_880
    assert parameter_count(v2_lite) == 15_706_484_224
    assert parameter_count(llama3_8b) == 8_030_261_248


def test_v25_by_part(v25: ModelConfig) -> None:
    whole = weight_bytes(v25, 1, "bf16")
    # 59 layers x 160 experts x 3 matrices of 5120 x 1536.
    assert whole.routed_experts == 2 * 59 * 160 * 3 * 5120 * 1536 == 445_435_084_800
    # q_a 5120 x 1536 and kv_a 5120 x 576, in 60 layers: 10.8 M parameters a layer.
    assert whole.attention_replicated == 2 * 60 * (5120 * 1536 + 5120 * 576)
    # q_b 1536 x 128 x 192, kv_b 512 x 128 x 256, o 128 x 128 x 5120.
    assert whole.attention_sharded == 2 * 60 * (1536 * 24_576 + 512 * 32_768 + 16_384 * 5120)
    assert whole.attention / 2 / 60 == pytest.approx(149.2e6, rel=1e-3)
    assert whole.shared_experts == 2 * 59 * 3 * 5120 * 3072
    assert whole.dense == 2 * 3 * 5120 * 12_288
    assert whole.router == 2 * 59 * 160 * 5120
    assert whole.embedding == whole.head == 2 * 102_400 * 5120
    assert whole.norms == 2 * (121 * 5120 + 60 * 1536 + 60 * 512)
    assert whole.total == 2 * 235_741_434_880


@pytest.mark.parametrize(("tp", "expected"), [(1, 439.10), (2, 220.2), (4, 110.75), (8, 56.03)])
def test_v25_a_rank_in_bf16(v25: ModelConfig, tp: int, expected: float) -> None:
    assert weight_bytes(v25, tp, "bf16").total / GIB == pytest.approx(expected, abs=0.05)


def test_a_rank_equals_the_model_of_its_shapes(v25: ModelConfig, v25_rank: ModelConfig) -> None:
    assert weight_bytes(v25, 4, "bf16") == weight_bytes(v25_rank, 1, "bf16")


def test_v25_in_fewer_bits(v25: ModelConfig) -> None:
    assert weight_bytes(v25, 1, "fp8").total == pytest.approx(236.8e9, rel=2e-3)
    int4 = weight_bytes(v25, 1, "int4")
    # Half a byte and a two-byte scale for each group of 128: 4.125 bits.
    assert int4.routed_experts == 59 * 160 * 3 * 5120 * 1536 * 4.125 / 8
    assert int4.routed_experts == pytest.approx(114.8e9, rel=1e-3)
    # The reference counts the embedding and the head in one byte, here they stay in two: 1.05 GB more.
    assert int4.total == pytest.approx(127.8e9 + 1.05e9, rel=2e-3)


def test_fp8_blocks_that_are_not_whole(v2_lite: ModelConfig) -> None:
    # kv_a has 576 outputs: 5 blocks of 128, the last one half empty; 2048 inputs are 16.
    kv_a = next(m for m in matrices(v2_lite) if m.out_features == 576)
    assert weight_bytes(v2_lite, 1, "fp8").attention_replicated == kv_a.copies * (576 * 2048 + 5 * 16 * 4)


def test_v2_lite(v2_lite: ModelConfig) -> None:
    whole = weight_bytes(v2_lite, 1, "bf16")
    assert whole.total == 2 * 15_706_484_224
    # Without q_lora_rank the query projection is sharded, and only kv_a is on every rank.
    assert weight_bytes(v2_lite, 2, "bf16").attention_replicated == 2 * 27 * 2048 * 576
    assert whole.routed_experts == 2 * 26 * 64 * 3 * 2048 * 1408
    assert whole.dense == 2 * 3 * 2048 * 10_944


def test_llama(llama3_8b: ModelConfig) -> None:
    assert weight_bytes(llama3_8b, 1, "bf16").total == 2 * 8_030_261_248
    two = weight_bytes(llama3_8b, 2, "bf16")
    assert two.dense == 2 * 32 * 3 * 4096 * 14_336 // 2
    assert two.attention == two.attention_sharded == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    # 16 ranks share 8 key/value heads: each holds one, whole.
    sixteen = weight_bytes(llama3_8b, 16, "bf16")
    assert sixteen.attention_replicated == 2 * 32 * 2 * 128 * 4096
    assert weight_bytes(llama3_8b, 1, "fp32").total == 4 * 8_030_261_248


def test_int8_of_a_tied_model(llama3_8b: ModelConfig) -> None:
    from dataclasses import replace

    tied = replace(llama3_8b, tie_word_embeddings=True)
    assert weight_bytes(tied, 1, "bf16").head == 0
    # The head reads int8, so the embedding cannot be it: a byte a weight and a float32 scale a row.
    assert weight_bytes(tied, 1, "int8").head == 128_256 * (4096 + 4)
    assert weight_bytes(tied, 1, "int8").embedding == 128_256 * 4096 * 4
    # Floats in another type than the linears': no memory can be shared either.
    assert weight_bytes(tied, 1, "bf16", float_bytes=4).head == 128_256 * 4096 * 2


def test_cache_bytes(v25: ModelConfig, v2_lite: ModelConfig, llama3_8b: ModelConfig) -> None:
    assert kv_bytes_per_token(v25, 1, "bfloat16") == kv_bytes_per_token(v25, 8, "bfloat16") == 60 * 576 * 2 == 69_120
    assert kv_bytes_per_token(v2_lite, 2, "float32") == 27 * 576 * 4
    assert kv_bytes_per_token(llama3_8b, 1, "bfloat16") == 32 * 2 * 8 * 128 * 2 == 131_072
    assert kv_bytes_per_token(llama3_8b, 4, "bfloat16") == 131_072 // 4
    assert kv_bytes_per_token(llama3_8b, 32, "bfloat16") == 131_072 // 8


def test_activations_grow_with_tokens_and_rows(v25: ModelConfig, llama3_8b: ModelConfig) -> None:
    for config in (v25, llama3_8b):
        few = activation_bytes(config, 4, tokens=512, rows=32, dtype="bfloat16")
        assert 0 < few < 2 * GIB
        assert activation_bytes(config, 4, tokens=1024, rows=32, dtype="bfloat16") > few
        assert activation_bytes(config, 4, tokens=512, rows=64, dtype="bfloat16") > few


def test_gib() -> None:
    assert (gib(3 * GIB // 2), gib(GIB // 2), gib(0)) == ("1.50 GiB", "512 MiB", "0 MiB")
