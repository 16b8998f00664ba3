"""fill_dummy: random weights, drawn in place on the device that holds them; it reads no checkpoint.

For measurements and tests: speed does not care what the weights are, as long as they are neither equal nor zero.
"""

from __future__ import annotations

import torch

from ziphius.layers.layer import Layer

_STD = 0.02
"""Hugging Face's initializer_range of these models."""


def fill_dummy(model: Layer, seed: int = 0) -> None:
    """Matrices get normal values of standard deviation 0.02, vectors (norms, biases) values around 1.

    118 GB take a few seconds on a GPU. Formats with integer weights get random integers, and scales as vectors.
    """
    done: set[int] = set()
    for tensor in model.tensors():
        if tensor.data_ptr() in done:
            continue
        done.add(tensor.data_ptr())
        generator = torch.Generator(tensor.device).manual_seed(seed + len(done))
        if not tensor.is_floating_point():
            tensor.random_(-127, 128, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(1.0, _STD, generator=generator)
        else:
            tensor.normal_(0.0, _STD, generator=generator)
