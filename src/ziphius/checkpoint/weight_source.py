"""WeightSource: what the loader asks of a checkpoint's weights, whatever their format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Rows = tuple[int, int]
"""(start, stop) in a tensor's first dimension; stop is not included."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its checkpoint describes it, before it is read."""

    shape: tuple[int, ...]
    itemsize: int
    """Bytes of one value when it is yielded."""
    file: str
    """The name of the file that holds it."""

    def nbytes(self, rows: Rows | None = None) -> int:
        """Bytes of the whole tensor, or of some rows."""
        shape = self.shape if rows is None else (rows[1] - rows[0], *self.shape[1:])
        return prod(shape) * self.itemsize


class WeightSource(Protocol):
    """Tensors under Hugging Face's names."""

    def stored(self) -> Mapping[str, StoredTensor]:
        """Every tensor, by name; no weights are read for it."""

    def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Tensor | NDArray[Any]]]:
        """(name, tensor) on the CPU for each name in `rows`, once, in any order: whole (None) or those rows of it.

        Without `rows`, every tensor. The source lets go of a tensor when it is asked for the next.
        """
