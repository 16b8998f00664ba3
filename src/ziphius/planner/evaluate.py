"""evaluate: whether one engine, tensor-parallel size and weights format fits a host, and by how much."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ziphius.checkpoint.config import ModelConfig
from ziphius.errors import DoesNotFit
from ziphius.formats import FORMATS, Device, WeightsFormat, resolve_formats
from ziphius.planner import memory, sglang
from ziphius.planner.abilities import Abilities, not_yet
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Gpu, Host, card_of, usable_bytes, with_more_gpus
from ziphius.planner.memory import GIB, gib
from ziphius.planner.plan import Candidate, PlanRequest, Verdict
from ziphius.planner.pool import PoolLimits, fit_pool, pool_limits, served_context
from ziphius.planner.roofline import roofline
from ziphius.planner.validity import Engine, TpFailure, block_failures, tp_failures

SGLANG_LEAST_RESERVE = 6 * GIB
"""A raised --mem-fraction-static must leave this much of a GPU, in our judgement: 0.93 on an H200 leaves 9.7 GiB."""
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What every candidate of one plan shares."""

    source: ModelSource
    host: Host
    request: PlanRequest
    context_length: int
    able: Abilities

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def kv_dtype(self, device: Device) -> str:
        return self.request.dtype or resolve_formats(device, "auto", "auto")[0]


def evaluate(question: Question, device: Device, engine: Engine, tp: int, weights_format: WeightsFormat) -> Candidate:
    """The verdict on one candidate. With more ranks than GPUs it is about this machine with the missing GPUs added."""
    config = question.config
    able = not_yet(question.able, engine, device, weights_format, question.config.quantization)
    failures = _failures(question, engine, tp, weights_format)
    empty = Candidate(engine=engine, tp=tp, weights_format=weights_format, device=device, verdict="invalid",
                      reason="; ".join(f.message for f in failures), failures=failures, not_yet=able)  # fmt: skip
    if failures:
        return empty
    contradiction = _contradiction(question.config, weights_format)
    if contradiction:
        return replace(empty, verdict="unsupported", reason=contradiction)
    dtype = question.kv_dtype(device)
    weights = memory.weight_bytes(config, tp, weights_format, float_bytes=memory.DTYPE_BYTES[dtype])
    per_token = memory.kv_bytes_per_token(config, tp, dtype)
    known = replace(empty, weights=weights, loaded_bytes=weights.total, kv_bytes_per_token=per_token)
    if device == "cpu":
        return _on_cpu(question, known)
    whole = [g for g in question.host.gpus if not g.mig]
    gpus = with_more_gpus(question.host, tp).chosen(tp)
    known = replace(known, missing_gpus=max(0, tp - max(1, len(whole))), gpus=tuple(g.index for g in gpus))
    hindrance = _hindrance(gpus, tp)
    if hindrance:
        return replace(known, verdict="unsupported", reason=hindrance)
    free = min(map(usable_bytes, gpus)) - memory.CUDA_CONTEXT - (memory.NCCL_BUFFERS if tp > 1 else 0)
    known = replace(known, memory_bytes=max(0, free))
    done = _sglang(question, known, gpus) if engine == "sglang" else _native(question, known)
    # A MIG slice has only a part of its card's bandwidth, and NVML does not say which.
    cards = [None if gpu.mig else card_of(gpu) for gpu in gpus]
    known_cards = [card for card in cards if card is not None]
    if len(known_cards) < len(cards):
        return done
    # Ranks wait for one another, so the slowest card decides the speed.
    slowest = min(known_cards, key=lambda card: card.bandwidth_gb_s)
    return replace(done, roofline=roofline(config, tp, weights_format, slowest, dtype))


def _failures(question: Question, engine: Engine, tp: int, weights_format: WeightsFormat) -> tuple[TpFailure, ...]:
    failures = tp_failures(question.config, tp, weights_format, engine)
    stored = question.config.quantization
    if not failures and engine == "sglang" and stored is not None and stored.blocks:
        return block_failures(question.config, tp)
    return failures


def _contradiction(config: ModelConfig, weights_format: WeightsFormat) -> str | None:
    """Why this model cannot be held in that format on any machine."""
    stored = config.quantization
    if stored is not None and weights_format != stored.weights_format:
        return f"the checkpoint is in {stored.weights_format} already"
    if FORMATS[weights_format].beside_experts is not None and config.moe is None:
        return f"{weights_format} is for routed experts, and this model has none"
    return None


def _hindrance(gpus: tuple[Gpu, ...], tp: int) -> str | None:
    """Why these GPUs cannot compute at all, or not together."""
    for gpu in gpus:
        if gpu.compute_capability < LEAST_CAPABILITY:
            has = ".".join(map(str, gpu.compute_capability))
            return f"GPU {gpu.index} ({gpu.name}) has compute capability {has}; 8.0 is needed"
    if tp > 1 and any(g.mig for g in gpus):
        return "MIG slices cannot share one model: NCCL reaches no peer from a slice; use --tp 1 or switch MIG off"
    return None


def _native(question: Question, known: Candidate) -> Candidate:
    free = known.memory_bytes - known.loaded_bytes
    limits = _limits(question, known, "cuda", free_bytes=free, free_before_bytes=known.memory_bytes)
    fraction = question.request.mem_fraction
    reserve = limits.reserve_bytes if fraction is None else int((1 - fraction) * known.memory_bytes)
    return _with_pool(question, replace(known, reserve_bytes=reserve, mem_fraction=fraction), limits)


