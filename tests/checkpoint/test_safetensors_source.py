"""Reading safetensors folders: types, shards, order; and every way a file can be broken."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ziphius.checkpoint.safetensors_source import SafetensorsSource
from ziphius.errors import CheckpointError, UnsupportedModel

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.linspace(-2, 2, 5).bfloat16(),
    "c": torch.ones(2, 1, 4, dtype=torch.float16),
    "empty": torch.empty(0, 3),
    "double": torch.tensor([1e300], dtype=torch.float64),
}


def write_shards(folder: Path, tensors: dict[str, Tensor] = TENSORS) -> Path:
    weight_map = {}
    for i, name in enumerate(tensors):
        file = f"model-{i % 2}.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def check(source: SafetensorsSource) -> None:
    read = dict(source.tensors())
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    stored = source.stored()
    assert {name: (found.shape, found.nbytes()) for name, found in stored.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_one_file(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name, metadata={"format": "pt"})
    check(SafetensorsSource(tmp_path))


def test_shards(tmp_path: Path) -> None:
    check(SafetensorsSource(write_shards(tmp_path)))


def test_tensors_come_in_the_files_order(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1]}
    header = {"z": entry | {"data_offsets": [4, 8]}, "y": entry | {"data_offsets": [0, 4]}}
    write_raw(tmp_path / "model.safetensors", header, struct.pack("<ff", 1.0, 2.0))
    assert [(n, float(t)) for n, t in SafetensorsSource(tmp_path, threads=1).tensors()] == [("y", 1.0), ("z", 2.0)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_some_rows_of_some_tensors(tmp_path: Path, threads: int) -> None:
    tensors = {f"model.layers.{i}.w": torch.randn(8, 3, 2) for i in range(20)} | TENSORS
    source = SafetensorsSource(write_shards(tmp_path, tensors), threads)
    rows = {f"model.layers.{i}.w": (i % 5, 5 + i % 3) for i in range(20)} | {"a": None, "b": (1, 1)}
    read = dict(source.tensors(rows))
    assert read.keys() == rows.keys()
    for name, part in rows.items():
        assert torch.equal(read[name], tensors[name] if part is None else tensors[name][slice(*part)]), name


def test_a_reader_that_stops_early_leaves_no_threads(tmp_path: Path) -> None:
    source = SafetensorsSource(write_shards(tmp_path, {f"w{i}": torch.ones(1000) for i in range(50)}), 3)
    tensors = source.tensors()
    next(tensors)
    assert [t for t in threading.enumerate() if t.name == "read-ahead"]
    tensors.close()
    assert not [t for t in threading.enumerate() if t.name == "read-ahead"]


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": TENSORS["a"], name: TENSORS["b"]}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "x": "x.safetensors", "y": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has a twice, in x\.safetensors and y\.safetensors"):
        SafetensorsSource(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*index.json \(.*: none\)"):
        SafetensorsSource(tmp_path)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file(TENSORS, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x\.safetensors, y\.safetensors"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_named_before_anything_is_read(tmp_path: Path, keep: int) -> None:
    path = write_shards(tmp_path) / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is (truncated|malformed)"):
        SafetensorsSource(tmp_path)


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    source = SafetensorsSource(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="it ends within"):
        list(source.tensors())


def test_a_file_gone_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    source = SafetensorsSource(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        list(source.tensors())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "model-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the file model-0\.safetensors, which is missing"):
        SafetensorsSource(tmp_path)


def test_a_tensor_that_only_the_index_has(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "m.safetensors")
    index = {"weight_map": {"a": "m.safetensors", "lost": "m.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"promises lost in m\.safetensors"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}'])
def test_a_broken_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]},
    ],
)
def test_a_broken_header_names_the_tensor(tmp_path: Path, entry: object) -> None:
    write_raw(tmp_path / "model.safetensors", {"bad": entry}, bytes(8))
    with pytest.raises(CheckpointError, match="bad"):
        SafetensorsSource(tmp_path)


def test_a_header_that_is_no_object(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", [1])
    with pytest.raises(CheckpointError, match="malformed"):
        SafetensorsSource(tmp_path)


def test_an_integer_tensor_is_not_supported(tmp_path: Path) -> None:
    save_file({"packed": torch.ones(3, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="packed is I32"):
        SafetensorsSource(tmp_path)
