"""The config of LlamaForCausalLM, and grouped-query attention as the architectures after it write it down."""

from __future__ import annotations

from ziphius.checkpoint.attention import GroupedQueryAttention
from ziphius.checkpoint.decoder import DecoderShape
from ziphius.checkpoint.keys import Keys
from ziphius.errors import ModelError


def parse_llama(keys: Keys) -> DecoderShape:
    """`attention_bias` is for q, k, v and o."""
    bias = keys.get("attention_bias", bool, False)
    attention = grouped_query_attention(keys, qkv_bias=bias, o_bias=bias)
    return DecoderShape(attention, mlp_bias=keys.get("mlp_bias", bool, False))


def grouped_query_attention(
    keys: Keys, *, qkv_bias: bool, o_bias: bool, qk_norm: bool = False, head_dim: int | None = None
) -> GroupedQueryAttention:
    """Under Hugging Face's names. `head_dim`: where the config does not say (default: hidden_size / heads)."""
    heads = keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"{keys.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    dim = keys.size("head_dim", head_dim or keys.size("hidden_size") // heads)
    return GroupedQueryAttention(heads, kv_heads, dim, qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=qk_norm)
