"""SafetensorsSource: the tensors of a Hugging Face folder, whole or by rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ziphius.checkpoint.hub_cache import INDEX_FILE, SINGLE_FILE, weight_map_of
from ziphius.checkpoint.read_ahead import Piece, read_ahead
from ziphius.checkpoint.weight_source import Rows, StoredTensor
from ziphius.errors import CheckpointError, UnsupportedModel

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100 * 1024 * 1024
"""The format's own limit."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_MOST_AHEAD = 1 << 30


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in a file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    entries: tuple[_Entry, ...]
    """In the order of their offsets."""


class SafetensorsSource:
    """A WeightSource over model.safetensors, or over the shards that model.safetensors.index.json names.

    All headers are read and checked here: CheckpointError names a missing, truncated or malformed file, a tensor that
    the index promises and no file has, and one that two files have; UnsupportedModel a tensor that is not floating
    point.
    """

    def __init__(self, folder: Path, threads: int = 4) -> None:
        """`threads` read the files."""
        index = folder / INDEX_FILE
        self._files = _indexed_files(folder, index) if index.is_file() else [_read_header(_single_file(folder))]
        self._threads = threads
        self._entries: dict[str, _Entry] = {}
        for file in self._files:
            for entry in file.entries:
                if entry.name in self._entries:
                    other = self._entries[entry.name].path.name
                    raise CheckpointError(f"{folder} has {entry.name} twice, in {other} and {file.path.name}")
                self._entries[entry.name] = entry

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor, by name."""
        return {e.name: StoredTensor(e.shape, e.dtype.itemsize, e.path.name) for e in self._entries.values()}

    def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor in the file's type) in about the files' order. No tensor is kept after it was yielded."""
        wanted = dict.fromkeys(self._entries) if rows is None else rows
        pieces = [_piece(entry, wanted[entry.name]) for entry in self._entries.values() if entry.name in wanted]
        for piece, data in read_ahead(pieces, self._threads, _budget(pieces)):
            entry, part = self._entries[piece.name], wanted[piece.name]
            shape = entry.shape if part is None else (part[1] - part[0], *entry.shape[1:])
            tensor = data.view(entry.dtype).view(shape)
            del data
            yield piece.name, tensor
            # While the next piece is read, only the caller may hold this one
            del tensor


def _piece(entry: _Entry, rows: Rows | None) -> Piece:
    if rows is None:
        return Piece(entry.name, entry.path, entry.offset, entry.nbytes)
    row_bytes = prod(entry.shape[1:]) * entry.dtype.itemsize
    start, stop = rows
    return Piece(entry.name, entry.path, entry.offset + start * row_bytes, (stop - start) * row_bytes)


def _budget(pieces: Sequence[Piece]) -> int:
    """Bytes to read ahead: the size of the largest layer, but at most _MOST_AHEAD."""
    layers: Counter[str] = Counter()
    for piece in pieces:
        found = _LAYER.search(piece.name)
        layers[found[1] if found else ""] += piece.nbytes
    del layers[""]
    return min(max(layers.values(), default=0), _MOST_AHEAD)


def _single_file(folder: Path) -> Path:
    path = folder / SINGLE_FILE
    if path.is_file():
        return path
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    found = ", ".join(p.name for p in others[:3]) or "none"
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE} (safetensors files found: {found})")


def _indexed_files(folder: Path, index: Path) -> list[_File]:
    weight_map = weight_map_of(index)
    files: list[_File] = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r}, which is not in its folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index} names the file {name}, which is missing")
        files.append(_read_header(folder / name))
    there = {entry.name for file in files for entry in file.entries}
    absent = [name for name in weight_map if name not in there]
    if absent:
        raise CheckpointError(f"{index} promises {absent[0]} in {weight_map[absent[0]]}, which does not have it")
    return files


def _read_header(path: Path) -> _File:
    """The header of one file: 8 bytes of little-endian length, then JSON, then the data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(f"{path} is truncated or is no safetensors file: {size} bytes")
            header = _json_object(path, file.read(length))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    entries = [_entry(path, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"]
    end = max((entry.offset + entry.nbytes for entry in entries), default=0)
    if end > size:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes of {end}")
    return _File(path, tuple(sorted(entries, key=lambda entry: entry.offset)))


def _entry(path: Path, name: str, value: Any, data_start: int) -> _Entry:
    try:
        dtype_name, shape, (begin, end) = str(value["dtype"]), tuple(map(int, value["shape"])), value["data_offsets"]
        begin, end = int(begin), int(end)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the header's entry of {name} is malformed") from None
    if dtype_name not in _TYPES:
        raise UnsupportedModel(f"{path}: {name} is {dtype_name}; weights of {', '.join(_TYPES)} can be read")
    entry = _Entry(name, path, _TYPES[dtype_name], shape, data_start + begin)
    if begin < 0 or any(n < 0 for n in shape) or end - begin != entry.nbytes:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, its shape {list(shape)} needs {entry.nbytes}")
    return entry


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as e:
        raise CheckpointError(f"{path} is malformed: its JSON cannot be read: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is malformed: it must hold a JSON object")
    return data
