"""DeepSeek-V2, V2-Lite, Coder-V2 and V2.5: latent attention and a mixture of experts (arXiv:2405.04434).

Where transformers differs from DeepSeek's published modeling_deepseek.py, this follows the published model.
The tensors have the checkpoints' names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend, ProjectedTokens
from ziphius.attention.batch import ForwardBatch
from ziphius.checkpoint.config import LatentAttention, ModelConfig, YarnConfig
from ziphius.distributed import ParallelState
from ziphius.errors import UnsupportedModel
from ziphius.kv_cache.kv_pool import KVPool, LatentCache
from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer, Shard
from ziphius.layers.linear import (
    ColumnParallelLinear,
    Linear,
    PartlyParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from ziphius.layers.mlp import GatedMLP
from ziphius.layers.moe import MixtureOfExperts
from ziphius.layers.norm import RMSNorm
from ziphius.layers.rotary import RotaryEmbedding, yarn_softmax_scale
from ziphius.layers.select import make_ops
from ziphius.layers.weights import LatentSizes, LinearFormat, MatrixPart
from ziphius.models.decoder import Decoder

LATENT_NORM_EPS = 1e-6
"""The epsilon of q_a_layernorm and kv_a_layernorm. The published model does not use rms_norm_eps for them."""


class LatentExpansion(Layer):
    """kv_b_proj, cut by heads into its key half and its value half, which decoding absorbs."""

    def __init__(self, heads: int, mla: LatentAttention, context: LayerContext) -> None:
        local = context.parallel.shard(heads, "num_attention_heads")
        rows = mla.qk_nope_head_dim + mla.v_head_dim
        shard = Shard(0, context.parallel.rank * local * rows, local * rows)
        self._part = MatrixPart((heads * rows, mla.kv_lora_rank), shard, 0)
        sizes = LatentSizes(heads=local, nope=mla.qk_nope_head_dim, value=mla.v_head_dim, lora=mla.kv_lora_rank)
        self.weights = context.linear_format.latent(sizes, context.dtype, context.device)

    @property
    def w_uk(self) -> Tensor:
        """[H, nope, lora]."""
        return self.weights.w_uk

    @property
    def w_uv(self) -> Tensor:
        """[H, lora, v]."""
        return self.weights.w_uv

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield from self.weights.checkpoint_tensors(name, self._part)


class LatentProjection(Layer):
    """x -> (queries, latent, shared rotary key). One product computes the inputs that all heads share.

    If queries are not compressed (q_lora_rank null), the product also computes the queries of this rank's heads.
    """

    def __init__(self, config: ModelConfig, mla: LatentAttention, context: LayerContext) -> None:
        hidden, heads, bias = config.hidden_size, mla.heads, mla.bias
        self.q_norm = None if mla.q_lora_rank is None else RMSNorm(mla.q_lora_rank, LATENT_NORM_EPS, context)
        self.kv_norm = RMSNorm(mla.kv_lora_rank, LATENT_NORM_EPS, context)
        queries = context.parallel.shard(heads, "num_attention_heads") * mla.qk_head_dim
        self._sizes = [mla.q_lora_rank or queries, mla.kv_lora_rank, mla.qk_rope_head_dim]
        self.q_proj: ColumnParallelLinear | None = None
        self.projection: Linear
        if mla.q_lora_rank is not None:
            self.projection = ReplicatedLinear(hidden, [mla.q_lora_rank, mla.latent_dim], context, bias=bias)
            self.q_proj = ColumnParallelLinear(mla.q_lora_rank, heads * mla.qk_head_dim, context)
        elif bias:
            raise UnsupportedModel("attention_bias with q_lora_rank null is not supported")
        else:
            self.projection = PartlyParallelLinear(hidden, heads * mla.qk_head_dim, [mla.latent_dim], context)

    def __call__(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> queries [T, heads * qk_head_dim], latent [T, lora], key [T, rope]; not normed, not rotated."""
        q, latent, k_pe = self.projection.after_norm(x, norm).split_with_sizes(self._sizes, dim=-1)
        if self.q_proj is not None and self.q_norm is not None:
            q = self.q_proj.after_norm(q, self.q_norm)
        return q, latent, k_pe

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        q = "q_proj" if self.q_proj is None else "q_a_proj"
        yield from self.projection.checkpoint_tensors(f"{name}.{q}", f"{name}.kv_a_proj_with_mqa")
        yield from self.kv_norm.checkpoint_tensors(f"{name}.kv_a_layernorm")
        if self.q_proj is not None and self.q_norm is not None:
            yield from self.q_norm.checkpoint_tensors(f"{name}.q_a_layernorm")
            yield from self.q_proj.checkpoint_tensors(f"{name}.q_b_proj")


