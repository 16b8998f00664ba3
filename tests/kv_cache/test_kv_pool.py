"""The pool's shapes, its scratch page and its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import SINGLE, ParallelState
from ziphius.errors import ConfigError
from ziphius.kv_cache.kv_pool import KVCache, KVPool, LatentCache
from ziphius.planner.memory import kv_bytes_per_token

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
LLAMA = ModelConfig.from_hf(COMMON | {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4})
MLA = ModelConfig.from_hf(
    COMMON
    | {"architectures": ["DeepseekV2ForCausalLM"], "kv_lora_rank": 12, "qk_nope_head_dim": 4}
    | {"qk_rope_head_dim": 6, "v_head_dim": 4, "q_lora_rank": None, "n_routed_experts": None}
)


def test_a_llama_keeps_keys_and_values_by_head() -> None:
    pool = KVPool(LLAMA, 5, 16, torch.float32, CPU, SINGLE)
    assert len(pool.kv) == 3
    assert pool.latent == []
    assert all(isinstance(layer, KVCache) for layer in pool.kv)
    assert pool.kv[0].k.shape == pool.kv[0].v.shape == (6 * 16, 4, 4)
    assert pool.scratch_page == 5


def test_mla_keeps_one_latent_a_token() -> None:
    pool = KVPool(MLA, 5, 16, torch.bfloat16, CPU, SINGLE)
    assert len(pool.latent) == 3
    assert pool.kv == []
    assert all(isinstance(layer, LatentCache) for layer in pool.latent)
    assert pool.latent[2].latent.shape == (6 * 16, 18)


@pytest.mark.parametrize(("config", "size"), [(LLAMA, 1), (LLAMA, 2), (LLAMA, 4), (LLAMA, 8), (MLA, 1), (MLA, 4)])
def test_its_bytes_are_the_planners(config: ModelConfig, size: int) -> None:
    pool = KVPool(config, 5, 16, torch.bfloat16, CPU, ParallelState(0, size))
    assert pool.nbytes == 6 * 16 * kv_bytes_per_token(config, size, "bfloat16")


def test_layers_do_not_share_memory() -> None:
    pool = KVPool(LLAMA, 1, 4, torch.float32, CPU, SINGLE)
    pool.kv[0].k.fill_(1.0)
    assert not any(t.any() for t in (pool.kv[0].v, pool.kv[1].k, pool.kv[2].k))


def test_heads_that_do_not_divide_are_named() -> None:
    with pytest.raises(ConfigError, match=r"num_key_value_heads 4 is not a multiple .* 3"):
        KVPool(LLAMA, 1, 4, torch.float32, CPU, ParallelState(0, 3))
