"""Finds how products are best cut on this GPU for the shapes of some models, and writes it where the engine reads it.

    python benchmarks/tune_kernels.py CONFIG_FOLDER [CONFIG_FOLDER ...] --write

Every candidate is timed as a step would run it: in a CUDA graph of launches over several sets of weights, more than the
L2 cache holds. Where the library can compute the same, it is one of the candidates. Without --write the results are
only printed. New shapes are added to those that the device's file has already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ziphius.checkpoint.config import LatentAttention, ModelConfig, MoEConfig
from ziphius.kernels.gpu import combine, experts, flash_prefill, gemv, mla_inputs, paged_decode, routing, skinny
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.experts import ExpertMatrices, GroupedConfig, PairConfig
from ziphius.kernels.gpu.skinny import SkinnyConfig
from ziphius.kernels.gpu.tuning import Tuned

Launch = Callable[[], object]
TUNED = Path(experts.__file__).parent / "tuned"
L2_BYTES = 120 << 20
"""So many bytes of weights are read before the first set is read again: twice the L2 cache."""


MLA_CANDIDATES = [
    paged_decode.MLADecodeConfig(*fields)
    for fields in (
        (16, 32, 2, 4), (16, 32, 3, 4), (32, 32, 2, 8), (32, 32, 3, 8), (32, 64, 2, 8), (32, 64, 3, 8),
        (16, 64, 2, 4, True), (32, 64, 2, 8, True), (64, 32, 2, 8), (64, 32, 3, 8), (64, 64, 2, 8),
    )
]  # fmt: skip


def measure(launches: Sequence[Launch], device: torch.device) -> float:
    """Microseconds of one launch, the median over replays of a graph of all of them."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[1:])


@dataclass
class Tuner:
    """One device's search; `found` is what goes into the file."""

    device: torch.device
    gpu: GpuDevice
    found: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def best(self, what: str, candidates: Iterator[tuple[Any, Callable[[int], Launch]]], nbytes: int, sets: int) -> Any:
        """The fastest of (config, launch on weight set i); candidates that do not fit the device are skipped."""
        results: list[tuple[float, Any]] = []
        for config, launch_on in candidates:
            try:
                launches = [launch_on(i % sets) for i in range(max(sets, 8))]
                results.append((measure(launches, self.device), config))
            except Exception as error:  # noqa: BLE001 - mostly it needs too much shared memory, and is no candidate
                self.log.append(f"{what} {config}: {type(error).__name__}: {str(error)[:80]}")
        results.sort(key=lambda result: result[0])
        told = "; ".join(f"{_short(c)} {us:.1f}" for us, c in results[:4])
        rate = nbytes / results[0][0] / 1e3
        self.say(f"{what:44s} {results[0][0]:8.1f} us {rate:6.0f} GB/s | {told} | worst {results[-1][0]:.1f}")
        return results[0][1]

    def say(self, line: str) -> None:
        self.log.append(line)
        print(line, flush=True)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0.0, scale)


def _short(config: Any) -> str:
    if config is None:
        return "library"
    return ",".join(str(int(v)) if isinstance(v, (bool, int)) else str(v) for v in _fields(config))


def _fields(config: Any) -> list[Any]:
    return list(config) if isinstance(config, tuple) else list(astuple(config))


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """[out, in] of the dense products of a decode step on one rank."""
    hidden, heads, mla, moe = config.hidden_size, config.num_attention_heads, config.attention, config.moe
    assert isinstance(mla, LatentAttention)
    assert moe is not None
    queries = heads * mla.qk_head_dim
    if mla.q_lora_rank is None:
        first = [(queries + mla.latent_dim, hidden)]
    else:
        first = [(mla.q_lora_rank + mla.latent_dim, hidden), (queries, mla.q_lora_rank)]
    return [*first, (hidden, heads * mla.v_head_dim), (moe.n_routed_experts, hidden)]


