"""CausalLM: what the runner and the loader ask of a model, and the classes by architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend
from ziphius.attention.batch import ForwardBatch
from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import ParallelState
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.layer import CheckpointTensor
from ziphius.layers.weights import LinearFormat
from ziphius.models.deepseek_v2 import DeepseekV2ForCausalLM
from ziphius.models.llama import LlamaForCausalLM


class CausalLM(Protocol):
    """One rank's part of a decoder-only model. Weights are uninitialised until loaded."""

    config: ModelConfig

    def forward(self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """Compute one step and write its tokens into `pool` -> [tokens, hidden_size], after the final norm.

        `attention.prepare(batch)` comes first, and is the caller's: it stays outside a captured graph.
        """

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of `forward`'s result [n, hidden_size] -> [n, vocab_size] float32, on every rank; in `out` if given."""

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor of the checkpoint that this rank takes. A name may come twice: both take it."""

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""


def make_model(
    config: ModelConfig,
    parallel: ParallelState,
    linear_format: LinearFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> CausalLM:
    """An uninitialised model of `config`'s architecture."""
    if config.architecture == "LlamaForCausalLM":
        return LlamaForCausalLM(config, parallel, linear_format, dtype, device)
    return DeepseekV2ForCausalLM(config, parallel, linear_format, dtype, device)
