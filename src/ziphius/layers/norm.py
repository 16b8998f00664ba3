"""RMSNorm, with the residual addition in front of it. Its bodies are in ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ziphius.layers.context import LayerContext
from ziphius.layers.layer import CheckpointTensor, Layer


class RMSNorm(Layer):
    """Root mean square normalisation of the last dimension. Every rank has the whole weight."""

    def __init__(self, size: int, eps: float, context: LayerContext) -> None:
        self.weight = torch.empty(size, dtype=context.dtype, device=context.device)
        self.eps = eps
        self._ops = context.ops

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without a residual, (norm(x), x). Both inputs may be overwritten."""
        if residual is None:
            return self(x), x
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps)

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        yield CheckpointTensor(f"{name}.weight", tuple(self.weight.shape), None, self._load)

    def _load(self, weight: Tensor) -> None:
        self.weight.copy_(weight)
