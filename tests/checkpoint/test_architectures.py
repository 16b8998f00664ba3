"""The table of architectures: each row parses, names a model class that is there, and is in messages."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from ziphius.checkpoint.architectures import ARCHITECTURES
from ziphius.checkpoint.config import GroupedQueryAttention, ModelConfig
from ziphius.errors import ModelError, UnsupportedModel

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 80, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "q_lora_rank": None,
    "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 4, "n_routed_experts": None,
}  # fmt: skip
QWEN2 = {**SIZES, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**SIZES, "architectures": ["Qwen3ForCausalLM"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_a_row_is_whole(row: Any) -> None:
    config = ModelConfig.from_hf({**SIZES, "architectures": [row.name]})
    assert (config.architecture, config.model_type) == (row.name, row.model_type)
    assert config.num_attention_heads == 6
    module, name = row.model.split(":")
    assert isinstance(getattr(import_module(module), name), type)


def test_an_unknown_architecture_is_told_which_there_are() -> None:
    with pytest.raises(UnsupportedModel, match="MixtralForCausalLM") as e:
        ModelConfig.from_hf({**SIZES, "architectures": ["MixtralForCausalLM"]})
    assert all(row.name in e.value.message for row in ARCHITECTURES)


def test_qwen2_has_biases_that_its_config_does_not_tell() -> None:
    assert ModelConfig.from_hf(QWEN2).attention == GroupedQueryAttention(6, 2, 8, qkv_bias=True)


def test_qwen3s_head_size_is_its_own() -> None:
    assert ModelConfig.from_hf(QWEN3).attention == GroupedQueryAttention(6, 2, 128, qk_norm=True)
    biased = ModelConfig.from_hf({**QWEN3, "head_dim": 32, "attention_bias": True})
    assert biased.attention == GroupedQueryAttention(6, 2, 32, qkv_bias=True, o_bias=True, qk_norm=True)


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": YARN}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(config: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        ModelConfig.from_hf({**config, **change})


def test_a_sliding_window_that_is_off_means_nothing() -> None:
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1, "layer_types": None}
    assert ModelConfig.from_hf({**QWEN2, **off}) == ModelConfig.from_hf(QWEN2)
    assert ModelConfig.from_hf({**QWEN2, "use_sliding_window": None}) == ModelConfig.from_hf(QWEN2)


def test_key_value_heads_must_divide_heads() -> None:
    with pytest.raises(ModelError, match=r"num_attention_heads 6 .* num_key_value_heads 4"):
        ModelConfig.from_hf({**QWEN3, "num_key_value_heads": 4})
