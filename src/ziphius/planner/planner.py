"""build_plan: every candidate on a host, the recommended one, and what would have to change where none fits."""

from __future__ import annotations

from collections.abc import Iterable

from ziphius.errors import ConfigError
from ziphius.formats import FORMATS, Device, WeightsFormat, planned_formats
from ziphius.planner import memory
from ziphius.planner.abilities import Abilities, abilities
from ziphius.planner.alternatives import alternatives_for
from ziphius.planner.commands import command_for, shortened
from ziphius.planner.evaluate import Question, evaluate
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host
from ziphius.planner.memory import gib
from ziphius.planner.plan import Candidate, ModelSummary, Plan, PlanRequest, Recommendation
from ziphius.planner.roofline import active_parameters
from ziphius.planner.validity import Engine, require_context, valid_tp_sizes

TP_SIZES = (1, 2, 3, 4, 5, 6, 8, 16)


def build_plan(source: ModelSource, host: Host, request: PlanRequest, able: Abilities | None = None) -> Plan:
    """What fits on `host`. ConfigError for a request that contradicts the model or the host."""
    device = _device(host, request)
    context = require_context(source.config, request.context_length)
    able = able or abilities()
    question = Question(source=source, host=host, request=request, context_length=context, able=able)
    every = [evaluate(question, device, *cell) for cell in _cells(source, host, request, device)]
    sizes = {request.tp} if request.tp is not None else set(_shown_sizes(host, device))
    asked = tuple(c for c in every if c.tp in sizes and _is_asked(c, request))
    best = _best(asked, request, device)
    return Plan(
        model=_summary(source, device, question, asked),
        host=host,
        request=request,
        context_length=context,
        device=device,
        candidates=asked,
        valid_tp=valid_tp_sizes(source.config, "bf16", "native"),
        fits=any(_counts(c, request) for c in asked),
        recommendation=None if best is None else _recommendation(question, best),
        alternatives=() if best is not None else alternatives_for(question, asked, every),
        notes=tuple(_notes(question, asked, device)),
        shown=best or _nearest(asked, device),
    )


def _device(host: Host, request: PlanRequest) -> Device:
    device: Device = request.device or ("cuda" if host.gpus else "cpu")
    if device == "cuda" and not host.gpus:
        reason = f" ({host.gpu_error})" if host.gpu_error else ""
        raise ConfigError(f"there is no GPU here{reason}; name some with --gpu, or a recorded host with --host-file")
    return device


def _shown_sizes(host: Host, device: Device) -> tuple[int, ...]:
    """The usual sizes, and the number of GPUs that are there."""
    return (*TP_SIZES, len([g for g in host.gpus if not g.mig]) or 1) if device == "cuda" else (1,)


def _cells(
    source: ModelSource, host: Host, request: PlanRequest, device: Device
) -> Iterable[tuple[Engine, int, WeightsFormat]]:
    formats = _formats(source, device)
    if request.weights_format is not None and request.weights_format not in formats:
        formats = (request.weights_format, *formats)
    sizes = {request.tp or 1, *_shown_sizes(host, device)}
    if device == "cuda":
        sizes.update(valid_tp_sizes(source.config, "bf16", "native"))  # a large model may need more GPUs than are shown
    both = device == "cuda" or request.engine == "sglang"
    engines: tuple[Engine, ...] = ("native", "sglang") if both else ("native",)
    for tp in sorted(sizes):
        for engine in engines:
            for weights_format in formats:
                if engine == "native" or FORMATS[weights_format].sglang:
                    yield engine, tp, weights_format


def _formats(source: ModelSource, device: Device) -> tuple[WeightsFormat, ...]:
    """The formats to show: a checkpoint that is quantized already has one; a model without experts has no int4."""
    stored = source.config.quantization
    if stored is not None and stored.weights_format is not None:
        return (stored.weights_format,)
    has_experts = source.config.moe is not None
    return tuple(f for f in planned_formats(device) if has_experts or FORMATS[f].beside_experts is None)


def _is_asked(candidate: Candidate, request: PlanRequest) -> bool:
    return request.engine in (None, candidate.engine) and request.weights_format in (None, candidate.weights_format)


