"""Bringing up a rank: types, context length and pool, and what is said when it cannot be."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ziphius.checkpoint.checkpoint import open_checkpoint
from ziphius.checkpoint.config import ModelConfig
from ziphius.config import ServeConfig
from ziphius.engine import loading, rank_builder
from ziphius.engine.loading import LoadedRank, load_rank
from ziphius.engine.precision import resolve_precision
from ziphius.errors import CheckpointError, ConfigError, DoesNotFit
from ziphius.ipc.messages import LoadProgress
from ziphius.planner.admission import RankMemory, admit_pool

Load = Callable[..., LoadedRank]


@pytest.mark.parametrize(
    ("options", "dtype", "weights_format"),
    [
        ({}, torch.float32, "int8"),
        ({"dtype": "float32"}, torch.float32, "fp32"),
        ({"dtype": "bfloat16"}, torch.bfloat16, "bf16"),
        ({"weights_format": "fp32"}, torch.float32, "fp32"),
        ({"dtype": "float32", "weights_format": "int8"}, torch.float32, "int8"),
    ],
)
def test_auto_is_int8_on_a_cpu_only_where_nothing_was_asked(
    options: dict[str, Any], dtype: torch.dtype, weights_format: str
) -> None:
    precision = resolve_precision(ServeConfig(device="cpu", **options))
    assert (precision.device.type, precision.dtype, precision.weights_format) == ("cpu", dtype, weights_format)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="--device cpu"):
        resolve_precision(ServeConfig(device="cuda"))
    assert resolve_precision(ServeConfig()).device.type == "cpu"


@pytest.fixture
def model(llama: Any) -> ModelConfig:
    """512 positions, 256 bytes a token in float32."""
    return ModelConfig.from_folder(llama.folder)


def plan(model: ModelConfig, free: int, **options: Any) -> tuple[int, int]:
    settings: dict[str, Any] = {"page_size": 4, "max_running_requests": 8} | options
    memory = RankMemory(device="cpu", dtype="float32", free_bytes=free, free_before_bytes=free)
    fitted = admit_pool(ServeConfig(**settings), model, memory)
    context, size = fitted.context_length, fitted.size
    return context, size.tokens


def test_the_pool_holds_every_context_where_memory_allows(model: ModelConfig) -> None:
    assert plan(model, 1 << 30) == (512, 512 * 8)
    assert plan(model, 1 << 30, context_length=100) == (100, 100 * 8)


def test_the_context_shrinks_to_what_the_pool_can_hold(model: ModelConfig) -> None:
    long = replace(model, max_position_embeddings=100_000)
    context, tokens = plan(long, 1 << 20)
    assert 1024 < context < 4096
    assert tokens == context
    assert tokens * 256 <= 1 << 20
    assert plan(model, 1 << 30, max_total_tokens=202) == (200, 200)


def test_a_context_of_no_use_is_refused(model: ModelConfig) -> None:
    with pytest.raises(DoesNotFit, match="--context-length"):
        plan(model, 64 * 1024)


def test_more_context_than_there_is_room_for_is_refused_with_numbers(model: ModelConfig) -> None:
    with pytest.raises(DoesNotFit, match=r"--context-length \d+"):
        plan(model, 64 * 1024, context_length=512)
    with pytest.raises(DoesNotFit, match=r"--context-length 200 or less, or --max-total-tokens 300 or more"):
        plan(model, 1 << 30, context_length=300, max_total_tokens=200)
    with pytest.raises(DoesNotFit, match="--max-total-tokens"):
        plan(model, 64 * 1024, max_total_tokens=1 << 20)
    with pytest.raises(DoesNotFit):
        plan(model, 100)


def test_more_context_than_the_model_has_is_refused(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="513 is beyond the 512"):
        plan(model, 1 << 30, context_length=513)


def test_ready_tells_what_was_measured(tiny: Any, load: Load) -> None:
    loaded = load(tiny.folder)
    ready = loaded.ready
    assert ready.kv_tokens == 4096
    assert ready.context_length == tiny.oracle.config.max_position_embeddings
    assert (
        ready.weight_bytes
        == ready.predicted_weight_bytes
        == sum(parameter.nbytes for parameter in tiny.oracle.parameters())
    )
    assert ready.vocab_size == 128
    assert ready.load_seconds > 0


@pytest.mark.parametrize("options", [{"dtype": "auto"}, {"dtype": "bfloat16"}, {"max_running_requests": 1}])
def test_other_types_and_sizes_come_up_too(tiny: Any, load: Load, options: dict[str, Any]) -> None:
    assert load(tiny.folder, **options).ready.kv_tokens == 4096


def test_a_context_of_a_few_tokens_still_warms_up(llama: Any, load: Load) -> None:
    for context_length in (1, 2, 3):
        assert load(llama.folder, context_length=context_length).ready.context_length == context_length


def test_progress_names_the_phases_and_counts_bytes(llama: Any) -> None:
    told: list[LoadProgress] = []
    config = ServeConfig(dtype="float32", max_total_tokens=512)
    load_rank(config, open_checkpoint(str(llama.folder), llama.folder), told.append)
    phases = list(dict.fromkeys(progress.phase for progress in told))
    assert phases == ["loading", "cache", "warm-up"]
    loading_bytes = [progress for progress in told if progress.phase == "loading"]
    assert loading_bytes[-1].done == loading_bytes[-1].total > 0
    assert {progress.unit for progress in loading_bytes} == {"bytes"}


def test_weights_larger_than_memory_are_refused_before_they_are_read(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    checkpoint = replace(open_checkpoint(str(llama.folder), llama.folder), path=Path("nowhere"))
    with pytest.raises(DoesNotFit, match=r"need .* as fp32, but .* are free"):
        load_rank(ServeConfig(dtype="float32"), checkpoint, lambda progress: None)


def test_a_checkpoint_of_another_shape_is_refused(llama: Any, tmp_path: Path) -> None:
    for file in llama.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing.*model\.layers\.2"):
        load_rank(ServeConfig(dtype="float32"), open_checkpoint(str(tmp_path), tmp_path), lambda progress: None)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_running_out_of_memory_says_what_to_do(
    llama: Any, load: Load, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(rank_builder, "KVPool", fail)
    with pytest.raises(DoesNotFit, match=r"while the KV cache was made.*--max-total-tokens"):
        load(llama.folder)
