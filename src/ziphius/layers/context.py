"""LayerContext: what every layer of one rank's model is built with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ziphius.distributed import ParallelState
from ziphius.layers.ops import LayerOps
from ziphius.layers.weights import LinearFormat


@dataclass(frozen=True, slots=True)
class LayerContext:
    """A model hands it to each of its layers."""

    parallel: ParallelState
    linear_format: LinearFormat
    ops: LayerOps
    dtype: torch.dtype
    """Of activations, embedding, norms and biases."""
    device: torch.device
