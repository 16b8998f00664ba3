"""Runs rank_runs.py and reads what came of it: the same requests on several shapes and numbers of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import torch


@dataclass
class Run:
    """One shape on one number of ranks."""

    told: dict[str, Any]
    logits: list[torch.Tensor]
    """Of each rank, in the order of the steps."""

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        answers: dict[str, dict[str, Any]] = self.told["answers"]
        return answers


def run_all(
    folder: Path,
    shapes: Mapping[str, dict[str, Any]],
    sizes: Sequence[int],
    requests: Sequence[dict[str, Any]],
    device: str = "cpu",
    nccl: bool = False,
) -> dict[tuple[str, int], Run]:
    """Every shape on every size, in float32."""
    jobs = []
    for name, settings in shapes.items():
        model = tiny_models.write_checkpoint(folder / name, settings)
        for tp in sizes:
            # 20 pages of 4: too few for all at once, so that requests are preempted as well.
            config = {
                **{"model": str(model), "tp": tp, "dtype": "float32", "device": device, "threads": 1},
                **{"page_size": 4, "max_total_tokens": 80, "context_length": 72, "chunked_prefill_size": 16},
                **{"max_running_requests": 8},  # on a GPU: few graphs to capture
            }
            logits = str(folder / f"{name}-{tp}.pt")
            jobs.append({"config": config, "requests": list(requests), "logits": logits, "nccl": nccl and tp > 1})
    script = Path(__file__).with_name("rank_runs.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(jobs), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout)
    keys = [(name, tp) for name in shapes for tp in sizes]
    return {key: Run(each, torch.load(each["logits"])) for key, each in zip(keys, told, strict=True)}
