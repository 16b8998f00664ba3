"""Admission: whether an instance may start, decided here alone: from its settings and its model, and from memory.

The manager asks before anything is started, the server when it has read the model's config, and each rank when it
knows how much memory it really has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ziphius.checkpoint.config import ModelConfig
from ziphius.config import ServeConfig
from ziphius.errors import ConfigError, DoesNotFit, LacksMemory, ZiphiusError
from ziphius.formats import Device, WeightsFormat, format_named, resolve_formats
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host, times
from ziphius.planner.plan import Candidate, Plan, PlanRequest
from ziphius.planner.planner import build_plan
from ziphius.planner.pool import FittedPool, fit_pool, kv_pool_tokens, pool_limits
from ziphius.planner.validity import Engine, require_context, require_deterministic, require_tp


def admit_model(config: ServeConfig, model: ModelConfig) -> None:
    """ConfigError for what no machine can change: --tp ranks that cannot share `model`, or too long a context.

    A start asks this before anything is fetched or started; each rank asks it again, of the model that it has opened.
    """
    stored = None if model.quantization is None else model.quantization.weights_format
    asked = format_named(config.weights_format)
    # What `auto` means depends on the device, but no format that it may mean has blocks which a share could cut.
    weights_format = asked.name if asked is not None else stored or "bf16"
    require_tp(model, config.tp, weights_format, cast(Engine, config.engine))
    require_context(model, config.context_length)


def admit_on_host(config: ServeConfig, source: ModelSource, host: Host, *, torch_cuda: bool) -> Plan:
    """The plan for exactly what `config` asks of the native engine; its `shown` is the candidate that will run.

    DoesNotFit, with the numbers and the nearest changes, when the model does not fit; ConfigError as `admit_model`, and
    when a GPU is asked for and there is none.

    `torch_cuda`: whether torch has CUDA, which decides what --device auto means to the engine.
    """
    require_device(config, host)
    if config.deterministic:
        device = request_on_host(config, host, source, torch_cuda=torch_cuda).device or "cpu"
        require_deterministic(device, *resolve_formats(device, config.dtype, config.weights_format))
    admit_model(config, source.config)
    plan = plan_on_host(config, source, host, torch_cuda=torch_cuda)
    if plan.recommendation is None:
        raise refusal(plan)
    return plan


def require_device(config: ServeConfig, host: Host) -> None:
    """ConfigError when a GPU is asked for and there is none. No model is needed to say so."""
    if config.device == "cuda" and not host.gpus:
        why = f": {host.gpu_error}" if host.gpu_error else ""
        raise ConfigError(f"device is cuda, but there is no GPU here{why}; use --device cpu", param="device")


def plan_on_host(config: ServeConfig, source: ModelSource, host: Host, *, torch_cuda: bool) -> Plan:
    """The plan for exactly what `config` asks of its engine, whether it fits or not; ConfigError as build_plan.

    With several machines, the plan assumes that the others are like `host`.
    """
    return build_plan(source, times(host, config.nnodes), request_on_host(config, host, source, torch_cuda=torch_cuda))


def overridden(error: ZiphiusError, force: bool) -> str:
    """What to note about a start that `force` allows in spite of `error`. Without `force` it raises the error."""
    if force:
        return f"started although {error.message}"
    if isinstance(error, DoesNotFit):
        raise type(error)(f"{error.message}; --force starts it all the same") from error
    raise error


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What a rank has for its KV pool, measured."""

    device: Device
    dtype: str
    """Type of the cache's values."""
    free_bytes: int
    """After the weights are loaded."""
    free_before_bytes: int
    """Before the weights were loaded."""


def admit_pool(config: ServeConfig, model: ModelConfig, memory: RankMemory) -> FittedPool:
    """The KV pool of one rank in the memory that it has, and the context length that it serves.

    The context length is the one that was asked for, else the model's, else the longest for which memory or
    max_total_tokens has room. DoesNotFit when the one that was asked for has no room, or no useful one has.
    """
    wanted = require_context(model, config.context_length)
    limits = pool_limits(
        model,
        _request(config, memory.device, memory.dtype, None),
        memory.device,
        memory.dtype,
        tp=config.tp,
        context_length=wanted,
        free_bytes=memory.free_bytes,
        free_before_bytes=memory.free_before_bytes,
        ranks_on_host=config.tp // config.nnodes,
    )
    if config.context_length is None:
        return fit_pool(model, config.tp, limits)
    size = kv_pool_tokens(model, config.tp, limits)
    if size.tokens < wanted:
        raise DoesNotFit(
            f"a context of {wanted} tokens does not fit a KV cache of {size.tokens} tokens: "
            f"use --context-length {size.tokens} or less, or --max-total-tokens {wanted} or more"
        )
    return FittedPool(wanted, size)


def request_on_host(config: ServeConfig, host: Host, source: ModelSource, *, torch_cuda: bool) -> PlanRequest:
    """A PlanRequest for what `config` says. Each `auto` is made definite as the engine does it."""
    on_gpu = config.device == "cuda" or (config.device == "auto" and bool(host.gpus) and torch_cuda)
    device: Device = "cuda" if on_gpu else "cpu"
    engine = config.engine
    dtype, weights_format = resolve_formats(device, config.dtype, config.weights_format)
    if engine == "sglang" and config.dtype == "auto" and device == "cpu":
        # SGLang computes in the checkpoint's type on a CPU too.
        dtype, weights_format = "bfloat16", weights_format if config.weights_format != "auto" else "bf16"
    stored = source.config.quantization
    if stored is not None and stored.weights_format is not None and config.weights_format == "auto":
        weights_format = stored.weights_format
    told = dtype if config.dtype != "auto" or engine == "sglang" else None
    return _request(config, device, told, weights_format)


def _request(
    config: ServeConfig, device: Device, dtype: str | None, weights_format: WeightsFormat | None
) -> PlanRequest:
    return PlanRequest(
        device=device,
        engine=cast(Engine, config.engine),
        tp=config.tp,
        weights_format=weights_format,
        dtype=dtype,
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
