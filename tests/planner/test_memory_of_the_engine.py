"""The planner's bytes are the engine's: models and pools are built, and their tensors counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ziphius.checkpoint.config import GroupedQueryAttention, LatentAttention, ModelConfig
from ziphius.distributed import SINGLE, ParallelState
from ziphius.formats import WeightsFormat
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.select import make_linear_format
from ziphius.models.causal_lm import make_model
from ziphius.planner.memory import kv_bytes_per_token, weight_bytes

CPU = torch.device("cpu")
SHRUNK = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}


def shrunk_v2(config: ModelConfig) -> ModelConfig:
    assert isinstance(config.attention, LatentAttention)
    assert config.moe is not None
    lora = None if config.attention.q_lora_rank is None else 24
    mla = LatentAttention(8, lora, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    moe = replace(config.moe, n_routed_experts=8, moe_intermediate_size=32, n_group=min(config.moe.n_group, 4))
    return replace(config, attention=mla, moe=moe, **SHRUNK)


@pytest.fixture
def configs(v25: ModelConfig, v2_lite: ModelConfig, llama3_8b: ModelConfig) -> list[ModelConfig]:
    llama = replace(llama3_8b, attention=GroupedQueryAttention(8, 2, 16), **SHRUNK)
    qwen2 = replace(llama, architecture="Qwen2ForCausalLM", attention=GroupedQueryAttention(8, 2, 16, qkv_bias=True))
    normed = GroupedQueryAttention(8, 4, 24, qk_norm=True)
    qwen3 = replace(llama, architecture="Qwen3ForCausalLM", attention=normed)
    return [shrunk_v2(v25), shrunk_v2(v2_lite), llama, replace(llama, tie_word_embeddings=True), qwen2, qwen3]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("weights_format", "dtype"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bf16", torch.float32),
        ("int8", torch.float32),
        ("int8", torch.bfloat16),
    ],
)
def test_weights(configs: list[ModelConfig], weights_format: WeightsFormat, dtype: torch.dtype, tp: int) -> None:
    for config in configs:
        parallel = ParallelState(rank=tp - 1, size=tp)
        model = make_model(config, parallel, make_linear_format(weights_format, dtype, CPU), dtype, CPU)
        predicted = weight_bytes(config, tp, weights_format, float_bytes=dtype.itemsize)
        assert predicted.total == model.nbytes, config.architecture


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_cache(configs: list[ModelConfig], tp: int) -> None:
    for config in configs:
        pool = KVPool(config, 3, 16, torch.float32, CPU, ParallelState(rank=0, size=tp) if tp > 1 else SINGLE)
        # One page more than asked for: padded rows write there.
        assert pool.nbytes == 4 * 16 * kv_bytes_per_token(config, tp, "float32")
