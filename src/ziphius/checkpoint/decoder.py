"""DecoderShape: the part of a config that differs from one architecture to the next; what a parser returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ziphius.checkpoint.attention import AttentionShape

TopkMethod = Literal["greedy", "group_limited_greedy"]


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """DeepSeek-V2's mixture of experts, under Hugging Face's names."""

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int
    first_k_dense_replace: int
    moe_layer_freq: int
    topk_method: TopkMethod
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The layers of a decoder-only model."""

    attention: AttentionShape
    moe: MoEConfig | None = None
    """None: every layer has a dense MLP."""
    mlp_bias: bool = False
