"""Qwen3: a Llama whose queries and keys pass an RMSNorm by head before they are rotated (arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ziphius.checkpoint.config import GroupedQueryAttention, ModelConfig
from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor
from ziphius.layers.norm import RMSNorm
from ziphius.models.llama import LlamaAttention, LlamaForCausalLM


class Qwen3Attention(LlamaAttention):
    """One norm's weight serves all heads of q, another all heads of k; every rank has both whole."""

    def __init__(self, config: ModelConfig, shape: GroupedQueryAttention, context: LayerContext) -> None:
        super().__init__(config, shape, context)
        self.q_norm = RMSNorm(shape.head_dim, config.rms_norm_eps, context)
        self.k_norm = RMSNorm(shape.head_dim, config.rms_norm_eps, context)

    def rotated(self, qk: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See LlamaAttention."""
        q, k = (
            # The norm's rows are heads: [T * heads, D]
            self._ops.rotate(norm(x.reshape(-1, x.shape[-1])).view(x.shape), *angles, interleaved=False)
            for x, norm in zip(self.qkv_proj.split_qk(qk), (self.q_norm, self.k_norm), strict=True)
        )
        return q, k

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield from super().checkpoint_tensors(name)
        yield from self.q_norm.checkpoint_tensors(f"{name}.q_norm")
        yield from self.k_norm.checkpoint_tensors(f"{name}.k_norm")


class Qwen3ForCausalLM(LlamaForCausalLM):
    """A CausalLM."""

    attention_class = Qwen3Attention
