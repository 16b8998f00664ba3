"""Chooses cuts of kernels by the time of whole decode steps: the fastest kernel alone may not be the fastest in a step.

    python benchmarks/tune_steps.py CONFIG_FOLDER --batches 1 8 32 128:256 --write --json result.json

For each batch, the step is first measured as it is. Then one kind of kernel after another is cut in other ways; the
fastest cut of a kind is kept for the kinds that follow if it wins more than --margin. --write puts what was kept into
the device's file (kernels/gpu/tuned), for the batch that was measured. Run benchmarks/tune_kernels.py first: it fills
that file, and tries many more cuts, each kernel alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from decode_step import Bench, Load, build, parse
from triton.runtime.errors import OutOfResources
from tune_kernels import TUNED, known, layout

from ziphius.checkpoint.config import LatentAttention
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.experts import GroupedConfig, PairConfig
from ziphius.kernels.gpu.paged_decode import MLADecodeConfig, SplitPlan
from ziphius.kernels.gpu.tuning import ExpertsPlan, GroupedPlan, Tuned

_MOST_TOKENS = 256
"""Steps of more tokens compute prompts; they stay as they are."""


@dataclass(frozen=True)
class Variant:
    """One way to cut one kind of kernel."""

    kind: str
    shape: str
    """As the device's file names it."""
    entry: Any
    """What the file would hold."""
    apply: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Measured:
    batch: int
    input: int
    kind: str
    shape: str
    entry: Any
    step_ms: float


@contextmanager
def override(method: str, matches: Callable[..., bool], value: Any) -> Iterator[None]:
    """Tuned.`method` gives `value` where `matches`, for few tokens."""
    usual = getattr(Tuned, method)

    def choose(self: Tuned, *sizes: int) -> Any:
        return value if matches(*sizes) else usual(self, *sizes)

    with patch.object(Tuned, method, choose):
        yield


def mla_variants(bench: Bench, batch: int) -> Iterator[Variant]:
    mla, heads = bench.config.attention, bench.config.num_attention_heads
    assert isinstance(mla, LatentAttention)
    around = max(1, 256 // (batch * max(1, heads // 16)))
    for splits in sorted({max(1, min(64, around * f // 2)) for f in (1, 2, 4)}):
        for fields in ((16, 32, 3, 4, False), (16, 64, 3, 8, False), (32, 64, 2, 8, True), (16, 64, 2, 8, True)):
            if fields[0] > max(16, heads):
                continue
            value = (SplitPlan(splits, 0), MLADecodeConfig(*fields))
            yield Variant(
                "mla", f"{heads}x{mla.kv_lora_rank}", [splits, *fields],
                lambda value=value: override("mla", lambda tokens, *_: tokens <= _MOST_TOKENS, value),
            )  # fmt: skip


def expert_variants(bench: Bench, batch: int) -> Iterator[Variant]:
    moe, hidden = bench.config.moe, bench.config.hidden_size
    assert moe is not None
    shape = f"{moe.n_routed_experts}x{hidden}x{moe.moe_intermediate_size}"
    for plan in _expert_plans(batch):
        if isinstance(plan, PairConfig):
            entry: Any = {"pairs": list(astuple(plan))}
        else:
            entry = {"block_m": plan.block_m, "first": list(astuple(plan.first)), "second": list(astuple(plan.second))}
        yield Variant(
            "experts", shape, entry,
            lambda plan=plan: override("experts", lambda tokens, *_: tokens <= _MOST_TOKENS, plan),
        )  # fmt: skip


def _expert_plans(batch: int) -> Iterator[ExpertsPlan]:
    if batch <= 8:
        yield from (PairConfig(*c) for c in ((2, 4, 4, 4), (2, 8, 4, 4), (1, 4, 1, 2), (2, 8, 2, 2), (4, 8, 4, 4)))
    if batch > 1:
        for first in (GroupedConfig(64, 128, 3), GroupedConfig(128, 128, 3, 8)):
            for second in (GroupedConfig(128, 128, 3, tiles=2), GroupedConfig(128, 128, 3, tiles=4),
                           GroupedConfig(64, 128, 4, tiles=1), GroupedConfig(64, 128, 4, tiles=4)):  # fmt: skip
                yield GroupedPlan(16, first, second)


def gemv_variants(bench: Bench, batch: int) -> Iterator[Variant]:
    if batch > 1:
        return
    for shape in known(GpuDevice.of(torch.device("cuda"))).get("gemv", {}):
        rows, columns = map(int, shape.split("x"))
        for cut in ((1, 4), (2, 4), (4, 4), (8, 4), (4, 8), (8, 8)):
            yield Variant(
                "gemv", shape, list(cut),
                lambda size=(rows, columns), cut=cut: override("gemv", lambda *given: given == size, cut),
            )  # fmt: skip


def tune(bench: Bench, load: Load, margin: float) -> tuple[list[Measured], list[Variant]]:
    """Everything measured at this batch, and what is worth keeping."""
    measured: list[Measured] = []
    kept: list[Variant] = []

    def step_ms(variants: list[Variant]) -> float:
        with ExitStack() as stack:
            for variant in variants:
                stack.enter_context(variant.apply())
            bench.capture([load.batch])
            return bench.measure(load).best_step_ms

    step_ms([])  # compiles
    best = step_ms([])
    measured.append(Measured(load.batch, load.input, "as it is", "", None, best))
    for make in (expert_variants, mla_variants, gemv_variants):
        by_shape: dict[str, tuple[float, Variant]] = {}
        for variant in make(bench, load.batch):
            try:
                took = step_ms([*kept, variant])
            except OutOfResources:
                continue  # does not fit this device
            measured.append(Measured(load.batch, load.input, variant.kind, variant.shape, variant.entry, took))
            if took < by_shape.get(variant.shape, (best * (1 - margin), variant))[0]:
                by_shape[variant.shape] = (took, variant)
        kept += [variant for _, variant in by_shape.values()]
        if by_shape:
            best = step_ms(kept)
        print(f"batch {load.batch:4d}: {best:.3f} ms with {[(v.kind, v.shape, v.entry) for v in kept]}", flush=True)
    return measured, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--batches", nargs="+", default=["1", "8", "32"], metavar="B[:INPUT]")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--margin", type=float, default=0.003, help="least share of a step that a change must win")
    parser.add_argument("--kv-tokens", type=int, default=100_000)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    words = [str(args.config), "--batches", *args.batches, "--steps", str(args.steps), "--no-graphs"]
    bench = build(parse([*words, "--kv-tokens", str(args.kv_tokens)]))
    gpu = GpuDevice.of(torch.device("cuda"))
    device, found = gpu.name, known(gpu)
    file = TUNED / (device.replace(" ", "_") + ".json")
    everything: list[Measured] = []
    for load in bench.args.batches:
        measured, kept = tune(bench, load, args.margin)
        everything += measured
        for variant in kept:
            entries = found.setdefault(variant.kind, {})
            if variant.kind == "gemv":
                entries[variant.shape] = variant.entry
            else:
                entries.setdefault(variant.shape, {})[str(load.batch)] = variant.entry
    if args.write:
        file.write_text(layout(found), encoding="utf-8")
    if args.json:
        told = {"config": args.config.name, "device": device, "measured": [asdict(one) for one in everything]}
        args.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
