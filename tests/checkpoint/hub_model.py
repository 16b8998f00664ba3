"""A small model as the hub has it, and looks into the cache it is fetched to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import StandInHub

from ziphius.checkpoint.hub import fetch_snapshot
from ziphius.checkpoint.hub_cache import HubCache
from ziphius.checkpoint.hub_settings import HubSettings
from ziphius.errors import ModelError

MODEL = "deepseek-ai/tiny"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SHARD_BYTES = 3_000_000


def files(**changes: bytes | None) -> dict[str, bytes]:
    """A model's files as the hub's repositories have them, with others around."""
    weight_map = {f"w{i}": shard for i, shard in enumerate(SHARDS)}
    made: dict[str, bytes | None] = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b"{}",
        "generation_config.json": b'{"eos_token_id": 2}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        **{shard: bytes([i]) * SHARD_BYTES for i, shard in enumerate(SHARDS)},
        "pytorch_model.bin": b"x" * 1000,
        "pytorch_model.bin.index.json": b"{}",
        "consolidated.safetensors": b"y" * 1000,
        "original/consolidated.00.pth": b"z" * 1000,
        "onnx/config.json": b"{}",
        "README.md": b"# tiny",
    }
    return {name: data for name, data in {**made, **changes}.items() if data is not None}


def names(snapshot: Path) -> list[str]:
    return sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if not path.is_dir())


def blobs(settings: HubSettings) -> list[Path]:
    return sorted((HubCache(settings.cache, MODEL).folder / "blobs").iterdir())


def part_of(hub: StandInHub, settings: HubSettings, name: str) -> Path:
    repository = hub.repositories[MODEL]
    etag = repository.commits[repository.revisions["main"]][name].etag
    return HubCache(settings.cache, MODEL).part(etag)


def fails(settings: HubSettings, error: type[ModelError], **options: Any) -> str:
    with pytest.raises(error) as caught:
        fetch_snapshot(MODEL, settings, **options)
    assert "\n" not in caught.value.message
    return caught.value.message
