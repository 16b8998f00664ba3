"""load_rank: brings up one rank: its weights, its cache, and on rank 0 a first token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ziphius.checkpoint.checkpoint import Checkpoint
from ziphius.checkpoint.gguf import GGUFSource
from ziphius.checkpoint.safetensors_source import SafetensorsSource
from ziphius.checkpoint.weight_source import WeightSource
from ziphius.config import ServeConfig
from ziphius.distributed import ParallelState
from ziphius.engine.channel import Channel, MemoryChannel
from ziphius.engine.deferred import DeferredRunner
from ziphius.engine.engine import Engine, Runner
from ziphius.engine.follower import Follower
from ziphius.engine.model_runner import ModelRunner
from ziphius.engine.out_of_memory import out_of_memory_explained
from ziphius.engine.precision import Precision, resolve_precision
from ziphius.engine.rank_builder import RankBuilder, RankSizes
from ziphius.engine.team import Team
from ziphius.errors import ConfigError, DoesNotFit, EngineFailed
from ziphius.formats import Device
from ziphius.ipc.messages import AddRequest, LoadProgress, Ready, SamplingParams, StepOutput
from ziphius.layers.select import has_gpu_kernels
from ziphius.models.causal_lm import CausalLM
from ziphius.models.loader import load_model, make_dummy
from ziphius.planner.admission import RankMemory, admit_model, admit_pool
from ziphius.planner.measured import compare
from ziphius.planner.memory import BatchLimits, gib, weight_bytes
from ziphius.planner.pool import FittedPool, PoolSize
from ziphius.planner.probe import available_memory
from ziphius.scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)

Report = Callable[[LoadProgress], None]

_WARM_UP_PROMPT = 64
_WARM_UP_PROMPTS_ON_GPU = (4096, 2048, 1024, 512, 256, 128)
"""Prompts of each size are computed by other kernels, also by those of the library. A whole step's worth is added."""


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank that is ready to compute; rank 0 has generated its first token."""

    config: ServeConfig
    checkpoint: Checkpoint
    ready: Ready
    runner: ModelRunner
    num_pages: int
    device: torch.device
    team: Team
    own_threads: bool = False
    """Whether the model computes on threads of its own, not on torch's."""

    @property
    def limits(self) -> BatchLimits:
        return batch_limits(self.config, self.device)

    def make_engine(self, channel: Channel) -> Engine:
        """Rank 0: an engine with an empty queue and prefix cache. Make one at a time: two would share the pool."""
        runner: Runner = self.runner
        on_cuda, alone = self.device.type == "cuda", self.team.alone
        if not on_cuda and not alone:
            runner = DeferredRunner(runner)
        return Engine(
            self.make_scheduler(),
            runner,
            channel,
            overlap=on_cuda or not alone,
            broadcast=self.team.broadcast,
            alone=alone,
        )

    def make_follower(self) -> Follower:
        """Ranks > 0: the loop that does what rank 0 sends."""
        return Follower(self.runner, self.team.receive)

    def leave(self) -> None:
        """Release what would keep the ranks' group from ending. Call it after the last step, within `join_team`."""
        self.runner.release_graphs()

    def make_scheduler(self) -> Scheduler:
        return Scheduler(
            num_pages=self.num_pages,
            page_size=self.config.page_size,
            max_running_requests=self.limits.requests,
            chunked_prefill_size=self.limits.prompt_tokens,
            context_length=self.ready.context_length,
            eos_token_ids=self.checkpoint.config.eos_token_ids,
            prefix_cache=self.config.prefix_cache,
        )


