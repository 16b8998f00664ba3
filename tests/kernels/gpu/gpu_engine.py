"""The real engine, scheduler and runner over the GPU kernels; its graphs are real where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ziphius.attention.cuda import CudaBackend
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.cuda_graph import DecodeGraphs, DecodeOutput
from ziphius.engine.engine import Engine
from ziphius.engine.rank_builder import RankBuilder, RankSizes
from ziphius.ipc.messages import AddRequest, StepOutput
from ziphius.models.causal_lm import CausalLM
from ziphius.scheduler.scheduler import Scheduler

PAGE, CONTEXT = 4, 60


class UncapturedGraphs(DecodeGraphs):
    """What a graph would replay, done anew each time."""

    def capture(self, sizes: Sequence[int], on_progress: object = None) -> None:
        self.sizes = sorted(sizes)

    def launch(self, size: int) -> DecodeOutput:
        return self.compute(size)


@dataclass(frozen=True)
class Settings:
    """How an engine is to run; none of it may change an answer."""

    pages: int = 40
    rows: int = 3
    chunk: int = 64
    reserved_tokens: int = 16
    """Of each request's answer, when it is decided whether it may start."""
    prefix_cache: bool = False
    graph_sizes: tuple[int, ...] = ()


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0


def answers(
    model: CausalLM,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool,
    settings: Settings,
    *waves: Iterable[AddRequest],
) -> dict[str, Answer]:
    """Each wave of requests comes when the one before has been answered."""
    sizes = RankSizes(settings.pages, PAGE, CONTEXT, settings.rows)
    attention = CudaBackend(device, batch_invariant)  # also on a CPU, where the interpreter runs its kernels
    builder = RankBuilder(model, sizes, dtype, device, attention=attention)
    graphs = None
    if settings.graph_sizes:
        make = DecodeGraphs if device.type == "cuda" else UncapturedGraphs
        graphs = builder.capture(make, settings.graph_sizes)
    runner = builder.runner(graphs)
    scheduler = Scheduler(
        num_pages=settings.pages, page_size=PAGE, max_running_requests=settings.rows,
        chunked_prefill_size=settings.chunk, context_length=CONTEXT, eos_token_ids=(),
        prefix_cache=settings.prefix_cache, reserved_tokens=settings.reserved_tokens,
    )  # fmt: skip
    channel = MemoryChannel()
    engine = Engine(scheduler, runner, channel, overlap=True)
    told: dict[str, Answer] = {}
    for wave in waves:
        channel.to_engine.extend(wave)
        engine.turn()
        while not engine.idle:
            engine.turn()
    scheduler.check_pages()
    for message in channel.from_engine:
        for output in message.outputs if isinstance(message, StepOutput) else ():
            answer = told.setdefault(output.rid, Answer())
            answer.token_ids += output.token_ids
            answer.logprobs += [one.logprob for one in output.logprobs]
            answer.cached_tokens, answer.preemptions = output.cached_tokens, output.preemptions
    return told
