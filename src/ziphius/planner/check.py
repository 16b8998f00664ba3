"""The plan inside `start`: whether a resolved config fits a host."""

from __future__ import annotations

from typing import cast

from ziphius.config import ServeConfig
from ziphius.errors import ConfigError, DoesNotFit, LacksMemory
from ziphius.formats import Device, resolve_formats
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host, times
from ziphius.planner.plan import Candidate, Plan, PlanRequest
from ziphius.planner.planner import build_plan
from ziphius.planner.software import torch_build
from ziphius.planner.validity import Engine, require_deterministic, require_tp


def check_start(config: ServeConfig, source: ModelSource, host: Host, *, torch_cuda: bool | None = None) -> Plan:
    """The plan for exactly what `config` asks of the native engine; its `shown` is the candidate that will run.

    DoesNotFit, with the numbers and the nearest changes, when the model does not fit; ConfigError when --tp ranks
    cannot share the model, or when a GPU is asked for and there is none. With several machines, the plan assumes
    that the others are like `host`.

    `torch_cuda`: whether torch has CUDA, which decides what --device auto means to the engine (default: read from
    the installed torch's files).
    """
    if config.device == "cuda" and not host.gpus:
        why = f": {host.gpu_error}" if host.gpu_error else ""
        raise ConfigError(f"device is cuda, but there is no GPU here{why}; use --device cpu", param="device")
    request = request_of(config, host, source, torch_cuda)
    if config.deterministic and config.engine == "native":
        device = request.device or "cpu"
        dtype, weights_format = resolve_formats(device, config.dtype, config.weights_format)
        require_deterministic(device, dtype, weights_format)
    require_tp(source.config, config.tp, request.weights_format or "bf16", request.engine or "native")
    plan = build_plan(source, times(host, config.nnodes), request)
    if plan.recommendation is None:
        raise refusal(plan)
    return plan


def request_of(config: ServeConfig, host: Host, source: ModelSource, torch_cuda: bool | None = None) -> PlanRequest:
    """A PlanRequest for what `config` says. Each `auto` is made definite as the engine does it."""
    device: Device = "cpu"
    if config.device == "cuda":
        device = "cuda"
    elif config.device == "auto" and host.gpus:
        if torch_cuda is None:
            build = torch_build()
            torch_cuda = build is not None and build.cuda is not None
        device = "cuda" if torch_cuda else "cpu"
    engine = cast(Engine, config.engine)
    dtype, weights_format = resolve_formats(device, config.dtype, config.weights_format)
    if engine == "sglang" and config.dtype == "auto" and device == "cpu":
        # SGLang computes in the checkpoint's type on a CPU too.
        dtype, weights_format = "bfloat16", weights_format if config.weights_format != "auto" else "bf16"
    stored = source.config.quantization
    if stored is not None and stored.weights_format is not None and config.weights_format == "auto":
        weights_format = stored.weights_format
    return PlanRequest(
        device=device,
        engine=engine,
        tp=config.tp,
        weights_format=weights_format,
        dtype=dtype if config.dtype != "auto" or engine == "sglang" else None,
        mem_fraction=config.mem_fraction,
        context_length=config.context_length,
        max_running_requests=config.max_running_requests,
        max_total_tokens=config.max_total_tokens,
        page_size=config.page_size,
        chunked_prefill_size=config.chunked_prefill_size,
    )


def refusal(plan: Plan) -> DoesNotFit:
    """One sentence for a person: what was asked, why it does not fit, and the nearest changes after which it would.

    It is LacksMemory where only memory is missing: a server that runs now may hold it.
    """
    asked = plan.candidates[0] if plan.candidates else None
    text = f"{plan.model.name} does not fit here"
    if asked is not None:
        text += f" ({asked.engine}, TP {asked.tp}, {asked.weights_format}): {_reason(asked)}"
    if not plan.alternatives and asked is not None and asked.failures:
        text += f"; sizes that divide this model are {', '.join(map(str, plan.valid_tp))}"
    changes = [f"{a.change}: {a.detail}" for a in plan.alternatives]
    text += "".join(f"; {change}" for change in changes)
    lacks_memory = asked is not None and asked.verdict in ("short", "too_big") and not asked.missing_gpus
    return LacksMemory(text) if lacks_memory else DoesNotFit(text)


def _reason(candidate: Candidate) -> str:
    if candidate.missing_gpus:
        have = candidate.tp - candidate.missing_gpus
        return f"{candidate.tp} GPUs are needed, {have} {'is' if have == 1 else 'are'} there"
    if candidate.verdict in ("fits", "short") and candidate.not_yet is not None:
        return candidate.not_yet
    return candidate.reason