class DeepseekV2Attention(Layer):
    """Multi-head latent attention."""

    def __init__(self, config: ModelConfig, mla: LatentAttention, context: LayerContext) -> None:
        self._mla = mla
        self._ops = context.ops
        self._scale = mla.qk_head_dim**-0.5
        if isinstance(config.rope_scaling, YarnConfig):
            self._scale *= yarn_softmax_scale(config.rope_scaling)
        self.latent = LatentProjection(config, mla, context)
        self.kv_b_proj = LatentExpansion(mla.heads, mla, context)
        self.o_proj = RowParallelLinear(mla.heads * mla.v_head_dim, config.hidden_size, context, bias=mla.bias)

    def __call__(
        self,
        x: Tensor,
        norm: RMSNorm,
        angles: tuple[Tensor, Tensor],
        cache: LatentCache,
        batch: ForwardBatch,
        attention: AttentionBackend,
    ) -> Tensor:
        """x [T, hidden] -> x + attention of norm(x), [T, hidden]."""
        q, latent, k_pe = self.latent(x, norm)
        # `view` gives a single row another stride than it gives several rows. Triton compiles other code for a stride
        # that is a multiple of 16 than for one that is not, and then one token alone would get other last bits.
        head_dim = self._mla.qk_head_dim
        q = q.as_strided((q.shape[0], q.shape[1] // head_dim, head_dim), (q.stride(0), head_dim, 1))
        kv_b = self.kv_b_proj
        projected = ProjectedTokens(q, latent, k_pe, self.latent.kv_norm, angles, kv_b.w_uk, kv_b.w_uv)
        out = attention.attend_projected(projected, cache, batch, self._scale, self._ops)
        return self.o_proj.onto(out.flatten(1), x)

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield from self.latent.checkpoint_tensors(name)
        yield from self.kv_b_proj.checkpoint_tensors(f"{name}.kv_b_proj")
        yield from self.o_proj.checkpoint_tensors(f"{name}.o_proj")


class DeepseekV2Layer(Layer):
    """Attention and MLP or experts, each behind a norm, each added to the residual sum."""

    def __init__(self, config: ModelConfig, mla: LatentAttention, layer_id: int, context: LayerContext) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, context)
        self.self_attn = DeepseekV2Attention(config, mla, context)
        self.post_attention_layernorm = RMSNorm(hidden, eps, context)
        self.mlp: MixtureOfExperts | GatedMLP
        if config.moe is not None and config.is_moe_layer(layer_id):
            self.mlp = MixtureOfExperts(hidden, config.moe, context)
        else:
            self.mlp = GatedMLP(hidden, config.intermediate_size, context, bias=config.mlp_bias)

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LatentCache,
        batch: ForwardBatch,
        attention: AttentionBackend,
    ) -> Tensor:
        """The residual stream [T, hidden] -> the same after this layer."""
        x = self.self_attn(x, self.input_layernorm, angles, cache, batch, attention)
        return self.mlp.onto(x, self.post_attention_layernorm)

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield from self.input_layernorm.checkpoint_tensors(f"{name}.input_layernorm")
        yield from self.self_attn.checkpoint_tensors(f"{name}.self_attn")
        yield from self.post_attention_layernorm.checkpoint_tensors(f"{name}.post_attention_layernorm")
        yield from self.mlp.checkpoint_tensors(f"{name}.mlp")


class DeepseekV2ForCausalLM(Decoder[DeepseekV2Layer]):
    """A CausalLM."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        linear_format: LinearFormat,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        mla = config.attention
        if not isinstance(mla, LatentAttention):
            raise UnsupportedModel("DeepseekV2ForCausalLM needs latent attention: kv_lora_rank is missing")
        context = LayerContext(parallel, linear_format, make_ops(device, linear_format.batch_invariant), dtype, device)
        layers = [DeepseekV2Layer(config, mla, i, context) for i in range(config.num_hidden_layers)]
        super().__init__(config, layers, context)
        self._rotary = RotaryEmbedding(mla.qk_rope_head_dim, config.rope_theta, config.rope_scaling, device)

    def forward(self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """See CausalLM."""
        x = self.embed_tokens(batch.input_ids)
        angles = self._rotary(batch.positions)
        for layer, cache in zip(self.layers, pool.latent, strict=True):
            x = layer(x, angles, cache, batch, attention)
        return self.norm(x)
