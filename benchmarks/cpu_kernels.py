"""Times of the CPU kernels by themselves, on random weights of SmolLM2-135M's sizes: no server and no sampler.

    python benchmarks/cpu_kernels.py --threads 2 --json out.json

Each case is repeated for --seconds; its fastest and its median time are printed in milliseconds. Other programs on the
machine raise the median first. GB/s is what a step reads (weights and cache) divided by its fastest time; compare it
with the speed of the memory. GMAC/s is the number of int8 multiplications of a step divided by the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ziphius.kernels.cpu.linear import Int8Linear
from ziphius.kernels.cpu.llama import LlamaLayerWeights, LlamaSizes, LlamaStack, LlamaStep, compile_jobs
from ziphius.kernels.cpu.pool import ThreadPool
from ziphius.kernels.cpu.quantize import PackedWeight, pack_weight
from ziphius.kernels.cpu.target import TARGET

SIZES = LlamaSizes(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, eps=1e-5, page_size=16)
LAYERS, VOCAB, PAGES = 30, 49152, 1100


@dataclass(frozen=True)
class Result:
    name: str
    fastest_ms: float
    median_ms: float
    runs: int
    gb_s: float | None
    gmac_s: float | None


class Bench:
    """A stack and a head with random weights, and what has been measured with them."""

    def __init__(self, threads: int, seconds: float) -> None:
        self.pool = ThreadPool(threads)
        self.seconds = seconds
        self.results: list[Result] = []
        layers = [self._layer() for _ in range(LAYERS)]
        shape = (PAGES * SIZES.page_size, SIZES.kv_heads, SIZES.head_dim)
        self.caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS)]
        self.stack = LlamaStack(layers, torch.ones(SIZES.hidden), SIZES, self.caches, self.pool)
        self.linear = Int8Linear(self.pool)
        self.head = _weight(VOCAB, SIZES.hidden)
        first = layers[0]
        self.weights = LAYERS * sum(w.data.numel() for w in (first.qkv, first.o, first.gate_up, first.down))

    @staticmethod
    def _layer() -> LlamaLayerWeights:
        hidden, norm = SIZES.hidden, torch.ones(SIZES.hidden)
        return LlamaLayerWeights(
            input_norm=norm,
            qkv=_weight(SIZES.qkv, hidden),
            o=_weight(hidden, SIZES.attended),
            post_attention_norm=norm,
            gate_up=_weight(2 * SIZES.intermediate, hidden),
            down=_weight(hidden, SIZES.intermediate),
        )

    def measure(self, name: str, run: Callable[[], object], read: int = 0, macs: int = 0) -> None:
        run()
        times: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        best = min(times)
        result = Result(
            name=name,
            fastest_ms=round(best * 1e3, 3),
            median_ms=round(statistics.median(times) * 1e3, 3),
            runs=len(times),
            gb_s=round(read / best / 1e9, 1) if read else None,
            gmac_s=round(macs / best / 1e9, 1) if macs else None,
        )
        self.results.append(result)
        rates = f"{result.gb_s or '':>8} GB/s {result.gmac_s or '':>8} GMAC/s"
        print(f"{name:<34} {result.fastest_ms:>9} ms  median {result.median_ms:>9} ms {rates}", flush=True)

    def decode(self, rows: int, context: int) -> None:
        pages = -(-context // SIZES.page_size)
        table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages) % PAGES
        positions = torch.full((rows,), context - 1)
        slots = table[:, -1].long() * SIZES.page_size + (context - 1) % SIZES.page_size
        step = _step(rows, positions, slots, table, [context] * rows, list(range(rows + 1)), rows)
        cache = rows * context * SIZES.kv_heads * SIZES.head_dim * 8 * LAYERS
        name = f"decode {rows} x {context} tokens"
        self.measure(name, lambda: self.stack(step), self.weights + cache, rows * self.weights)

    def prefill(self, tokens: int, before: int) -> None:
        pages = -(-(before + tokens) // SIZES.page_size)
        table = torch.arange(pages, dtype=torch.int32).view(1, pages)
        positions = torch.arange(before, before + tokens)
        step = _step(tokens, positions, positions, table, [before + tokens], [0, tokens], 0)
        self.measure(f"prefill {tokens} after {before}", lambda: self.stack(step), macs=tokens * self.weights)

    def logits(self, rows: int) -> None:
        x, size = torch.randn(rows, SIZES.hidden), self.head.data.numel()
        self.measure(f"head {rows}", lambda: self.linear(x, self.head), size, rows * size)


def _weight(out_features: int, in_features: int) -> PackedWeight:
    values = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    return pack_weight(values, torch.full((out_features,), in_features**-0.5 / 64))


def _step(
    tokens: int,
    positions: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    lens: list[int],
    starts: list[int],
    decodes: int,
) -> LlamaStep:
    angles = positions.float().unsqueeze(1) * 1e5 ** (-torch.arange(SIZES.head_dim // 2) / (SIZES.head_dim // 2))
    x = torch.randn(tokens, SIZES.hidden)
    return LlamaStep(x, angles.cos(), angles.sin(), slots, table, lens, starts, decodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="of repetitions of each case")
    parser.add_argument("--json", help="write the results here")
    arguments = parser.parse_args()
    # Torch's threads spin a while after each parallel operation; the server avoids them in the same way.
    torch.set_num_threads(1)
    bench = Bench(arguments.threads, arguments.seconds)
    start = time.perf_counter()
    compile_jobs()
    compiled = time.perf_counter() - start
    print(f"{TARGET.byte_dot}, {arguments.threads} threads, compiled in {compiled:.1f} s", flush=True)
    for rows in (1, 2, 4, 8, 16, 32):
        bench.decode(rows, 105)
    for rows, context in ((1, 900), (1, 8000), (16, 600)):
        bench.decode(rows, context)
    for rows in (1, 8, 16, 32):
        bench.logits(rows)
    for tokens, before in ((16, 0), (128, 0), (512, 0), (388, 512)):
        bench.prefill(tokens, before)
    if arguments.json:
        told = {
            "cpu": platform.processor() or platform.machine(),
            "byte_dot": TARGET.byte_dot,
            "threads": arguments.threads,
            "compile_s": round(compiled, 2),
            "results": [asdict(result) for result in bench.results],
        }
        Path(arguments.json).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
