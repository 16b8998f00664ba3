"""WeightSource: what the loader asks of a checkpoint's weights, whatever their format; it reads nothing itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Rows = tuple[int, int]
"""Of a tensor's first dimension, from the first to before the second."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its checkpoint describes it, before it is read."""

    shape: tuple[int, ...]
    itemsize: int
    """Bytes of a value as it is handed over."""
    file: str
    """The name of the file that has it."""

    def nbytes(self, rows: Rows | None = None) -> int:
        """Of all of it, or of some rows."""
        shape = self.shape if rows is None else (rows[1] - rows[0], *self.shape[1:])
        return prod(shape) * self.itemsize


class WeightSource(Protocol):
    """Tensors under Hugging Face's names."""

    def stored(self) -> Mapping[str, StoredTensor]:
        """Every tensor that there is, by name; known without reading the weights."""

    def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Tensor | NDArray[Any]]]:
        """The tensors that `rows` names, each once, whole (None) or some rows of it, in any order, on the CPU.

        Without `rows`, all of them. The source lets go of one when it is asked for the next.
        """
