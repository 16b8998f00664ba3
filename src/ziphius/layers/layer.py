"""Layer and CheckpointTensor: how a layer holds tensors, and what it takes from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a checkpoint tensor that this rank keeps: `length` entries of dimension `dim` from `start`."""

    dim: int
    start: int
    length: int

    def of(self, full: Tensor) -> Tensor:
        """A view of this part of `full`."""
        return full.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of the checkpoint that a layer takes, and how.

    The layers state which tensors they take, so the loader needs no table of names. A tensor of the checkpoint that no
    layer takes is left over; a tensor that a layer takes and the checkpoint lacks is missing.
    """

    name: str
    """As in the checkpoint, Hugging Face's."""
    shape: tuple[int, ...]
    """Of the whole tensor in the checkpoint."""
    shard: Shard | None
    """What this rank keeps; None: all of it."""
    load: Callable[[Tensor], None]
    """Copies or converts this rank's part, which is on the CPU, in any float type. Call it from one thread."""


class Layer:
    """Base of everything that holds weights: attributes are tensors, layers, or lists of layers.

    It is not an nn.Module: nothing here is trained, and a module's attribute look-up would cost a CPU decode step
    several percent. Weights are created uninitialised, and are valid once every `CheckpointTensor` is loaded.
    """

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held here or below. A tensor that two layers share comes twice."""
        for value in vars(self).values():
            yield from _tensors(value)

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct tensors held here and below."""
        return sum({id(t): t.nbytes for t in self.tensors()}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Layer):
        yield from value.tensors()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
