"""fill_dummy: random weights for measurements and tests, drawn in place on the device that holds them.

The values do not change the speed, as long as they are neither equal nor zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ziphius.layers.layer import Layer
from ziphius.layers.weights import ExpertWeights, LinearWeight

_STD = 0.02
"""Hugging Face's initializer_range of these models."""


def fill_dummy(model: Layer, seed: int = 0) -> None:
    """Matrices of every format get values of standard deviation 0.02; vectors (norms, biases) get values around 1.

    118 GB take a few seconds on a GPU.
    """
    done: set[int] = set()
    for part in _parts(model):
        tensors = [part] if isinstance(part, Tensor) else list(part.tensors())
        if tensors[0].data_ptr() in done:  # a head tied to the embedding
            continue
        done.add(tensors[0].data_ptr())
        generator = torch.Generator(tensors[0].device).manual_seed(seed + len(done))
        if not isinstance(part, Tensor):
            part.fill_random(_STD, generator)
        else:
            part.normal_(1.0 if part.dim() == 1 else 0.0, _STD, generator=generator)


def _parts(value: Any) -> Iterator[Tensor | LinearWeight | ExpertWeights]:
    """Every weight with a format in `value` and below it, and every tensor that is not part of such a weight."""
    if isinstance(value, (Tensor, LinearWeight, ExpertWeights)):
        yield value
    elif isinstance(value, Layer):
        for held in vars(value).values():
            yield from _parts(held)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