def _counts(candidate: Candidate, request: PlanRequest) -> bool:
    """Whether it fits as asked. A shorter context counts too where no context length was asked for."""
    if candidate.missing_gpus:
        return False
    return candidate.verdict == "fits" or (candidate.verdict == "short" and request.context_length is None)


def _rank(candidate: Candidate, device: Device) -> tuple[int, ...]:
    """A key whose smallest value is the best candidate: whole context, best format, native engine, fewest GPUs."""
    formats = planned_formats(device)  # more than one format is compared only where these are
    return (
        ("fits", "short", "too_big", "unsupported", "invalid").index(candidate.verdict),
        formats.index(candidate.weights_format) if candidate.weights_format in formats else len(formats),
        candidate.engine != "native",
        candidate.tp,
    )


def _best(asked: tuple[Candidate, ...], request: PlanRequest, device: Device) -> Candidate | None:
    able = [c for c in asked if c.runs and _counts(c, request)]
    return min(able, key=lambda c: _rank(c, device), default=None)


def _nearest(asked: tuple[Candidate, ...], device: Device) -> Candidate | None:
    """What to draw where nothing runs: a candidate that would fit, else the one that is too big by the least."""
    drawable = [c for c in asked if c.weights is not None and c.memory_bytes]
    there = [c for c in drawable if not c.missing_gpus] or drawable
    fitting = [c for c in there if c.verdict in ("fits", "short")]
    if fitting:
        return min(fitting, key=lambda c: _rank(c, device))
    return min(there, key=lambda c: c.loaded_bytes - c.memory_bytes, default=None)


def _recommendation(question: Question, best: Candidate) -> Recommendation:
    context = question.context_length if best.verdict == "fits" else shortened(best.kv_tokens)
    fraction = best.mem_fraction or (best.loaded_bytes + best.kv_bytes) / best.memory_bytes
    return Recommendation(
        engine=best.engine,
        tp=best.tp,
        weights_format=best.weights_format,
        context_length=context,
        mem_fraction=round(fraction, 3),
        kv_tokens=best.kv_tokens,
        command=command_for(question, best),
        why=best.reason,
    )


def _summary(source: ModelSource, device: Device, question: Question, asked: tuple[Candidate, ...]) -> ModelSummary:
    config, stored = source.config, source.config.quantization
    tp = min((c.tp for c in asked if not c.failures), default=1)
    return ModelSummary(
        name=source.name,
        given=source.given,
        origin=source.origin,
        architecture=config.architecture,
        parameters=memory.parameter_count(config),
        active_parameters=active_parameters(config),
        layers=config.num_hidden_layers,
        max_context=config.max_position_embeddings,
        quantization=None if stored is None else stored.method,
        kv_bytes_per_token=memory.kv_bytes_per_token(config, tp, question.kv_dtype(device)),
        kv_replicated=config.attention.cache_replicated,
    )


def _notes(question: Question, asked: tuple[Candidate, ...], device: Device) -> Iterable[str]:
    source, host, stored = question.source, question.host, question.config.quantization
    if not source.has_weights and source.origin in ("folder", "config.json"):
        yield "there are no weights beside this config: a plan needs none, the command does"
    if stored is not None:
        yield f"this checkpoint is quantized already ({stored.method})"
    if device == "cpu" and host.gpu_error:
        yield f"a GPU driver is here but could not be asked: {host.gpu_error}"
    if device == "cpu":
        return
    for gpu in host.gpus:
        taken = gpu.memory_total_mib - gpu.memory_free_mib
        # The driver keeps some memory for itself: 0.4% of an idle H200.
        if taken > max(2048, gpu.memory_total_mib // 50):
            who = ", ".join(
                f"{p.name} (pid {p.pid}{'' if p.used_mib is None else f', {gib(p.used_mib * memory.MIB)}'})"
                for p in gpu.processes
            )
            yield (f"GPU {gpu.index}: {gib(taken * memory.MIB)} of its memory are taken"
                   + (f" by {who}" if who else ", by whom the driver does not tell"))  # fmt: skip
    if len({(g.name, g.memory_total_mib) for g in host.gpus}) > 1:
        yield "the GPUs differ: every rank gets what the smallest of those it would use has"
    if any(g.mig for g in host.gpus):
        yield "MIG is on: a slice serves one rank, and slices cannot share a model"
