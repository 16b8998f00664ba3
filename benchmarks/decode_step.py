"""Decode steps and prefill of any config with random weights, through the real scheduler and runner; no HTTP, no files.

    python benchmarks/decode_step.py CONFIG_FOLDER --batches 1 8 32:2048 --json result.json

For each batch, requests with random prompts are prefilled and then decoded together. `step ms` is the wall time between
results of consecutive steps, scheduling included. `GB` is what a step must read: the cache, and each weight once, but
of the experts only as many as uniform routing would choose. `% floor` is the time that this reading takes at
--bandwidth (GB/s, as measured on the device) as a share of the step's time. `idle %` is the share of a step in which
the GPU waits for the next one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from ziphius.checkpoint.config import ModelConfig
from ziphius.config import ServeConfig
from ziphius.distributed import SINGLE
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.cuda_graph import DecodeGraphs, DecodeOutput, graph_sizes
from ziphius.engine.engine import Engine
from ziphius.engine.loading import free_memory
from ziphius.engine.model_runner import ModelRunner
from ziphius.engine.precision import resolve_precision
from ziphius.engine.rank_builder import RankBuilder, RankSizes
from ziphius.engine.row_table import DecodePlan
from ziphius.ipc.messages import AbortRequest, AddRequest, RequestOutput, SamplingParams, StepOutput
from ziphius.kernels.gpu.routing import Routes
from ziphius.layers.cuda_mixture import CudaMixture
from ziphius.layers.moe import MixtureOfExperts
from ziphius.models.decoder import Decoder
from ziphius.models.loader import make_dummy
from ziphius.planner.admission import RankMemory, admit_pool
from ziphius.planner.memory import GIB, weight_bytes
from ziphius.planner.roofline import decode_bytes
from ziphius.scheduler.scheduler import Scheduler

Window = AbstractContextManager[object]


@dataclass(frozen=True)
class Load:
    """How many requests run together, and how many tokens the prompt of each has."""

    batch: int
    input: int = 1024


@dataclass(frozen=True)
class Point:
    """One batch's measurement."""

    batch: int
    input: int
    step_ms: float
    best_step_ms: float
    tokens_per_s: float
    gigabytes: float
    gb_per_s: float
    floor_percent: float
    idle_percent: float
    prefill_tokens_per_s: float


@dataclass
class Report:
    config: str
    device: str
    torch_version: str
    weights_gib: float = 0.0
    predicted_weights_gib: float = 0.0
    kv_tokens: int = 0
    fill_s: float = 0.0
    capture_s: float = 0.0
    graphs_gib: float = 0.0
    free_at_end_gib: float = 0.0
    points: list[Point] = field(default_factory=list)


