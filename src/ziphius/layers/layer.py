"""Layer and CheckpointTensor: how a layer holds tensors and what it takes from a checkpoint; it computes nothing."""

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

    The layers state which tensors they take, so the loader needs no table of names: what is in the checkpoint and in
    no layer's list is left over, what is in a list and not in the checkpoint is missing.
    """

    name: str
    """As in the checkpoint, Hugging Face's."""
    shape: tuple[int, ...]
    """Of the whole tensor in the checkpoint."""
    shard: Shard | None
    """What this rank keeps; None: all of it."""
    load: Callable[[Tensor], None]
    """Takes this rank's part, in any float type, on the CPU; copies or converts it. Call it from one thread."""


class Layer:
    """Base of everything that holds weights: attributes are tensors, layers, or lists of layers.

    Not an nn.Module: nothing here trains, and a module's attribute look-up would cost a CPU decode step several
    percent. Weights are created uninitialised; they mean something once every `CheckpointTensor` is loaded.
    """

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held here or below; one that two layers share comes twice."""
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