def tune_linear(tuner: Tuner, config: ModelConfig, batches: Sequence[int]) -> None:
    workspace = skinny.SplitWorkspace.on(tuner.device)
    for rows, columns in linear_shapes(config):
        nbytes = rows * columns * 2
        sets = max(2, min(64, -(-L2_BYTES // nbytes)))
        weights = [tuner.randn(rows, columns, scale=0.02) for _ in range(sets)]
        x, norm, residual = tuner.randn(1, columns), (tuner.randn(columns), 1e-6), tuner.randn(1, rows)
        shapes = [(n, warps) for n in (1, 2, 4, 8, 16) for warps in (4, 8) if n * columns <= 160 * 32 * warps]
        best = tuner.best(
            f"gemv {rows}x{columns}",
            (
                (shape, lambda i, shape=shape: lambda: gemv.gemv(
                    tuner.gpu, x, weights[i], norm=norm, residual=residual, shape=shape))
                for shape in shapes
            ),
            nbytes, sets,
        )  # fmt: skip
        tuner.found.setdefault("gemv", {})[f"{rows}x{columns}"] = list(best)
        out_dtype = torch.float32 if config.moe is not None and rows == config.moe.n_routed_experts else None
        for tokens in batches:
            xs = tuner.randn(tokens, columns)
            best = tuner.best(
                f"skinny {rows}x{columns} x {tokens}",
                _linear_candidates(tuner, xs, weights, workspace, out_dtype), nbytes, sets,
            )  # fmt: skip
            entry = tuner.found.setdefault("skinny", {}).setdefault(f"{rows}x{columns}", {})
            entry[str(tokens)] = None if best is None else list(astuple(best))


def _linear_candidates(
    tuner: Tuner, x: Tensor, weights: Sequence[Tensor], workspace: skinny.SplitWorkspace, out_dtype: torch.dtype | None
) -> Iterator[tuple[SkinnyConfig | None, Callable[[int], Launch]]]:
    rows, columns = weights[0].shape
    yield None, lambda i: lambda: torch.mm(x, weights[i].t(), out_dtype=out_dtype or x.dtype)
    for block_n, block_k, stages in ((64, 128, 4), (32, 128, 4), (64, 256, 3), (16, 256, 4), (128, 64, 4)):
        tiles, steps = -(-rows // block_n), columns // block_k
        if columns % block_k or block_n > rows:
            continue
        even = [n for n in range(1, 17) if steps % n == 0 and steps // n >= 2]
        programs = (tuner.gpu.processors, 2 * tuner.gpu.processors, 4 * tuner.gpu.processors)
        for splits in sorted({min(even, key=lambda n, p=p: abs(tiles * n - p)) for p in programs}):
            for prefetch in (True, False) if (block_n, block_k) == (64, 128) else (True,):
                config = SkinnyConfig(block_n, block_k, splits, stages, 4, prefetch)
                yield (
                    config,
                    lambda i, config=config: (
                        lambda: skinny.skinny_linear(tuner.gpu, x, weights[i], workspace, config, out_dtype=out_dtype)
                    ),
                )


def tune_experts(tuner: Tuner, config: ModelConfig, batches: Sequence[int], prompts: Sequence[int]) -> None:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    width, shared = moe.moe_intermediate_size, moe.n_shared_experts
    routed = ExpertMatrices(
        tuner.randn(moe.n_routed_experts, 2 * width, hidden, scale=0.02),
        tuner.randn(moe.n_routed_experts, hidden, width, scale=0.02),
    )
    whole = ExpertMatrices(
        routed.gate_up, routed.down, tuner.randn(2 * shared * width, hidden), tuner.randn(hidden, shared * width)
    )
    entry = tuner.found.setdefault("experts", {}).setdefault(f"{moe.n_routed_experts}x{hidden}x{width}", {})
    for tokens in batches:
        entry[str(tokens)] = _tune_decode_experts(tuner, moe, whole, tokens)
    for tokens in prompts:
        entry[str(tokens)] = _tune_prompt_experts(tuner, moe, routed, tokens)


def _routes(tuner: Tuner, moe: MoEConfig, tokens: int, shared: int, sets: int) -> list[routing.Routes]:
    workspace = routing.RouteWorkspace.on(tuner.device)
    logits = [torch.randn((tokens, moe.n_routed_experts), device=tuner.device) for _ in range(sets)]
    return [routing.top_k(tuner.gpu, one, moe, shared, workspace) for one in logits]


def _tune_decode_experts(tuner: Tuner, moe: MoEConfig, matrices: ExpertMatrices, tokens: int) -> dict[str, Any]:
    sets = 6
    (count, hidden, width), x = matrices.down.shape, tuner.randn(tokens, matrices.down.shape[1])
    routes = _routes(tuner, moe, tokens, matrices.shared, sets)
    hit = sum(len(r.ids.unique()) for r in routes) / sets if tuner.device.type == "cuda" else 1
    nbytes = [int(hit * width * hidden * factor) for factor in (4, 2)]
    plain = {}
    if tokens <= 16:
        plain = _tune_pairs(tuner, x, routes, matrices, nbytes)
    if tokens == 1:
        return {"pairs": plain["pairs"]}
    workspace = routing.RouteWorkspace.on(tuner.device)
    blocks = []
    for one in routes:
        workspace.counts.zero_()
        blocks.append(routing.align(tuner.gpu, one, count + matrices.shared, 16, workspace))
    first = tuner.best(
        f"experts 1 {count}x{width}x{hidden} x {tokens}",
        (
            (c, lambda i, c=c: lambda: experts.grouped_first(tuner.gpu, x, routes[i], blocks[i], matrices, c))
            for c in (
                GroupedConfig(32, 128, 4), GroupedConfig(64, 128, 3), GroupedConfig(64, 64, 6), GroupedConfig(64, 128, 4),
                GroupedConfig(64, 64, 4), GroupedConfig(128, 64, 4, 8),
            )
        ),
        nbytes[0], sets,
    )  # fmt: skip
    act = experts.grouped_first(tuner.gpu, x, routes[0], blocks[0], matrices, first)
    second = tuner.best(
        f"experts 2 {count}x{hidden}x{width} x {tokens}",
        (
            (c, lambda i, c=c: lambda: experts.grouped_second(tuner.gpu, act, routes[i], blocks[i], matrices, c))
            for c in (
                GroupedConfig(128, 128, 3, tiles=4), GroupedConfig(128, 128, 3, tiles=2), GroupedConfig(128, 128, 3, tiles=8),
                GroupedConfig(128, 128, 4, tiles=4), GroupedConfig(128, 128, 3, 8, tiles=4), GroupedConfig(128, 64, 4, tiles=4),
                GroupedConfig(256, 128, 3, 8, tiles=2), GroupedConfig(256, 64, 4, 8, tiles=4), GroupedConfig(64, 128, 4, tiles=1),
                GroupedConfig(64, 128, 4, tiles=4),
            )
        ),
        nbytes[1], sets,
    )  # fmt: skip
    grouped = {"block_m": 16, "first": list(astuple(first)), "second": list(astuple(second))}
    if not plain:
        return grouped
    both = measure(
        [lambda i=i: experts.grouped_experts(tuner.gpu, x, routes[i % sets], blocks[i % sets], matrices, x, first, second)
         for i in range(12)], tuner.device,
    )  # fmt: skip
    tuner.say(f"  {tokens} tokens: by pairs {plain['us']:.1f} us, sorted {both:.1f} us (and sorting)")
    return {"pairs": plain["pairs"]} if plain["us"] < both + 3 else grouped


def _tune_pairs(
    tuner: Tuner, x: Tensor, routes: Sequence[routing.Routes], matrices: ExpertMatrices, nbytes: Sequence[int]
) -> dict[str, Any]:
    hidden, width = matrices.down.shape[1:]
    act = tuner.randn(routes[0].ids.numel(), width)
    guess = experts.pair_config(hidden, width, 2)

    def with_gate(rows: int, warps: int) -> PairConfig:
        return PairConfig(rows, warps, guess.down_rows, guess.down_warps)

    first = tuner.best(
        f"pairs 1 {width}x{hidden} x {x.shape[0]}",
        (
            (c, lambda i, c=c: lambda: experts.pair_first(tuner.gpu, x, routes[i], matrices, act, c))
            for c in (with_gate(n, w) for n in (1, 2, 4, 8) for w in (4, 8) if n * hidden <= 96 * 32 * w)
        ),
        nbytes[0], len(routes),
    )  # fmt: skip
    y = torch.empty_like(x)
    second = tuner.best(
        f"pairs 2 {hidden}x{width} x {x.shape[0]}",
        (
            (c, lambda i, c=c: lambda: experts.pair_second(tuner.gpu, act, routes[i], matrices, x, y, c))
            for c in (
                PairConfig(first.gate_rows, first.gate_warps, n, w)
                for n in (1, 2, 4, 8, 16) for w in (2, 4, 8) if n * width <= 64 * 32 * w
            )
        ),
        nbytes[1], len(routes),
    )  # fmt: skip
    us = measure(
        [lambda i=i: experts.pair_experts(tuner.gpu, x, routes[i % len(routes)], matrices, x, second) for i in range(12)],
        tuner.device,
    )  # fmt: skip
    return {"pairs": list(astuple(second)), "us": us}


def _tune_prompt_experts(tuner: Tuner, moe: MoEConfig, matrices: ExpertMatrices, tokens: int) -> dict[str, Any]:
    count, hidden, width = matrices.down.shape
    x = tuner.randn(tokens, hidden)
    routes = _routes(tuner, moe, tokens, 0, 1)[0]
    flops = 2 * routes.ids.numel() * hidden * width
    found: dict[int, tuple[float, Any]] = {}
    for block_m in (64, 128):
        workspace = routing.RouteWorkspace.on(tuner.device)
        blocks = routing.align(tuner.gpu, routes, count, block_m, workspace)
        firsts = [GroupedConfig(128, 64, 4, 8), GroupedConfig(128, 64, 3, 8), GroupedConfig(64, 64, 3, 4)]
        seconds = [
            GroupedConfig(128, 64, 3, 8, 1), GroupedConfig(128, 64, 3, 8, 2), GroupedConfig(128, 64, 3, 8, 8),
            GroupedConfig(128, 64, 4, 8, 8), GroupedConfig(128, 64, 3, 4, 8), GroupedConfig(256, 64, 4, 8, 4),
        ]  # fmt: skip
        first = tuner.best(
            f"prompt 1 x {tokens}, blocks of {block_m}, {2 * flops / 1e9:.0f} GFLOP",
            ((c, lambda i, c=c: lambda: experts.prompt_first(tuner.gpu, x, routes, blocks, matrices, c)) for c in firsts),
            2 * flops // 1000, 1,
        )  # fmt: skip
        act = experts.prompt_first(tuner.gpu, x, routes, blocks, matrices, first)
        second = tuner.best(
            f"prompt 2 x {tokens}, blocks of {block_m}, {flops / 1e9:.0f} GFLOP",
            ((c, lambda i, c=c: lambda: experts.prompt_second(tuner.gpu, act, routes, blocks, matrices, c)) for c in seconds),
            flops // 1000, 1,
        )  # fmt: skip
        both = measure(
            [lambda: experts.prompt_experts(tuner.gpu, x, routes, blocks, matrices, x, first, second)] * 3,
            tuner.device,
        )
        entry = {"block_m": block_m, "first": list(astuple(first)), "second": list(astuple(second)), "prompt": True}
        found[block_m] = (both, entry)
    tuner.say(f"  {tokens} prompt tokens: " + ", ".join(f"blocks of {m}: {us:.0f} us" for m, (us, _) in found.items()))
    return min(found.values(), key=lambda one: one[0])[1]


def tune_attention(tuner: Tuner, config: ModelConfig, loads: Sequence[tuple[int, int]]) -> None:
    mla, heads = config.attention, config.num_attention_heads
    assert isinstance(mla, LatentAttention)
    w_uk = tuner.randn(heads, mla.qk_nope_head_dim, mla.kv_lora_rank, scale=0.02)
    w_uv = tuner.randn(heads, mla.kv_lora_rank, mla.v_head_dim, scale=0.02)
    for tokens, context in loads:
        pages = -(-context // 16)
        slots = (tokens * pages + 1) * 16
        sets = max(2, min(40, -(-L2_BYTES // (slots * mla.latent_dim * 2))))
        caches = [tuner.randn(slots, mla.latent_dim) for _ in range(sets)]
        table = torch.arange(tokens * pages, device=tuner.device, dtype=torch.int32).view(tokens, pages)
        lens = torch.full((tokens,), context, dtype=torch.int32, device=tuner.device)
        paged, q = paged_decode.Paged(table, lens, 16), tuner.randn(tokens, heads, mla.latent_dim)
        nbytes = tokens * context * mla.latent_dim * 2
        best = None
        for splits in _split_counts(tuner.gpu, tokens, context):
            plan = paged_decode.SplitPlan(splits, 0)
            config_of_plan = tuner.best(
                f"mla {heads} heads, {tokens} x {context}, {splits} splits",
                (
                    (c, lambda i, c=c, plan=plan: lambda: paged_decode.mla_parts(
                        tuner.gpu, q, caches[i], paged, 0.1, plan, c))
                    for c in MLA_CANDIDATES if c.block_h <= max(16, heads) * 2
                ),
                nbytes, sets,
            )  # fmt: skip
            both = measure(
                [
                    lambda i=i, plan=plan, c=config_of_plan: combine.combine_values(
                        tuner.gpu, paged_decode.mla_parts(tuner.gpu, q, caches[i % sets], paged, 0.1, plan, c), w_uv
                    )
                    for i in range(max(sets, 8))
                ],
                tuner.device,
            )
            tuner.say(f"    with combining {both:.1f} us")
            if best is None or both < best[0]:
                best = (both, [splits, *astuple(config_of_plan)])
        assert best is not None
        tuner.found.setdefault("mla", {}).setdefault(f"{heads}x{mla.kv_lora_rank}", {})[str(tokens)] = best[1]
        new = mla_inputs.NewTokens(
            tuner.randn(tokens, mla.kv_lora_rank), tuner.randn(tokens, mla.qk_rope_head_dim),
            tuner.randn(mla.kv_lora_rank), 1e-6, *(torch.randn((tokens, 32), device=tuner.device) for _ in range(2)),
            torch.arange(tokens, device=tuner.device),
        )  # fmt: skip
        q_in = tuner.randn(tokens, heads, mla.qk_head_dim)
        inputs = measure([lambda: mla_inputs.decode_inputs(tuner.gpu, q_in, new, w_uk, caches[0])] * 16, tuner.device)
        tuner.say(f"    inputs in {inputs:.1f} us")


def _split_counts(gpu: GpuDevice, tokens: int, context: int) -> list[int]:
    """Powers of two, from one program for two processors to two programs for each processor."""
    around = 1 << max(0, (gpu.processors // tokens).bit_length() - 1)
    return sorted({max(1, min(64, context // 32, around * f // 4)) for f in (1, 2, 4, 8)})


def show_flash(tuner: Tuner, config: ModelConfig, sequences: int, length: int) -> None:
    mla, heads = config.attention, config.num_attention_heads
    assert isinstance(mla, LatentAttention)
    total = sequences * length
    q, k_pe = tuner.randn(total, heads, mla.qk_head_dim), tuner.randn(total, mla.qk_rope_head_dim)
    k, v = (tuner.randn(total, heads, 128) for _ in range(2))
    starts = list(range(0, total + 1, length))
    tiles = flash_prefill.make_tiles(starts, starts[:-1], [1] * sequences, tuner.device)
    out = torch.empty_like(v)
    flops = sequences * heads * length * length * (mla.qk_head_dim + 128)
    tuner.best(
        f"flash {heads} heads, {sequences} x {length}, {flops / 1e9:.0f} GFLOP",
        (
            (c, lambda i, c=c: lambda: flash_prefill.flash_prefill(tuner.gpu, q, k, k_pe, v, out, tiles, 0.1, c))
            for c in (
                flash_prefill.FlashConfig(64, 3, 8), flash_prefill.FlashConfig(64, 2, 8), flash_prefill.FlashConfig(128, 2, 8),
                flash_prefill.FlashConfig(64, 4, 8), flash_prefill.FlashConfig(32, 3, 4),
            )
        ),
        flops // 1000, 1,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048, 8192, 16384])
    parser.add_argument("--attention", action="store_true", help="time attention's variants too")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda")
    tuner = Tuner(device, GpuDevice.of(device))
    file = TUNED / (tuner.gpu.name.replace(" ", "_") + ".json")
    tuner.found = known(tuner.gpu)
    started = time.perf_counter()
    for folder in args.configs:
        tune(tuner, ModelConfig.from_folder(folder), args)
    print(f"{time.perf_counter() - started:.0f} s")
    if args.write:
        file.parent.mkdir(exist_ok=True)
        file.write_text(layout(tuner.found), encoding="utf-8")


def tune(tuner: Tuner, config: ModelConfig, args: argparse.Namespace) -> None:
    tuner.say(f"== hidden {config.hidden_size}, {config.num_attention_heads} heads")
    if args.attention:
        tune_attention(tuner, config, [(1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 256)])
        show_flash(tuner, config, 8, 1024)
    tune_linear(tuner, config, [b for b in args.batches if b > 1])
    tune_experts(tuner, config, [1, *args.batches], args.prompts)


def known(gpu: GpuDevice) -> dict[str, Any]:
    """What the engine reads for this device now. This may be another device's file, until this one has its own."""
    found: dict[str, Any] = json.loads(json.dumps(Tuned.of(gpu).measured))
    return found


def layout(found: dict[str, Any]) -> str:
    """JSON with one line for each innermost entry."""
    lines = []
    for kind, shapes in sorted(found.items()):
        rows = [f"  {json.dumps(shape)}: {json.dumps(entry)}" for shape, entry in sorted(shapes.items())]
        lines.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