class TimedGraphs(DecodeGraphs):
    """Graphs that note when the GPU begins and ends each step."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def replay(self, plan: DecodePlan) -> DecodeOutput:
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        output = super().replay(plan)
        pair[1].record()
        self.events.append(pair)
        return output

    def idle_share(self) -> float:
        """The time between steps as a share of all time, from the start of the first step to the start of the last."""
        if len(self.events) < 2:
            return 0.0
        torch.cuda.synchronize()
        gaps = [a[1].elapsed_time(b[0]) for a, b in pairwise(self.events)]
        total = self.events[0][0].elapsed_time(self.events[-1][0])
        return sum(gaps) / total


@dataclass
class Bench:
    """A rank with random weights, and what is measured with it."""

    args: argparse.Namespace
    config: ModelConfig
    report: Report
    builder: RankBuilder
    num_pages: int
    context: int
    graphs: TimedGraphs | None = None
    """Of the measured steps; None: they run without graphs."""

    def capture(self, sizes: Sequence[int]) -> None:
        """Graphs of these sizes in place of those that are there."""
        self.graphs = self.builder.capture(TimedGraphs, sizes)

    def engine(self, runner: ModelRunner) -> tuple[Engine, MemoryChannel]:
        channel = MemoryChannel()
        scheduler = Scheduler(
            num_pages=self.num_pages,
            page_size=self.args.page_size,
            max_running_requests=largest(self.args),
            chunked_prefill_size=self.args.chunk,
            context_length=self.context,
            eos_token_ids=(),
            prefix_cache=False,
        )
        return Engine(scheduler, runner, channel, overlap=True), channel

    def measure(self, load: Load, prefilling: Window | None = None, decoding: Window | None = None) -> Point:
        """The windows are open while prompts are computed and while steps are measured."""
        engine, channel = self.engine(self.builder.runner(self.graphs))
        args = self.args
        self._add(channel, load)
        torch.cuda.synchronize()
        with prefilling or nullcontext():
            started = time.perf_counter()
            told: set[str] = set()
            while len(told) < load.batch:
                engine.turn()
                told |= {output.rid for output in _outputs(channel) if output.token_ids}
            prefilled = time.perf_counter() - started
        for _ in range(args.warmup):
            engine.turn()
        if self.graphs is not None:
            self.graphs.events.clear()
        with decoding or nullcontext():
            marks = [time.perf_counter()]
            for _ in range(args.steps):
                engine.turn()
                marks.append(time.perf_counter())
            torch.cuda.synchronize()
        idle = self.graphs.idle_share() if self.graphs is not None else 0.0
        channel.to_engine.extend(AbortRequest(rid=str(i)) for i in range(load.batch))
        while not engine.idle:
            engine.turn()
        return self._point(load, marks, prefilled, idle)

    def experts_hit(self, load: Load) -> float:
        """How many different experts a layer computes in a decode step: the mean over a few steps without graphs."""
        seen: list[Tensor] = []

        def watch(routes: Routes) -> None:
            if routes.ids.shape[0] == load.batch:
                seen.append(routes.ids.clone())

        engine, channel = self.engine(self.builder.runner())
        self._add(channel, load)
        mixtures = self._mixtures()
        for mixture in mixtures:
            mixture.on_routes = watch
        try:
            told: set[str] = set()
            while len(told) < load.batch:
                engine.turn()
                told |= {output.rid for output in _outputs(channel) if output.token_ids}
            seen.clear()
            for _ in range(4):
                engine.turn()
        finally:
            for mixture in mixtures:
                mixture.on_routes = None
        channel.to_engine.extend(AbortRequest(rid=str(i)) for i in range(load.batch))
        while not engine.idle:
            engine.turn()
        routed = self.config.moe.n_routed_experts if self.config.moe is not None else 0
        return statistics.mean(int((ids.unique() < routed).sum()) for ids in seen) if seen else 0.0

    def _mixtures(self) -> list[CudaMixture]:
        model = self.builder.model
        assert isinstance(model, Decoder)
        mlps = [layer.mlp for layer in model.layers]
        fused = [mlp.fused for mlp in mlps if isinstance(mlp, MixtureOfExperts)]
        return [mixture for mixture in fused if isinstance(mixture, CudaMixture)]

    def _add(self, channel: MemoryChannel, load: Load) -> None:
        args = self.args
        sampling = SamplingParams(max_new_tokens=args.output, temperature=args.temperature, ignore_eos=True, seed=1)
        generator = torch.Generator().manual_seed(load.batch)
        for i in range(load.batch):
            prompt = torch.randint(0, self.config.vocab_size, (load.input,), generator=generator).tolist()
            channel.to_engine.append(AddRequest(rid=str(i), prompt_ids=prompt, sampling=sampling))

    def _point(self, load: Load, marks: Sequence[float], prefilled: float, idle: float) -> Point:
        steps = [b - a for a, b in pairwise(marks)]
        mean = (marks[-1] - marks[0]) / len(steps)
        args, batch = self.args, load.batch
        context = load.input + args.warmup + args.steps // 2
        touched = decode_bytes(self.config, 1, "bf16", batch, "bfloat16", context)
        return Point(
            batch=batch,
            input=load.input,
            step_ms=round(mean * 1e3, 3),
            best_step_ms=round(statistics.median(steps) * 1e3, 3),
            tokens_per_s=round(batch / mean, 1),
            gigabytes=round(touched / 1e9, 2),
            gb_per_s=round(touched / 1e9 / mean),
            floor_percent=round(100 * touched / 1e9 / args.bandwidth / mean, 1),
            idle_percent=round(100 * idle, 2),
            prefill_tokens_per_s=round(batch * load.input / prefilled),
        )


def build(args: argparse.Namespace) -> Bench:
    config = ModelConfig.from_folder(args.config)
    serve = ServeConfig(
        device="cuda", dtype="bfloat16", max_running_requests=largest(args), page_size=args.page_size,
        chunked_prefill_size=args.chunk, context_length=args.context, max_total_tokens=args.kv_tokens,
    )  # fmt: skip
    precision = resolve_precision(serve)
    device = precision.device
    report = Report(str(args.config), torch.cuda.get_device_name(device), torch.__version__)
    free_before = free_memory(device)
    started = time.perf_counter()
    model = make_dummy(
        config, SINGLE, precision.weights_format, precision.dtype, device, batch_invariant=args.deterministic
    )
    torch.cuda.synchronize()
    report.fill_s = round(time.perf_counter() - started, 2)
    report.weights_gib = round(model.nbytes / GIB, 3)
    report.predicted_weights_gib = round(weight_bytes(config, 1, precision.weights_format).total / GIB, 3)
    memory = RankMemory(
        device="cuda", dtype=precision.dtype_name, free_bytes=free_memory(device), free_before_bytes=free_before
    )
    fitted = admit_pool(serve, config, memory)
    context, size = fitted.context_length, fitted.size
    report.kv_tokens = size.tokens
    num_pages = size.pages(args.page_size)
    sizes = RankSizes(num_pages, args.page_size, context, largest(args))
    builder = RankBuilder(model, sizes, precision.dtype, device, batch_invariant=args.deterministic)
    bench = Bench(args, config, report, builder, num_pages, context)
    if not args.no_graphs:
        _capture(bench, device)
    return bench


def _capture(bench: Bench, device: torch.device) -> None:
    """The graphs of all measurements; the report tells what they take."""
    args, report = bench.args, bench.report
    before, started = free_memory(device), time.perf_counter()
    bench.capture(graph_sizes(largest(args)) if args.all_sizes else sorted({load.batch for load in args.batches}))
    torch.cuda.synchronize()
    report.capture_s = round(time.perf_counter() - started, 2)
    report.graphs_gib = round((before - free_memory(device)) / GIB, 3)


def profile(bench: Bench, load: Load, rows: int = 22) -> str:
    """Where the GPU's time goes in prefill and in decode steps, kernel by kernel.

    Kernels overlap: one may load its weights while it waits for the one before. So `own` counts from the later of two
    moments, the kernel's start and the end of the kernel that ended before it, to the kernel's end. All `own` together
    are the time that the GPU was busy.
    """
    windows = [torch_profile(activities=[ProfilerActivity.CUDA]) for _ in range(2)]
    bench.measure(load, *windows)
    lines = []
    for name, window in zip(("prefill", f"{bench.args.steps} decode steps"), windows, strict=True):
        own, whole, count = _by_kernel(window)
        lines.append(f"{load}: {name}, {sum(own.values()) / 1e3:.2f} ms busy")
        lines.append("   own ms   calls   own us  whole us")
        for key in sorted(own, key=lambda key: -own[key])[:rows]:
            each, all_of_it = own[key] / count[key], whole[key] / count[key]
            lines.append(f"{own[key] / 1e3:9.2f} {count[key]:7d} {each:8.2f} {all_of_it:9.2f}  {key[:70]}")
    return "\n".join(lines)


def _by_kernel(window: torch_profile) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By name: own and whole microseconds, and calls."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    count: Counter[str] = Counter()
    events = [e for e in window.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ended = 0.0
    for event in sorted(events, key=lambda e: e.time_range.end):
        start, end = event.time_range.start, event.time_range.end
        own[event.name] += end - max(start, ended)
        whole[event.name] += end - start
        count[event.name] += 1
        ended = max(ended, end)
    return own, whole, count


def main() -> None:
    args = parse()
    bench = build(args)
    report = bench.report
    print(f"{report.config} on {report.device}, torch {report.torch_version}, Python {platform.python_version()}")
    print(
        f"weights {report.weights_gib} GiB ({report.predicted_weights_gib} predicted), filled in {report.fill_s} s; "
        f"KV {report.kv_tokens} tokens; graphs in {report.capture_s} s, {report.graphs_gib} GiB"
    )
    head = "batch  input  step ms   best   tok/s      GB   GB/s  % floor  idle %  prefill tok/s"
    print(head)
    for load in args.batches:
        for _ in range(args.repeat):
            point = bench.measure(load)
            report.points.append(point)
        hit = bench.experts_hit(load) if args.count_experts else 0.0
        print(
            f"{point.batch:5d} {point.input:6d} {point.step_ms:8.3f} {point.best_step_ms:6.2f} "
            f"{point.tokens_per_s:7.0f} {point.gigabytes:7.2f} {point.gb_per_s:6.0f} {point.floor_percent:8.1f} "
            f"{point.idle_percent:7.2f} {point.prefill_tokens_per_s:14.0f}" + (f"  {hit:.1f} experts" if hit else ""),
            flush=True,
        )
    report.free_at_end_gib = round(free_memory(torch.device("cuda")) / GIB, 2)
    print(f"free at the end: {report.free_at_end_gib} GiB")
    for load in args.profile:
        print(profile(bench, load), flush=True)
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")


def _outputs(channel: MemoryChannel) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while channel.from_engine:
        message = channel.from_engine.popleft()
        if isinstance(message, StepOutput):
            outputs += message.outputs
            for output in message.outputs:
                if output.finish is not None and output.finish.kind == "error":
                    raise SystemExit(output.finish.message)
    return outputs


def largest(args: argparse.Namespace) -> int:
    """Most requests at a time."""
    return max(load.batch for load in [*args.batches, *args.profile])


def _load(text: str) -> Load:
    return Load(*map(int, text.split(":")))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="folder with a config.json")
    parser.add_argument("--batches", type=_load, nargs="+", default=[Load(1), Load(8), Load(32)], metavar="B[:INPUT]")
    parser.add_argument("--output", type=int, default=4096, help="most tokens of an answer; more than are measured")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="measurements of each batch; the last one is printed")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens computed in one step")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--kv-tokens", type=int, default=None)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float, default=4630.0, help="GB/s that reading can reach on this device")
    parser.add_argument("--count-experts", action="store_true", help="tell how many experts the steps wake in a layer")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--all-sizes", action="store_true", help="capture every size a server would")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--profile", type=_load, nargs="*", default=[], metavar="B[:INPUT]")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
