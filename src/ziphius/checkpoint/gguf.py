"""A GGUF file as a model: its ModelConfig, and its weights under Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from io import BufferedReader
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from ziphius.checkpoint.architectures import Architecture, GGUFLayout, gguf_architecture
from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.gguf_file import GGUFFile, TensorInfo
from ziphius.checkpoint.gguf_tokenizer import eos_token_ids
from ziphius.checkpoint.weight_source import Rows, StoredTensor
from ziphius.errors import CheckpointError, UnsupportedModel

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BOS = "tokenizer.ggml.bos_token_id"
_TENSOR_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def model_config(file: GGUFFile) -> ModelConfig:
    """The config that the original checkpoint's config.json would give.

    UnsupportedModel for an architecture whose GGUF files are not known, for experts and for scaled rotary embeddings.
    """
    architecture, layout = _architecture(file)
    prefix = layout.name
    if file.integer(f"{prefix}.expert_count", 0):
        raise UnsupportedModel(f"{file.path}: a mixture of experts in GGUF is not supported")
    names = {tensor.name for tensor in file.tensors}
    scaling = file.text(f"{prefix}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names:
        raise UnsupportedModel(f"{file.path}: scaled rotary embeddings in GGUF are not supported")
    hidden, heads = file.integer(f"{prefix}.embedding_length"), file.integer(f"{prefix}.attention.head_count")
    head_dim = file.integer(f"{prefix}.attention.key_length", hidden // max(heads, 1))
    if file.integer(f"{prefix}.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{file.path}: rotary embeddings on a part of a head are not supported")
    return ModelConfig.from_hf(
        {
            "architectures": [architecture.name],
            "model_type": architecture.model_type,
            "vocab_size": _vocab_size(file),
            "hidden_size": hidden,
            "num_hidden_layers": file.integer(f"{prefix}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": file.integer(f"{prefix}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": file.integer(f"{prefix}.feed_forward_length"),
            "rms_norm_eps": file.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
            "rope_theta": file.number(f"{prefix}.rope.freq_base", 10000.0),
            "max_position_embeddings": file.integer(f"{prefix}.context_length"),
            "tie_word_embeddings": "output.weight" not in names,
            "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_up.bias" in names,
            "bos_token_id": file.integer(_BOS) if _BOS in file else None,
            "eos_token_id": list(eos_token_ids(file)),
            "torch_dtype": "float32",
        }
    )


def _architecture(file: GGUFFile) -> tuple[Architecture, GGUFLayout]:
    try:
        return gguf_architecture(file.text("general.architecture"))
    except UnsupportedModel as e:
        raise UnsupportedModel(f"{file.path}: {e.message}") from None


def _vocab_size(file: GGUFFile) -> int:
    """The embedding's rows: the one number that the weights themselves prove."""
    for tensor in file.tensors:
        if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
            return tensor.shape[0]
    raise CheckpointError(f"{file.path}: the tensor token_embd.weight is missing")


class GGUFSource:
    """The weights as float32, one tensor at a time (a WeightSource). Holds no more than one tensor in memory.

    llama.cpp's converter reorders the rows of the q and k projections of some architectures, from Hugging Face's
    halves [x0 .. xd/2, y0 .. yd/2] of a rotary head to pairs [x0, y0, x1, y1 ..]; they are put back here.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        """CheckpointError when the file is too short for its tensors; UnsupportedModel for an unknown type."""
        self._file = file
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        self._in_pairs = heads if _architecture(file)[1].rotary_pairs else {}
        """Heads of each projection whose rows are reordered."""
        self._sizes = [_stored_size(file, tensor) for tensor in file.tensors]
        self._check_length()

    @classmethod
    def open(cls, path: Path) -> GGUFSource:
        file = GGUFFile.open(path)
        return cls(file, model_config(file))

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor, by Hugging Face's name. CheckpointError for one that has none, or for a name given twice."""
        found: dict[str, StoredTensor] = {}
        for tensor in self._file.tensors:
            name = hugging_face_name(self._file, tensor.name)
            if name in found:
                raise CheckpointError(f"{self._file.path} has {tensor.name} twice")
            found[name] = StoredTensor(tensor.shape, 4, self._file.path.name)
        return found

    def tensors(self, rows: Mapping[str, Rows | None] | None = None) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(Hugging Face's name, array [out, in] or [n]) in the file's order. The arrays are the caller's to keep."""
        try:
            with self._file.path.open("rb") as data:
                for tensor, size in zip(self._file.tensors, self._sizes, strict=True):
                    name = hugging_face_name(self._file, tensor.name)
                    if rows is None or name in rows:
                        part = None if rows is None else rows[name]
                        yield name, self._array(data, tensor, size)[slice(*part) if part else slice(None)]
        except OSError as e:
            raise CheckpointError(f"cannot read {self._file.path}: {e.strerror}") from e

    def _array(self, data: BufferedReader, tensor: TensorInfo, size: int) -> NDArray[np.float32]:
        raw = np.empty(size, np.uint8)
        data.seek(tensor.offset)
        if data.readinto(raw.data) != size:
            raise CheckpointError(f"{self._file.path} is truncated: it ends within {tensor.name}")
        rows = raw.reshape(*tensor.shape[:-1], -1)
        if tensor.type_id in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            rows = rows.view(np.float32 if tensor.type_id == GGMLQuantizationType.F32 else np.float16)
        array = np.ascontiguousarray(dequantize(rows, GGMLQuantizationType(tensor.type_id)), dtype=np.float32)
        heads = self._in_pairs
        part = tensor.name.split(".")[-2]
        if part not in heads:
            return array
        if tensor.shape[0] % (2 * heads[part]):
            raise CheckpointError(
                f"{self._file.path}: {tensor.name} has {tensor.shape[0]} rows, not {heads[part]} heads"
            )
        return _in_halves(array, heads[part])

    def _check_length(self) -> None:
        actual = self._file.path.stat().st_size
        ends = [tensor.offset + size for tensor, size in zip(self._file.tensors, self._sizes, strict=True)]
        if ends and max(ends) > actual:
            raise CheckpointError(f"{self._file.path} is truncated: it has {actual} bytes of {max(ends)}")


def hugging_face_name(file: GGUFFile, name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight. CheckpointError for a name with no equal."""
    match = _TENSOR_NAME.fullmatch(name)
    if match:
        layer, part, kind = match.groups()
        if layer is None and part in _OUTER_NAMES:
            return f"{_OUTER_NAMES[part]}.{kind}"
        if layer is not None and part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    raise CheckpointError(f"{file.path}: the tensor {name} belongs to nothing in this architecture")


def _stored_size(file: GGUFFile, tensor: TensorInfo) -> int:
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    except (KeyError, ValueError):
        raise UnsupportedModel(f"{file.path}: {tensor.name} has the unknown type {tensor.type_id}") from None
    if not tensor.shape or tensor.shape[-1] % block:
        raise CheckpointError(f"{file.path}: {tensor.name} has the shape {tensor.shape}, not in blocks of {block}")
    return prod(tensor.shape) // block * block_bytes


def _in_halves(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from pairs back to halves: the inverse of `permute` in llama.cpp's convert_hf_to_gguf.py."""
    paired = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)
