"""Measures the sums over ranks of a decode step: NCCL against memory that the GPUs share, inside a CUDA graph.

    python benchmarks/all_reduce.py --tp 4 --hidden 5120 --rows 1 8 32 128 --json result.json

There is one process for each GPU. Each layer of DeepSeek-V2 needs two sums, so a step of 60 layers takes 120 times the
time that is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import Tensor

from ziphius.config import ServeConfig
from ziphius.distributed import ParallelState, Rendezvous, join
from ziphius.ranks.layout import rank_environment

_IN_A_GRAPH = 100


@dataclass(frozen=True)
class Row:
    rows: int
    nccl_us: float
    peers_us: float | None
    """None where the GPUs share no memory, or the rows do not fit into it."""


def time_in_graph(reduce: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Microseconds of one sum, the median over replays of a graph of many."""
    reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_IN_A_GRAPH):
            reduce(x)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / _IN_A_GRAPH)
    return round(statistics.median(times[2:]), 2)


def check(parallel: ParallelState, x: Tensor) -> None:
    part = torch.full_like(x, parallel.rank + 1.0)
    expected = parallel.size * (parallel.size + 1) / 2
    total = parallel.all_reduce(part)
    if not bool((total == expected).all()):
        raise SystemExit(f"rank {parallel.rank}: a sum of {tuple(x.shape)} is wrong")


def rank_main(rank: int, size: int, path: str, rows: Sequence[int], hidden: int, out: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    found = []
    with join(Rendezvous(path=path), rank, size, device) as (parallel, _):
        for count in rows:
            x = torch.randn(count, hidden, device=device).bfloat16()
            check(parallel, x)
            peers = parallel.peers
            through_peers = time_in_graph(peers.sum, x) if peers is not None and peers.takes(x) else None
            found.append(Row(count, time_in_graph(replace(parallel, peers=None).all_reduce, x), through_peers))
    if rank == 0:
        out.write_text(json.dumps([asdict(row) for row in found]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    os.environ.update(rank_environment(ServeConfig(tp=args.tp), os.environ))  # the same as for the ranks of a server
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        ranks = [
            context.Process(target=rank_main, args=(r, args.tp, f"{folder}/store", args.rows, args.hidden, out))
            for r in range(args.tp)
        ]
        for rank in ranks:
            rank.start()
        while not any(rank.exitcode for rank in ranks) and (alive := [rank for rank in ranks if rank.is_alive()]):
            wait([rank.sentinel for rank in alive])
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()  # a rank that is left would wait for the others for ever
            raise SystemExit("a rank failed")
        found = json.loads(out.read_text(encoding="utf-8"))
    print(f"{torch.cuda.get_device_name()} x {args.tp}, rows of {args.hidden} in bfloat16")
    print("  rows    NCCL us   shared memory us")
    for row in found:
        shared = "-" if row["peers_us"] is None else f"{row['peers_us']:.2f}"
        print(f"{row['rows']:6d} {row['nccl_us']:10.2f} {shared:>18s}")
    if args.json:
        told = {"device": torch.cuda.get_device_name(), "tp": args.tp, "hidden": args.hidden, "rows": found}
        args.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
