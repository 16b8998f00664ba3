"""The config of DeepseekV2ForCausalLM: latent attention and a mixture of experts."""

from __future__ import annotations

from ziphius.checkpoint.attention import LatentAttention
from ziphius.checkpoint.decoder import DecoderShape, MoEConfig
from ziphius.checkpoint.keys import Keys
from ziphius.errors import ModelError


def parse_deepseek_v2(keys: Keys) -> DecoderShape:
    """V2, V2-Lite, Coder-V2 and V2.5."""
    keys.refuse_unless("scoring_func", ("softmax",), "softmax")
    attention = LatentAttention(
        heads=keys.size("num_attention_heads"),
        q_lora_rank=keys.size_or_null("q_lora_rank"),
        kv_lora_rank=keys.size("kv_lora_rank"),
        qk_nope_head_dim=keys.size("qk_nope_head_dim"),
        qk_rope_head_dim=keys.size("qk_rope_head_dim"),
        v_head_dim=keys.size("v_head_dim"),
        bias=keys.get("attention_bias", bool, False),
    )
    return DecoderShape(attention, _moe(keys), mlp_bias=keys.get("mlp_bias", bool, False))


def _moe(keys: Keys) -> MoEConfig | None:
    experts = keys.size_or_null("n_routed_experts")
    if experts is None:
        return None
    method = keys.refuse_unless("topk_method", ("greedy", "group_limited_greedy"))
    groups, kept = 1, 1
    if method == "group_limited_greedy":
        groups = keys.size("n_group")
        if experts % groups:
            raise ModelError(f"config.json: n_routed_experts {experts} is not a multiple of n_group {groups}")
        kept = keys.size("topk_group", most=groups)
    return MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=keys.size("num_experts_per_tok", most=experts // groups * kept),
        moe_intermediate_size=keys.size("moe_intermediate_size"),
        n_shared_experts=keys.size_or_null("n_shared_experts", least=0) or 0,
        first_k_dense_replace=keys.size("first_k_dense_replace", least=0),
        moe_layer_freq=keys.size("moe_layer_freq", 1),
        topk_method=method,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=keys.get("norm_topk_prob", bool),
        routed_scaling_factor=keys.get("routed_scaling_factor", float),
    )
