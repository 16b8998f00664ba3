"""Several ranks on GPUs against one: over NCCL where there are several, over gloo where one GPU has to do for both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from ranked import run_all

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

# Products on a GPU are at least 16 wide.
SHAPES = {"llama": tiny_models.LLAMA, "v2": {**tiny_models.V2, "qk_rope_head_dim": 16}}
LONG = [(7 * i) % 120 + 3 for i in range(40)]
REQUESTS: list[dict[str, Any]] = [
    {"rid": "greedy", "ids": [5, 6, 7], "sampling": {"temperature": 0.0, "logprobs": True, "top_logprobs": 3}},
    {"rid": "long", "ids": LONG, "sampling": {"temperature": 0.0, "max_new_tokens": 20}},
    {"rid": "plain", "ids": LONG[:6], "sampling": {"temperature": 0.0, "max_new_tokens": 30}},
    {"rid": "warm", "ids": [9, 8], "sampling": {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_new_tokens": 24}},
]
ONE_RANK = """
import sys
import torch
import torch.distributed as dist
from ziphius.distributed import Rendezvous, join

device = torch.device("cuda", 0)
torch.cuda.set_device(device)
with join(Rendezvous(path=sys.argv[1]), 0, 1, device) as (parallel, store):
    assert (parallel.rank, parallel.size, dist.get_backend()) == (0, 1, "nccl")
    x = torch.arange(8.0, device=device)
    graph = torch.cuda.CUDAGraph()
    dist.all_reduce(x)
    with torch.cuda.graph(graph):
        dist.all_reduce(x)
    graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == list(range(8))
"""


def compare(folder: Path, sizes: tuple[int, ...], nccl: bool) -> None:
    runs = run_all(folder, SHAPES, sizes, REQUESTS, "cuda", nccl)
    for shape in SHAPES:
        one = runs[shape, 1].answers
        for tp in sizes[1:]:
            many = runs[shape, tp].answers
            assert {rid: a["ids"] for rid, a in many.items()} == {rid: a["ids"] for rid, a in one.items()}, (shape, tp)
            assert many["greedy"]["logprobs"] == pytest.approx(one["greedy"]["logprobs"], abs=1e-3)


def test_two_ranks_on_one_gpu(tmp_path: Path) -> None:
    compare(tmp_path, (1, 2), nccl=False)


def test_a_group_over_nccl_can_be_made_and_captured(tmp_path: Path) -> None:
    """All of it that one GPU allows: NCCL refuses two ranks on the same one."""
    argv = [sys.executable, "-c", ONE_RANK, str(tmp_path / "store")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_on_gpus_of_their_own(tmp_path: Path) -> None:
    compare(tmp_path, (1, 2, 4) if torch.cuda.device_count() >= 4 else (1, 2), nccl=True)
