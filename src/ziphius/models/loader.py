"""load_model: a checkpoint's tensors, one at a time, into a model, for every file format and architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ziphius.checkpoint.config import ModelConfig
from ziphius.checkpoint.rate import RateMeter
from ziphius.checkpoint.weight_source import Rows, StoredTensor, WeightSource
from ziphius.distributed import ParallelState
from ziphius.errors import CheckpointError
from ziphius.ipc.messages import LoadProgress
from ziphius.layers.layer import CheckpointTensor, Layer
from ziphius.layers.select import make_linear_format
from ziphius.models.causal_lm import CausalLM, make_model
from ziphius.models.dummy import fill_dummy

OnProgress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all)."""
Report = Callable[[LoadProgress], None]

_NAMES_IN_MESSAGE = 5

Wanted = Mapping[str, Sequence[CheckpointTensor]]
"""By name, the places in the model that take the tensor; there may be several."""


def load_model(
    config: ModelConfig,
    source: WeightSource,
    parallel: ParallelState,
    weights_format: str,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: OnProgress | None = None,
    *,
    report: Report | None = None,
    batch_invariant: bool = False,
) -> CausalLM:
    """One rank's model with its weights. Beside the model, memory holds only what the source has read ahead.

    Of a tensor that the ranks share by rows, only this rank's rows are read. `weights_format` is fp32, bf16, fp16,
    int8 or auto. `report` gets bytes, files and speed after every tensor. Before anything is read, CheckpointError
    names the tensors that are missing, left over or of the wrong shape. ConfigError names a dimension that the number
    of ranks does not divide.
    """
    linear_format = make_linear_format(weights_format, dtype, device, batch_invariant)
    model = make_model(config, parallel, linear_format, dtype, device)
    wanted = _by_name(model)
    stored = source.stored()
    _check(wanted, stored, config)
    rows = {name: _common_rows(takers) for name, takers in wanted.items()}
    progress = _Progress(rows, stored, on_progress, report)
    with torch.no_grad():
        for name, tensor in source.tensors(rows):
            if name not in progress.left:
                raise CheckpointError(f"the checkpoint has {name} twice")
            _load(_as_tensor(tensor), wanted[name], rows[name])
            # Without this the loop variable would keep the tensor in memory while the next one is read.
            del tensor
            progress.loaded(name)
    if progress.left:
        raise CheckpointError(f"the checkpoint did not yield {min(progress.left)}")
    return model


def make_dummy(
    config: ModelConfig,
    parallel: ParallelState,
    weights_format: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_invariant: bool = False,
) -> CausalLM:
    """As `load_model`, with random weights and no files. Every rank draws the same numbers, so replicas are equal."""
    linear_format = make_linear_format(weights_format, dtype, device, batch_invariant)
    model = make_model(config, parallel, linear_format, dtype, device)
    assert isinstance(model, Layer)
    fill_dummy(model)
    return model


def _by_name(model: CausalLM) -> dict[str, list[CheckpointTensor]]:
    wanted: dict[str, list[CheckpointTensor]] = {}
    for tensor in model.checkpoint_tensors():
        wanted.setdefault(tensor.name, []).append(tensor)
    return wanted


def _ignored(config: ModelConfig) -> tuple[str, ...]:
    """Endings of the names of tensors that checkpoints may hold and models do not read."""
    names = ("rotary_emb.inv_freq",)
    return (*names, "lm_head.weight") if config.tie_word_embeddings else names


def _check(wanted: Wanted, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    missing = [name for name in wanted if name not in stored]
    left_over = [name for name in stored if name not in wanted and not name.endswith(_ignored(config))]
    misshaped = [
        f"{name} ({list(stored[name].shape)} in {stored[name].file}, this config needs {list(taker.shape)})"
        for name, takers in wanted.items()
        for taker in takers[:1]
        if name in stored and stored[name].shape != taker.shape
    ]
    problems = [
        f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what}: {', '.join(names[:_NAMES_IN_MESSAGE])}"
        + (", ..." if len(names) > _NAMES_IN_MESSAGE else "")
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not match its config ({config.architecture}): {'; '.join(problems)}"
        )


def _common_rows(takers: Sequence[CheckpointTensor]) -> Rows | None:
    """The rows to read, if every taker keeps the same rows; None when the whole tensor must be read."""
    shards = {taker.shard for taker in takers}
    shard = shards.pop()
    if shards or shard is None or shard.dim != 0:
        return None
    return shard.start, shard.start + shard.length


def _as_tensor(array: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    return array


def _load(tensor: Tensor, takers: Sequence[CheckpointTensor], rows: Rows | None) -> None:
    for taker in takers:
        cut = taker.shard if rows is None else None
        taker.load(tensor if cut is None else cut.of(tensor))


class _Progress:
    """How much of this rank's part is loaded, and how many files are done."""

    def __init__(
        self,
        rows: Mapping[str, Rows | None],
        stored: Mapping[str, StoredTensor],
        on_progress: OnProgress | None,
        report: Report | None,
    ) -> None:
        self.left = {name: stored[name].nbytes(part) for name, part in rows.items()}
        """Bytes of each tensor that is not loaded yet, by name."""
        self._stored = stored
        self._in_file = Counter(stored[name].file for name in rows)
        self._files = len(self._in_file)
        self._total = sum(self.left.values())
        self._done = 0
        self._meter = RateMeter()
        self._meter.update(0)
        self._on_progress = on_progress
        self._report = report

    def loaded(self, name: str) -> None:
        self._done += self.left.pop(name)
        self._in_file[self._stored[name].file] -= 1
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
        if self._report is not None:
            self._meter.update(self._done)
            self._report(self._message())

    def _message(self) -> LoadProgress:
        whole = sum(count == 0 for count in self._in_file.values())
        parts = [f"{whole} of {self._files} files" if self._files > 1 else "", self._meter.words(self._total)]
        detail = ", ".join(part for part in parts if part)
        return LoadProgress(phase="loading", done=self._done, total=self._total, unit="bytes", detail=detail)
