"""Tensor-parallel runs in processes of their own, forked after torch is imported: test_tensor_parallel runs this.

stdin: a JSON list of runs; stdout: for each its answers and every rank's logits. A run with tp 1 has no group. Ranks
on GPUs talk through NCCL with `nccl`, else through gloo, so that two of them can share one GPU.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from ziphius.checkpoint.checkpoint import open_checkpoint
from ziphius.config import ServeConfig
from ziphius.engine.channel import MemoryChannel
from ziphius.engine.loading import LoadedRank, load_rank
from ziphius.engine.team import join_team, select_device
from ziphius.ipc.messages import AddRequest, RequestOutput, SamplingParams, StepOutput
from ziphius.ranks.layout import rank_environment, rank_specs
from ziphius.ranks.spec import WorkerSpec

_PATIENCE_S = 120


def outputs(channel: MemoryChannel) -> Iterator[RequestOutput]:
    while channel.from_engine:
        message = channel.from_engine.popleft()
        if isinstance(message, StepOutput):
            yield from message.outputs


def answers(loaded: LoadedRank, requests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Everything said about each request; a request with `after` waits until that one has ended."""
    channel = MemoryChannel()
    engine = loaded.make_engine(channel)
    told: dict[str, dict[str, Any]] = {}
    waiting = list(requests)
    while waiting or not engine.idle:
        for request in [r for r in waiting if r.get("after") is None or told.get(r["after"], {}).get("finish")]:
            waiting.remove(request)
            told[request["rid"]] = {"ids": [], "logprobs": [], "prompt_logprobs": [], "finish": None, "cached": 0}
            settings = {"max_new_tokens": 12, "seed": 7, "ignore_eos": True, **request["sampling"]}
            sampling = msgspec.convert(settings, SamplingParams, strict=False)
            channel.to_engine.append(AddRequest(rid=request["rid"], prompt_ids=request["ids"], sampling=sampling))
        engine.turn()
        for output in outputs(channel):
            answer = told[output.rid]
            answer["ids"] += output.token_ids
            answer["logprobs"] += [t.logprob for t in output.logprobs]
            answer["prompt_logprobs"] += [t.logprob for t in output.prompt_logprobs]
            answer["cached"] = output.cached_tokens
            answer["preemptions"] = max(output.preemptions, answer.get("preemptions", 0))
            answer["finish"] = output.finish.kind if output.finish else None
    return told


def record_logits(loaded: LoadedRank) -> list[torch.Tensor]:
    model, seen = loaded.runner.model, []
    whole = model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        result = whole(hidden)
        seen.append(result.clone())
        return result

    model.logits = logits
    return seen


def rank_main(spec: WorkerSpec, requests: list[dict[str, Any]], folder: str, nccl: bool) -> None:
    faulthandler.dump_traceback_later(_PATIENCE_S - 10)  # where a rank hangs, if one does
    torch.set_num_threads(1)
    if nccl:
        select_device(spec)
    with join_team(spec, torch.device("cuda", spec.device_index) if nccl else torch.device("cpu")) as team:
        loaded = load_rank(spec.config, open_checkpoint(spec.model_path, Path(folder)), lambda progress: None, team)
        seen = record_logits(loaded)
        if spec.rank == 0:
            told: dict[str, Any] = {
                "answers": answers(loaded, requests),
                "kv_tokens": loaded.ready.kv_tokens,
                "weight_bytes": loaded.ready.weight_bytes,
                "predicted_weight_bytes": loaded.ready.predicted_weight_bytes,
                "device": loaded.ready.device,
            }
            Path(folder, "told.json").write_text(json.dumps(told))
        else:
            loaded.make_follower().run()
        loaded.leave()
        torch.save(torch.cat(seen).cpu(), Path(folder, f"logits-{spec.rank}.pt"))


def run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="zr-") as folder:
        config = ServeConfig(**job["config"])
        os.environ.update(rank_environment(config, os.environ))  # as ranks of a server have it
        specs = rank_specs(config, config.model, Path(folder))
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=rank_main, args=(s, job["requests"], folder, job["nccl"]), daemon=True)
            for s in specs
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(_PATIENCE_S)
        if any(rank.exitcode != 0 for rank in ranks):
            raise SystemExit(f"{job['config']}: {[rank.exitcode for rank in ranks]}")
        told: dict[str, Any] = json.loads(Path(folder, "told.json").read_text())
        logits = [torch.load(Path(folder, f"logits-{rank}.pt")) for rank in range(config.tp)]
        told["logits"] = job["logits"]
        torch.save(logits, job["logits"])
        return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump([run(job) for job in json.load(sys.stdin)], sys.stdout)
