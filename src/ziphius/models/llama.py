"""Llama-shaped models (Llama, Qwen2): grouped-query attention and a SwiGLU MLP, under Hugging Face's tensor names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend
from ziphius.attention.batch import ForwardBatch
from ziphius.checkpoint.config import GroupedQueryAttention, ModelConfig
from ziphius.distributed import ParallelState
from ziphius.errors import UnsupportedModel
from ziphius.kv_cache.kv_pool import KVCache, KVPool
from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer
from ziphius.layers.linear import QKVParallelLinear, RowParallelLinear
from ziphius.layers.mlp import GatedMLP
from ziphius.layers.norm import RMSNorm
from ziphius.layers.rotary import RotaryEmbedding
from ziphius.layers.select import make_ops
from ziphius.layers.weights import LinearFormat
from ziphius.models.decoder import Decoder
from ziphius.models.llama_cpu import LlamaLayerParts, llama_on_cpu


class LlamaAttention(Layer):
    """Grouped-query attention; each rank has an equal share of the heads."""

    def __init__(self, config: ModelConfig, shape: GroupedQueryAttention, context: LayerContext) -> None:
        hidden, heads, head_dim = config.hidden_size, shape.heads, shape.head_dim
        self.qkv_proj = QKVParallelLinear(hidden, heads, shape.kv_heads, head_dim, context, bias=shape.qkv_bias)
        self.o_proj = RowParallelLinear(heads * head_dim, hidden, context, bias=shape.o_bias)
        self._ops = context.ops
        self._scale = head_dim**-0.5

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: ForwardBatch,
        attention: AttentionBackend,
    ) -> Tensor:
        """x [T, hidden], normed -> [T, hidden]."""
        qk, v = self.qkv_proj.split(self.qkv_proj(x))
        q, k = self.rotated(qk, angles)
        out = attention.attend(q, k, v, cache, batch, self._scale)
        return self.o_proj(out.flatten(1))

    def rotated(self, qk: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Heads of q and k together [T, heads + kv_heads, D] -> q [T, heads, D] and k [T, kv_heads, D], rotated.

        `qk` may be overwritten.
        """
        return self.qkv_proj.split_qk(self._ops.rotate(qk, *angles, interleaved=False))

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield from self.qkv_proj.checkpoint_tensors(f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        yield from self.o_proj.checkpoint_tensors(f"{name}.o_proj")


class LlamaLayer(Layer):
    """Attention and MLP, each behind a norm, each added to the residual sum."""

    def __init__(self, config: ModelConfig, attention: LlamaAttention, context: LayerContext) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, context)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden, eps, context)
        self.mlp = GatedMLP(hidden, config.intermediate_size, context, bias=config.mlp_bias)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        angles: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: ForwardBatch,
        attention: AttentionBackend,
    ) -> tuple[Tensor, Tensor]:
        """The last layer's output x and the sum of all before, each [T, hidden] -> the same after this layer."""
        x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, angles, cache, batch, attention)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual

    def parts(self) -> LlamaLayerParts:
        """The layer's parts, for kernels that compute the whole layer at once."""
        attention, mlp = self.self_attn, self.mlp
        return LlamaLayerParts(
            self.input_layernorm,
            attention.qkv_proj,
            attention.o_proj,
            self.post_attention_layernorm,
            mlp.gate_up_proj,
            mlp.down_proj,
        )

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield from self.input_layernorm.checkpoint_tensors(f"{name}.input_layernorm")
        yield from self.self_attn.checkpoint_tensors(f"{name}.self_attn")
        yield from self.post_attention_layernorm.checkpoint_tensors(f"{name}.post_attention_layernorm")
        yield from self.mlp.checkpoint_tensors(f"{name}.mlp")


class LlamaForCausalLM(Decoder[LlamaLayer]):
    """A CausalLM.

    Qwen2 uses it too: only its biases differ, and they are in the config's attention. A model with another attention
    is a subclass with its own `attention_class`.
    """

    attention_class = LlamaAttention

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        linear_format: LinearFormat,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = config.attention
        if not isinstance(shape, GroupedQueryAttention):
            raise UnsupportedModel(f"{config.architecture} needs grouped-query attention")
        context = LayerContext(parallel, linear_format, make_ops(device, linear_format.batch_invariant), dtype, device)
        attention = [self.attention_class(config, shape, context) for _ in range(config.num_hidden_layers)]
        super().__init__(config, [LlamaLayer(config, one, context) for one in attention], context)
        self._rotary = RotaryEmbedding(shape.head_dim, config.rope_theta, config.rope_scaling, device)
        self.on_cpu = llama_on_cpu([layer.parts() for layer in self.layers], self.norm, config, shape, context)

    def forward(self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """See CausalLM."""
        x, residual = self.embed_tokens(batch.input_ids), None
        angles = self._rotary(batch.positions)
        if self.on_cpu is not None and self.on_cpu.takes(pool):
            return self.on_cpu(x, angles, batch)
        for layer, cache in zip(self.layers, pool.kv, strict=True):
            x, residual = layer(x, residual, angles, cache, batch, attention)
        return self.norm.add(x, residual)[0]

    @property
    def own_threads(self) -> bool:
        """See CausalLM."""
        return self.on_cpu is not None

    def compile_kernels(self) -> None:
        """See CausalLM."""
        if self.on_cpu is not None:
            self.on_cpu.compile()
