"""The configs of the dense Qwen models, Qwen2ForCausalLM (also 2.5) and Qwen3ForCausalLM."""

from __future__ import annotations

from ziphius.checkpoint.decoder import DecoderShape
from ziphius.checkpoint.keys import Keys
from ziphius.checkpoint.llama import grouped_query_attention
from ziphius.errors import UnsupportedModel

_QWEN3_HEAD_DIM = 128
"""Where the config does not say; it is no function of the other sizes (arXiv:2505.09388)."""


def parse_qwen2(keys: Keys) -> DecoderShape:
    """Biases on q, k and v, never on o (arXiv:2407.10671); the config has no key for them."""
    _refuse_sliding_windows(keys)
    return DecoderShape(grouped_query_attention(keys, qkv_bias=True, o_bias=False))


def parse_qwen3(keys: Keys) -> DecoderShape:
    """RMSNorm over each head of q and k in place of the biases (arXiv:2505.09388)."""
    _refuse_sliding_windows(keys)
    bias = keys.get("attention_bias", bool, False)
    return DecoderShape(
        grouped_query_attention(keys, qkv_bias=bias, o_bias=bias, qk_norm=True, head_dim=_QWEN3_HEAD_DIM)
    )


def _refuse_sliding_windows(keys: Keys) -> None:
    """`sliding_window` is a number in most configs, and means nothing unless `use_sliding_window` is true."""
    keys.refuse_unless("use_sliding_window", (False, None), False)
    other = [kind for kind in keys.get("layer_types", list, []) if kind != "full_attention"]
    if other:
        raise UnsupportedModel(f"{keys.where}: layer_types has {other[0]!r}; only 'full_attention' is supported")