def _on_cpu(question: Question, known: Candidate) -> Candidate:
    available = (question.host.memory_available_mib or 0) * memory.MIB
    share = available // known.tp
    free = share - known.loaded_bytes - memory.CPU_PROCESS
    known = replace(known, memory_bytes=share, mem_fraction=question.request.mem_fraction)
    if question.host.memory_available_mib is None:
        return replace(known, verdict="unsupported", reason="this host's main memory is not recorded")
    done = _with_pool(question, known, _limits(question, known, "cpu", free_bytes=max(0, free)))
    return replace(done, reserve_bytes=max(0, share - done.loaded_bytes - done.kv_bytes))


def _limits(
    question: Question, known: Candidate, device: Device, *, free_bytes: int, free_before_bytes: int = 0
) -> PoolLimits:
    return pool_limits(
        question.config,
        question.request,
        device,
        question.kv_dtype(device),
        tp=known.tp,
        context_length=question.context_length,
        free_bytes=free_bytes,
        free_before_bytes=free_before_bytes,
    )


def _with_pool(question: Question, known: Candidate, limits: PoolLimits) -> Candidate:
    """With the size of the native engine's pool, from the function that the engine itself calls."""
    try:
        tokens = fit_pool(question.config, known.tp, limits).size.tokens
    except DoesNotFit as e:
        if limits.max_total_tokens is not None:
            return replace(known, verdict="too_big", reason=e.message)
        tokens = 0
    return _judged(question, known, tokens)


def _judged(question: Question, known: Candidate, tokens: int) -> Candidate:
    """The verdict on a cache of `tokens`, with a sentence that gives the numbers."""
    context = question.context_length
    served = served_context(tokens, context)
    verdict: Verdict = "fits" if served == context else "short" if served else "too_big"
    loaded, free = gib(known.loaded_bytes), gib(known.memory_bytes)
    where = "of main memory" if known.device == "cpu" else "on each GPU" if known.tp > 1 else "on the GPU"
    if verdict == "too_big":
        kept = f" and {gib(known.reserve_bytes)} in reserve" if known.loaded_bytes < known.memory_bytes else ""
        reason = f"needs {loaded} for weights{kept}, {free} are free {where}"
        return replace(known, verdict=verdict, reason=reason)
    requests = tokens / context
    reason = f"{loaded} of weights and {gib(known.reserve_bytes)} in reserve leave room for {tokens:,} tokens"
    if known.device == "cpu":
        reason = f"{loaded} of weights in {free} leave room for {tokens:,} tokens"
    reason += f": {requests:.1f} requests of {context:,}" if verdict == "fits" else f", short of {context:,}"
    return replace(known, verdict=verdict, reason=reason, kv_tokens=tokens, requests=round(requests, 2))


def _sglang(question: Question, known: Candidate, gpus: tuple[Gpu, ...]) -> Candidate:
    config, tp, weights_format = question.config, known.tp, known.weights_format
    free = known.memory_bytes
    if weights_format == "int4":
        return replace(known, verdict="unsupported",
                       reason="SGLang 0.5.16 stops while loading DeepSeek-V2 in int4 (AWQ)")  # fmt: skip
    loaded = sglang.loaded_bytes(config, tp, weights_format)
    known = replace(known, loaded_bytes=loaded)
    online = weights_format == "fp8" and question.config.quantization is None
    peak = sglang.loaded_bytes(config, tp, "bf16") if online else loaded
    if peak > free and online:
        reason = f"SGLang quantizes after loading: {gib(peak)} in bf16 first, {gib(free)} are free; an fp8 checkpoint"
        fits = " would fit" if loaded < free else " would not fit either"
        return replace(known, verdict="too_big", reason=reason + fits)
    fraction, tokens = _sglang_pool(question, known, min(g.memory_total_mib for g in gpus))
    known = replace(known, mem_fraction=fraction, reserve_bytes=sglang.reserved_bytes(free, fraction))
    return _judged(question, known, tokens)


def _sglang_pool(question: Question, known: Candidate, memory_total_mib: int) -> tuple[float, int]:
    """(fraction, tokens): the fraction asked for, else SGLang's default, raised where one context needs more room."""
    config, tp, dtype = question.config, known.tp, question.kv_dtype("cuda")
    free, loaded = known.memory_bytes, known.loaded_bytes

    def tokens_at(fraction: float) -> int:
        tokens = sglang.kv_tokens(config, tp, dtype, free_before=free, loaded=loaded, fraction=fraction)
        return min(tokens, question.request.max_total_tokens or tokens)

    asked = question.request.mem_fraction
    if asked is not None:
        return asked, tokens_at(asked)
    default = sglang.defaults(memory_total_mib, tp).mem_fraction_static
    most = int((1 - SGLANG_LEAST_RESERVE / free) * 100) / 100 if free > SGLANG_LEAST_RESERVE else 0.0
    if tokens_at(default) >= question.context_length or most <= default:
        return default, tokens_at(default)
    wanted = sglang.smallest_fraction(
        config, tp, dtype, free_before=free, loaded=loaded, tokens=question.context_length
    )
    raised = min(most, wanted)
    return raised, tokens_at(raised)
