"""GGUFFile: a GGUF container's metadata, and where its tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
The reader of the `gguf` package is not used for this part: it spends seconds on a vocabulary (one numpy view for each
string), and it does not notice a truncated file. gguf.py uses the package's tables and dequantizers.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ziphius.errors import CheckpointError, UnsupportedModel

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct code."""

_MIN_STRING, _MIN_PAIR, _MIN_TENSOR = 8, 13, 32
"""The fewest bytes that one string, one key with its value, and one tensor's entry take. A count of them that cannot
fit in the file is refused before a loop over them starts."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's place in the file."""

    name: str
    shape: tuple[int, ...]
    """Row-major: the reverse of what the file writes."""
    type_id: int
    """GGML's quantization type."""
    offset: int
    """From the start of the file, in bytes."""


class GGUFFile:
    """Typed look-ups in one file's metadata, and the list of its tensors. CheckpointError for a key of another type."""

    def __init__(self, path: Path, metadata: Mapping[str, Value], tensors: tuple[TensorInfo, ...]) -> None:
        """Use `open`."""
        self.path = path
        self.tensors = tensors
        self._metadata = metadata

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """CheckpointError when the file cannot be read, is no GGUF, or ends within its header."""
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
        except OSError as e:
            raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
        except ValueError as e:  # of mmap: an empty file
            raise CheckpointError(f"{path} is empty") from e

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def text(self, key: str, default: str | None = None) -> str:
        value = self._metadata.get(key, default)
        if not isinstance(value, str):
            raise self._fault(key, "a string")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._fault(key, "true or false")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._fault(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._fault(key, "a number")
        return float(value)

    def texts(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        texts = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
        if not isinstance(value, list) or len(texts) != len(value):
            raise self._fault(key, "a list of strings")
        return texts

    def integers(self, key: str) -> list[int]:
        value = self._metadata.get(key)
        integers = [item for item in value if isinstance(item, int)] if isinstance(value, list) else []
        if not isinstance(value, list) or len(integers) != len(value):
            raise self._fault(key, "a list of integers")
        return integers

    def _fault(self, key: str, wanted: str) -> CheckpointError:
        if key not in self._metadata:
            return CheckpointError(f"{self.path}: the key {key} is missing")
        return CheckpointError(f"{self.path}: {key} must be {wanted}")


class _Cursor:
    """A position in the header. It moves forward only, and raises CheckpointError at the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def number(self, code: str) -> int | float | bool:
        form = struct.Struct("<" + code)
        self.need(form.size)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value  # type: ignore[no-any-return]

    def integer(self, code: str) -> int:
        return int(self.number(code))

    def text(self) -> str:
        length = self.integer("Q")
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "surrogateescape")

    def need(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise CheckpointError(f"{self.path} is truncated or damaged: it ends within its header")

    def value(self, kind: int) -> Value:
        return self.array() if kind == _ARRAY else self.scalar(kind)

    def scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self.text()
        if kind not in _NUMBERS:
            raise CheckpointError(f"{self.path} is damaged: value type {kind} at byte {self.at} does not exist")
        return self.number(_NUMBERS[kind])

    def array(self) -> list[Scalar]:
        kind, count = self.integer("I"), self.integer("Q")
        if kind in _NUMBERS:
            self.need(count * struct.calcsize(_NUMBERS[kind]))
            form = struct.Struct(f"<{count}{_NUMBERS[kind]}")
            values = list(form.unpack_from(self.data, self.at))
            self.at += form.size
            return values
        self.need(count * _MIN_STRING)
        return [self.scalar(kind) for _ in range(count)]


def _parse(path: Path, data: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(path, data)
    if data[:4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file")
    cursor.at = 4
    version = cursor.integer("I")
    if version not in (2, 3):
        raise UnsupportedModel(f"{path} has GGUF version {version}; versions 2 and 3, little-endian, are supported")
    tensor_count, pair_count = cursor.integer("Q"), cursor.integer("Q")
    cursor.need(pair_count * _MIN_PAIR)
    metadata: dict[str, Value] = {}
    for _ in range(pair_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.integer("I"))
    cursor.need(tensor_count * _MIN_TENSOR)
    found = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise CheckpointError(f"{path}: general.alignment must be a positive integer, not {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = tuple(TensorInfo(name, shape, kind, start + offset) for name, shape, kind, offset in found)
    return GGUFFile(path, metadata, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.text(), cursor.integer("I")
    cursor.need(dimensions * 8)
    shape = tuple(cursor.integer("Q") for _ in range(dimensions))
    if 0 in shape:
        raise CheckpointError(f"{cursor.path} is damaged: {name} has no elements (shape {shape[::-1]})")
    return name, shape[::-1], cursor.integer("I"), cursor.integer("Q")