def load_rank(config: ServeConfig, checkpoint: Checkpoint, report: Report, team: Team | None = None) -> LoadedRank:
    """Load this rank's part of `checkpoint`, size the pool with the other ranks, generate a token (rank 0).

    Ranks > 0 must call `make_follower().run()` at once, because rank 0's first token waits for them.

    ModelError for a checkpoint that cannot be used, DoesNotFit when memory cannot hold the weights or one context,
    ConfigError for options that the model contradicts, EngineFailed when the first token does not come.
    """
    team = team or Team()
    started = time.monotonic()
    precision = resolve_precision(config)
    _check_ranks(config, checkpoint, team)
    free_before = free_memory(precision.device)
    team.meet()  # no rank may take memory before all have measured how much is free
    predicted = _check_weights(checkpoint, precision, free_before, team)
    taken = predicted * _sharing(precision, team)
    predicted_size = admit_pool(config, checkpoint.config, _memory(precision, free_before - taken, free_before)).size
    model = _load_weights(config, checkpoint, precision, report, team.parallel)
    if not team.alone:
        report(LoadProgress(phase="waiting", detail="for the other ranks"))
    team.meet()
    report(LoadProgress(phase="cache"))
    measured = _memory(precision, free_memory(precision.device), free_before)
    context_length, size = _agreed(team, admit_pool(config, checkpoint.config, measured))
    ready = Ready(
        context_length=context_length,
        kv_tokens=size.tokens,
        kv_bytes_per_token=size.bytes_per_token,
        weight_bytes=model.nbytes,
        load_seconds=0.0,
        device=_device_name(precision.device) + ("" if team.alone else f" x {config.tp}"),
        vocab_size=checkpoint.config.vocab_size,
        max_running_requests=batch_limits(config, precision.device).requests,
        predicted_weight_bytes=predicted,
        predicted_kv_tokens=predicted_size.tokens,
    )
    if team.parallel.rank == 0:  # the other ranks have the same numbers
        for line, off in compare(ready):
            _log.log(logging.WARNING if off else logging.INFO, "%s", line)
    num_pages = size.pages(config.page_size)
    runner = _make_runner(config, model, num_pages, context_length, precision, team.parallel, report)
    if model.own_threads:
        report(LoadProgress(phase="kernels", detail="compiled at the first start, then kept"))
        model.compile_kernels()
    loaded = LoadedRank(config, checkpoint, ready, runner, num_pages, precision.device, team, model.own_threads)
    report(LoadProgress(phase="warm-up"))
    if team.parallel.rank == 0:
        warm_up(loaded)
    return replace(loaded, ready=_with_seconds(ready, time.monotonic() - started))


def _memory(precision: Precision, free_bytes: int, free_before_bytes: int) -> RankMemory:
    device: Device = "cuda" if precision.device.type == "cuda" else "cpu"
    dtype = precision.dtype_name
    return RankMemory(device=device, dtype=dtype, free_bytes=free_bytes, free_before_bytes=free_before_bytes)


def batch_limits(config: ServeConfig, device: torch.device) -> BatchLimits:
    """The most requests and tokens of one step on this device."""
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    return BatchLimits.of(kind, config.max_running_requests, config.chunked_prefill_size)


def _check_ranks(config: ServeConfig, checkpoint: Checkpoint, team: Team) -> None:
    """ConfigError unless `team` has as many ranks as `config` asks for, and they can share the model."""
    if config.tp != team.parallel.size:
        raise ConfigError(
            f"tp is {config.tp}, but this is rank {team.parallel.rank} of {team.parallel.size}: "
            "only `ziphius serve` and `start` start several",
            param="tp",
        )
    admit_model(config, checkpoint.config)


def _sharing(precision: Precision, team: Team) -> int:
    """Ranks that share one memory: those of one machine share its main memory, but each rank has its own GPU."""
    return 1 if precision.device.type == "cuda" else team.ranks_here


def _agreed(team: Team, fitted: FittedPool) -> tuple[int, PoolSize]:
    """The smallest values of all ranks: the page numbers must be the same on all of them."""
    context_length, tokens = team.smallest(fitted.context_length, fitted.size.tokens)
    return context_length, replace(fitted.size, tokens=tokens)


