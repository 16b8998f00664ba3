"""The nearest changes after which a model fits: fewer bits, another size, more GPUs, a shorter context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ziphius.checkpoint.quantization import Quantization
from ziphius.formats import FORMATS
from ziphius.planner.commands import command_for, shortened
from ziphius.planner.evaluate import Question, evaluate
from ziphius.planner.hardware import describe, emptied
from ziphius.planner.plan import Alternative, Candidate


def alternatives_for(
    question: Question, asked: Sequence[Candidate], every: Sequence[Candidate]
) -> tuple[Alternative, ...]:
    """At most one of each kind, the smallest change first.

    `asked` are the candidates that the request is about, `every` all that were evaluated.
    """
    return tuple(a for a in _search(question, asked, every) if a is not None)


def _search(question: Question, asked: Sequence[Candidate], every: Sequence[Candidate]) -> Iterable[Alternative | None]:
    request = question.request
    bits = max((_bits(c) for c in asked), default=16)
    same_size = [c for c in every if request.tp in (None, c.tp)]
    same_format = [c for c in every if request.weights_format in (None, c.weights_format)]

    def here(c: Candidate) -> bool:
        return c.verdict == "fits" and not c.missing_gpus

    yield _of(question, "shorter context", asked, lambda c: c.verdict == "short" and not c.missing_gpus)
    resized = None
    if request.tp is not None:
        resized = _of(question, "another size", same_format, lambda c: here(c) and c.tp != request.tp)
        yield resized
    fewer = _of(question, "fewer bits", same_size, lambda c: here(c) and _bits(c) < bits)
    yield fewer
    if request.tp is not None and resized is None and fewer is None:
        yield _of(question, "fewer bits and another size", every, lambda c: here(c) and _bits(c) < bits)
    yield _fp8_checkpoint(question, same_size)
    freed = _freed(question, asked)
    yield freed
    if freed is None and (resized is None or resized.command is None):
        yield _of(question, "more GPUs", same_format, lambda c: c.verdict == "fits" and c.missing_gpus > 0)


def _fp8_checkpoint(question: Question, candidates: Sequence[Candidate]) -> Alternative | None:
    """What SGLang could do with an fp8 checkpoint of this model, where it cannot quantize the given one itself."""
    if question.config.quantization is not None:
        return None
    stored = replace(question.config, quantization=Quantization("fp8", "fp8", blocks=True))
    quantized = replace(question, source=replace(question.source, config=stored))
    tried = [evaluate(quantized, c.device, c.engine, c.tp, c.weights_format)
             for c in candidates
             if (c.engine, c.weights_format, c.verdict) == ("sglang", "fp8", "too_big")]  # fmt: skip
    found = _of(quantized, "an fp8 checkpoint", tried, lambda c: c.verdict == "fits" and not c.missing_gpus)
    return None if found is None else replace(found, command=None)  # the command would name this checkpoint


def _freed(question: Question, asked: Sequence[Candidate]) -> Alternative | None:
    """What would fit if no other process used the GPUs."""
    empty = emptied(question.host)
    if empty == question.host:
        return None
    alone = replace(question, host=empty)
    retried = [evaluate(alone, c.device, c.engine, c.tp, c.weights_format) for c in asked if c.verdict != "invalid"]
    found = _of(alone, "free memory", retried, lambda c: c.verdict == "fits" and not c.missing_gpus)
    if found is None:
        return None
    busy = [g for g, idle in zip(question.host.gpus, empty.gpus, strict=True) if g != idle]
    owners = sorted({f"{p.name} (pid {p.pid})" for g in busy for p in g.processes})
    who = f", held by {', '.join(owners)}" if owners else ""
    numbers = " and ".join(f"GPU {g.index}" for g in busy)
    return Alternative("free memory", f"on {numbers}{who}; then {found.detail}")


def _of(
    question: Question, change: str, candidates: Iterable[Candidate], accepts: Callable[[Candidate], bool]
) -> Alternative | None:
    """The best accepted candidate as an alternative: candidates that run come first, then those with most bits."""
    accepted = [c for c in candidates if accepts(c)]
    if not accepted:
        return None

    def order(c: Candidate) -> tuple[int, ...]:
        return (c.missing_gpus, not c.runs, -_bits(c), c.engine != "native", c.tp)

    if change == "more GPUs":
        best = min(accepted, key=lambda c: (-_bits(c), c.missing_gpus, c.not_yet is not None, c.engine))
    else:
        best = min(accepted, key=order)
    return Alternative(change, _detail(question, change, best), command_for(question, best) if best.runs else None)


def _detail(question: Question, change: str, best: Candidate) -> str:
    what = f"{best.engine}, TP {best.tp}, {best.weights_format}"
    if change == "shorter context":
        what = f"--context-length {shortened(best.kv_tokens)} ({what})"
    if best.missing_gpus:
        have = describe(question.host)
        plural = "s" if best.missing_gpus > 1 else ""
        what = f"{best.missing_gpus} more GPU{plural} beside {have} ({what})"
    not_yet = f" ({best.not_yet})" if best.not_yet and not best.missing_gpus else ""
    return f"{what}: {best.reason}{not_yet}"


def _bits(candidate: Candidate) -> int:
    return FORMATS[candidate.weights_format].bits
