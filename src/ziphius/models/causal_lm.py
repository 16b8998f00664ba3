"""CausalLM: what the runner and the loader ask of a model; make_model makes one of any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from ziphius.attention.backend import AttentionBackend
from ziphius.attention.batch import ForwardBatch
from ziphius.checkpoint.architectures import architecture_of
from ziphius.checkpoint.config import ModelConfig
from ziphius.distributed import ParallelState
from ziphius.kv_cache.kv_pool import KVPool
from ziphius.layers.layer import CheckpointTensor
from ziphius.layers.weights import LinearFormat


class CausalLM(Protocol):
    """One rank's part of a decoder-only model. Weights are uninitialised until loaded."""

    config: ModelConfig

    def forward(self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """Compute one step and write its tokens into `pool` -> [tokens, hidden_size], after the final norm.

        The caller must call `attention.prepare(batch)` before: it is no part of a captured graph.
        """

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of `forward`'s result [n, hidden_size] -> [n, vocab_size] float32, on every rank; in `out` if given."""

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor of the checkpoint that this rank takes. A name comes once for each place that takes it."""

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""

    @property
    def own_threads(self) -> bool:
        """Whether the model computes on threads of its own; torch should then use only one."""

    def compile_kernels(self) -> None:
        """Compile the kernels that the first step would otherwise compile."""


def make_model(
    config: ModelConfig,
    parallel: ParallelState,
    linear_format: LinearFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> CausalLM:
    """An uninitialised model of `config`'s architecture; its class is what the architecture's row names."""
    module, name = architecture_of(config.architecture).model.split(":")
    model_class: Callable[..., CausalLM] = getattr(import_module(module), name)
    return model_class(config, parallel, linear_format, dtype, device)