def warm_up(loaded: LoadedRank) -> None:
    """Generate tokens for long and short requests, so that each kind of step has run. EngineFailed if it fails.

    Kernels for a GPU are compiled when they first run; they run here, so that the first user need not wait.
    """
    channel = MemoryChannel()
    engine = loaded.make_engine(channel)
    context, vocab = loaded.ready.context_length, loaded.ready.vocab_size
    sampling = SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True, seed=0)
    waves: list[tuple[int, ...]] = [(_WARM_UP_PROMPT, 1)]
    if loaded.device.type == "cuda":
        waves += [(length,) for length in (loaded.limits.prompt_tokens, *_WARM_UP_PROMPTS_ON_GPU)]
    for wave in waves:
        for length in wave:
            # Each prompt begins with another token, so that the prefix cache has none of them.
            ids = [(length + i) % vocab for i in range(max(1, min(length, context - sampling.max_new_tokens)))]
            channel.to_engine.append(AddRequest(rid=f"warm-up {length}", prompt_ids=ids, sampling=sampling))
        engine.turn()
        while not engine.idle:
            engine.turn()
    for message in channel.from_engine:
        for output in message.outputs if isinstance(message, StepOutput) else ():
            if output.finish is not None and output.finish.kind == "error":
                raise EngineFailed(f"the first token did not come: {output.finish.message}")


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return available_memory()


def _check_weights(checkpoint: Checkpoint, precision: Precision, free_bytes: int, team: Team) -> int:
    """Predicted bytes of this rank's weights. DoesNotFit if they have no room, before loading takes minutes."""
    float_bytes = torch.empty((), dtype=precision.dtype).element_size()
    tp, sharing = team.parallel.size, _sharing(precision, team)
    predicted = weight_bytes(checkpoint.config, tp, precision.weights_format, float_bytes=float_bytes).total
    if predicted * sharing > free_bytes:
        ranks = "" if team.alone else f" for {sharing} of {tp} ranks"
        raise DoesNotFit(
            f"the weights of {checkpoint.name} need {gib(predicted * sharing)} as {precision.weights_format}{ranks}, "
            f"but {gib(free_bytes)} are free on the {precision.device.type}: take a smaller --weights-format or model, "
            "or free memory"
        )
    return predicted


def _load_weights(
    config: ServeConfig, checkpoint: Checkpoint, precision: Precision, report: Report, parallel: ParallelState
) -> CausalLM:
    how = (parallel, precision.weights_format, precision.dtype, precision.device)
    with out_of_memory_explained(f"the weights of {checkpoint.name} were loaded"):
        if config.load_format == "dummy":
            return make_dummy(checkpoint.config, *how, batch_invariant=precision.batch_invariant)
        source: WeightSource
        if checkpoint.format == "gguf":
            source = GGUFSource.open(checkpoint.path)
        else:
            source = SafetensorsSource(checkpoint.path, config.load_threads)
        return load_model(checkpoint.config, source, *how, report=report, batch_invariant=precision.batch_invariant)


def _make_runner(
    config: ServeConfig,
    model: CausalLM,
    num_pages: int,
    context_length: int,
    precision: Precision,
    parallel: ParallelState,
    report: Report,
) -> ModelRunner:
    device, requests = precision.device, batch_limits(config, precision.device).requests
    sizes = RankSizes(num_pages, config.page_size, context_length, requests)
    builder = RankBuilder(model, sizes, precision.dtype, device, parallel, batch_invariant=precision.batch_invariant)
    if not (config.cuda_graphs and device.type == "cuda" and has_gpu_kernels() and parallel.capturable):
        return builder.runner()
    from ziphius.engine.cuda_graph import DecodeGraphs, graph_sizes  # needs Triton

    def on_progress(done: int, total: int) -> None:
        report(LoadProgress(phase="capturing", done=done, total=total, unit="graphs"))

    largest = min(config.cuda_graph_max_bs or requests, requests)
    return builder.runner(builder.capture(DecodeGraphs, graph_sizes(largest), on_progress))


def _with_seconds(ready: Ready, seconds: float) -> Ready:
    ready.load_seconds = round(seconds, 3)
    return ready


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
