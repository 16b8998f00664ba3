"""Decoder: the frame of every decoder-only model: embedding, layers, final norm and head, under one set of names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ziphius.checkpoint.config import ModelConfig
from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer
from ziphius.layers.linear import ParallelLMHead, VocabParallelEmbedding
from ziphius.layers.norm import RMSNorm


class DecoderLayer(Protocol):
    """What the frame asks of a layer; how a layer is called is its model's own affair."""

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        """Every tensor that the layer takes; `name` is the layer's in the checkpoint."""


L = TypeVar("L", bound=DecoderLayer)


class Decoder(Layer, Generic[L]):
    """All of a CausalLM but `forward`. The head may be tied to the embedding."""

    def __init__(self, config: ModelConfig, layers: list[L], context: LayerContext) -> None:
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context)
        self.layers = layers
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, context)
        self.lm_head = ParallelLMHead(self.embed_tokens, config.tie_word_embeddings, context)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """See CausalLM."""
        return self.lm_head(hidden, out)

    @property
    def own_threads(self) -> bool:
        """See CausalLM."""
        return False

    def compile_kernels(self) -> None:
        """See CausalLM."""

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """See CausalLM."""
        yield from self.embed_tokens.checkpoint_tensors("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            yield from layer.checkpoint_tensors(f"model.layers.{i}")
        yield from self.norm.checkpoint_tensors("model.norm")
        yield from self.lm_head.checkpoint_tensors(
            "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        )
