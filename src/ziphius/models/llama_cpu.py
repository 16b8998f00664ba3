"""A Llama's layers as one program of the CPU kernels; llama.py is the definition of what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ziphius.attention.batch import ForwardBatch
from ziphius.checkpoint.config import GroupedQueryAttention, ModelConfig
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.context import LayerContext
from ziphius.layers.linear import Linear
from ziphius.layers.norm import RMSNorm
from ziphius.layers.packed_int8 import PackedInt8Format, PackedInt8Weight

if TYPE_CHECKING:
    from ziphius.kernels.cpu.llama import LlamaLayerWeights, LlamaStack
    from ziphius.kernels.cpu.quantize import PackedWeight


@dataclass(frozen=True, slots=True)
class LlamaLayerParts:
    """The parts of one layer of llama.py."""

    input_layernorm: RMSNorm
    qkv_proj: Linear
    o_proj: Linear
    post_attention_layernorm: RMSNorm
    gate_up_proj: Linear
    down_proj: Linear


class LlamaOnCpu:
    """The layers and the final norm of one model, with the cache of the pool that `takes` last saw."""

    def __init__(
        self,
        layers: Sequence[LlamaLayerParts],
        norm: RMSNorm,
        config: ModelConfig,
        linear_format: PackedInt8Format,
    ) -> None:
        self._layers = [_weights(layer) for layer in layers]
        self._norm = norm.weight
        self._config = config
        self._threads = linear_format.kernel.pool
        self._pool: KVPool | None = None
        self._stack: LlamaStack | None = None

    def takes(self, pool: KVPool) -> bool:
        """Whether the kernels can compute the model's and the pool's sizes and types. Binds them to `pool` if so."""
        if self._pool is not pool:
            self._pool, self._stack = pool, self._bind(pool)
        return self._stack is not None

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: ForwardBatch) -> Tensor:
        """x [T, hidden], embedded -> [T, hidden], after the final norm."""
        from ziphius.kernels.cpu.llama import LlamaStep

        if self._stack is None:
            raise RuntimeError("takes(pool) must come first, and be true")
        step = LlamaStep(
            x=x,
            cos=angles[0],
            sin=angles[1],
            slots=batch.slots,
            page_table=batch.page_table,
            seq_lens=batch.seq_lens,
            query_starts=batch.query_starts,
            num_decodes=batch.num_decodes,
        )
        # A copy: the next step overwrites the stack's buffer, but not what an earlier step returned.
        return self._stack(step).clone()

    def compile(self) -> None:
        """Compile the kernels; otherwise the first step compiles them."""
        from ziphius.kernels.cpu.llama import compile_jobs

        compile_jobs()

    def _bind(self, pool: KVPool) -> LlamaStack | None:
        from ziphius.kernels.cpu.llama import LlamaSizes, LlamaStack

        config = self._config
        sizes = LlamaSizes(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate_size,
            eps=config.rms_norm_eps,
            page_size=pool.page_size,
        )
        if not sizes.fits or pool.kv[0].k.dtype != torch.float32:
            return None
        return LlamaStack(self._layers, self._norm, sizes, [(c.k, c.v) for c in pool.kv], self._threads)


def llama_on_cpu(
    layers: Sequence[LlamaLayerParts],
    norm: RMSNorm,
    config: ModelConfig,
    shape: GroupedQueryAttention,
    context: LayerContext,
) -> LlamaOnCpu | None:
    """None if the layers must be computed one by one.

    The kernels know neither several ranks, nor biases, nor norms of q and k, nor other formats than packed int8.
    """
    linear_format = context.linear_format
    more = shape.qkv_bias or shape.o_bias or shape.qk_norm or config.mlp_bias
    whole = context.parallel.size == 1 and not more
    if not whole or context.dtype != torch.float32 or not isinstance(linear_format, PackedInt8Format):
        return None
    return LlamaOnCpu(layers, norm, config, linear_format)


def _weights(layer: LlamaLayerParts) -> LlamaLayerWeights:
    from ziphius.kernels.cpu.llama import LlamaLayerWeights

    return LlamaLayerWeights(
        input_norm=layer.input_layernorm.weight,
        qkv=_packed(layer.qkv_proj),
        o=_packed(layer.o_proj),
        post_attention_norm=layer.post_attention_layernorm.weight,
        gate_up=_packed(layer.gate_up_proj),
        down=_packed(layer.down_proj),
    )


def _packed(linear: Linear) -> PackedWeight:
    weight = linear.weight
    assert isinstance(weight, PackedInt8Weight)
    return weight.packed
