"""The exact `ziphius start` command for a candidate, on either engine."""

from __future__ import annotations

import shlex

from ziphius.formats import resolve_formats
from ziphius.planner.evaluate import Question
from ziphius.planner.plan import Candidate, PlanRequest

_DEFAULTS = PlanRequest()
_WHOLE = 1024


def shortened(kv_tokens: int) -> int:
    """A context length to ask for where the cache holds `kv_tokens`: a multiple of 1024 where possible."""
    return kv_tokens // _WHOLE * _WHOLE or kv_tokens


def command_for(question: Question, candidate: Candidate) -> str:
    """One line for a shell."""
    return _environment(question, candidate) + shlex.join(_ziphius_start(question, candidate))


def _environment(question: Question, candidate: Candidate) -> str:
    """CUDA_VISIBLE_DEVICES, where the GPUs to use are not the first ones, which an engine takes by itself."""
    gpus = question.host.gpus
    first = tuple(g.index for g in gpus[: candidate.tp])
    if candidate.device == "cpu" or candidate.gpus == first or any(g.mig for g in gpus):
        return ""
    return f"CUDA_VISIBLE_DEVICES={','.join(map(str, candidate.gpus))} "


def _model(question: Question) -> str:
    source = question.source
    return str(source.path) if source.origin == "config.json" and source.path is not None else source.given


def _context(question: Question, candidate: Candidate) -> list[str]:
    if candidate.verdict == "short":
        return ["--context-length", str(shortened(candidate.kv_tokens))]
    asked = question.request.context_length
    return [] if asked is None else ["--context-length", str(asked)]


def _ziphius_start(question: Question, candidate: Candidate) -> list[str]:
    request = question.request
    words = ["ziphius", "start", "--model", _model(question)]
    if candidate.engine == "sglang":
        words += ["--engine", "sglang"]
    if candidate.device == "cpu" and question.host.gpus:
        words += ["--device", "cpu"]
    if candidate.tp > 1:
        words += ["--tp", str(candidate.tp)]
    if request.dtype is not None:
        words += ["--dtype", request.dtype]
    _, default = resolve_formats(candidate.device, "auto", "auto")
    if question.config.quantization is None and (candidate.weights_format != default or request.dtype is not None):
        words += ["--weights-format", candidate.weights_format]
    words += _context(question, candidate)
    fraction = request.mem_fraction if candidate.engine == "native" else candidate.mem_fraction
    if fraction is not None:
        words += ["--mem-fraction", f"{fraction:g}"]
    for option in ("max_running_requests", "max_total_tokens", "page_size", "chunked_prefill_size"):
        value = getattr(request, option)
        if value != getattr(_DEFAULTS, option):
            words += ["--" + option.replace("_", "-"), str(value)]
    return words
