"""Published configs and recorded hosts as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.quantization import Quantization
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host, read_host

DATA = Path(__file__).parent / "data"


@pytest.fixture
def data() -> Path:
    return DATA


@pytest.fixture
def v25() -> ModelConfig:
    return ModelConfig.from_file(DATA / "deepseek-v2.5-1210.json")


@pytest.fixture
def v25_rank() -> ModelConfig:
    """The shapes of one rank of V2.5 on four GPUs, as a model of its own: what was measured."""
    return ModelConfig.from_file(DATA / "deepseek-v2.5-one-rank-of-tp4.json")


@pytest.fixture
def v2_lite() -> ModelConfig:
    return ModelConfig.from_file(DATA / "deepseek-v2-lite.json")


@pytest.fixture
def llama3_8b() -> ModelConfig:
    return ModelConfig.from_file(DATA / "llama-3-8b.json")


@pytest.fixture
def source() -> Callable[..., ModelSource]:
    """A model whose weights are there, of the given config."""

    def make(config: ModelConfig, quantization: Quantization | None = None, **changes: object) -> ModelSource:
        stored = replace(config, quantization=quantization)
        values: dict[str, object] = {"given": "/models/M", "name": "M", "config": stored, "origin": "folder",
                                     "path": Path("/models/M"), "has_weights": True}  # fmt: skip
        return ModelSource(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def host() -> Callable[[str], Host]:
    def recorded(name: str) -> Host:
        return read_host(DATA / f"host-{name}.json")

    return recorded
