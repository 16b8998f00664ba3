"""The plan inside `start`: a resolved config against this host, and predicted against measured; starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ziphius.config import ServeConfig
from ziphius.errors import DoesNotFit
from ziphius.models.config import ModelConfig
from ziphius.planner.find_model import ModelSource
from ziphius.planner.hardware import Host, times
from ziphius.planner.memory import WeightsFormat, gib
from ziphius.planner.plan import Candidate, Device, Plan, PlanRequest
from ziphius.planner.planner import FORMATS, build_plan
from ziphius.planner.software import torch_build
from ziphius.planner.validity import Engine, require_tp

TOLERANCE = 0.03
"""A measured value further than this from the predicted one is told."""
_FORMAT_OF_DTYPE: dict[str, WeightsFormat] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a start expects of one rank."""

    weight_bytes: int
    kv_tokens: int
    kv_bytes_per_token: int


def check_start(config: ServeConfig, model: ModelConfig, host: Host, *, torch_cuda: bool | None = None) -> Plan:
    """The plan for exactly what `config` asks. DoesNotFit, with the numbers and the nearest changes, when it cannot be;
    ConfigError when --tp ranks cannot share the model. With several machines, the others are taken to be like `host`.

    `torch_cuda`: whether torch has CUDA, so that --device auto means what it will mean to the engine (default:
    read from the installed torch's files).
    """
    request = request_of(config, host, torch_cuda)
    require_tp(model, config.tp, request.weights_format or "bf16", request.engine or "native")
    plan = build_plan(_source(config, model), times(host, config.nnodes), request)
    if plan.recommendation is None:
        raise DoesNotFit(refusal(plan))
    return plan


def predict(plan: Plan) -> Prediction:
    """What check_start's plan expects: weights and cache of the candidate that will run."""
    chosen = plan.shown
    if chosen is None or chosen.weights is None:
        return Prediction(0, 0, 0)
    return Prediction(chosen.weights.total, chosen.kv_tokens, chosen.kv_bytes_per_token)


def request_of(config: ServeConfig, host: Host, torch_cuda: bool | None = None) -> PlanRequest:
    """A PlanRequest for what `config` says, `auto` made definite as the engine makes it."""
    device: Device = "cpu"
    if config.device == "cuda":
        device = "cuda"
    elif config.device == "auto" and host.gpus:
        if torch_cuda is None:
            build = torch_build()
            torch_cuda = build is not None and build.cuda is not None
        device = "cuda" if torch_cuda else "cpu"
    engine = cast(Engine, getattr(config, "engine", "native"))
    dtype, weights_format = formats_of(config, device)
    if engine == "sglang" and config.dtype == "auto" and device == "cpu":
        # It computes in the checkpoint's type on a CPU too.
        dtype, weights_format = "bfloat16", weights_format if config.weights_format != "auto" else "bf16"
    return PlanRequest(
        device=device,
        engine=engine,
        tp=int(getattr(config, "tp", 1)),
        weights_format=weights_format,
        dtype=dtype if config.dtype != "auto" or engine == "sglang" else None,
        mem_fraction=config.mem_fraction,
        context_length=config.context_length,
        max_running_requests=config.max_running_requests,
        max_total_tokens=config.max_total_tokens,
        page_size=config.page_size,
        chunked_prefill_size=config.chunked_prefill_size,
    )


def formats_of(config: ServeConfig, device: Device) -> tuple[str, WeightsFormat]:
    """(dtype, weights format), by the rule of engine/precision.py, which a test holds equal to this one.

    On a CPU dtype is float32, and weights are int8 only where neither was asked for; on a GPU dtype is
    bfloat16, and weights are held in it.
    """
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if config.weights_format != "auto":
        return dtype, cast(WeightsFormat, config.weights_format)
    if device == "cpu" and config.dtype == "auto":
        return dtype, FORMATS["cpu"][0]
    return dtype, _FORMAT_OF_DTYPE[dtype]


def refusal(plan: Plan) -> str:
    """One sentence for a person: what was asked, why not, and the nearest changes that would do."""
    asked = plan.candidates[0] if plan.candidates else None
    text = f"{plan.model.name} does not fit here"
    if asked is not None:
        text += f" ({asked.engine}, TP {asked.tp}, {asked.weights_format}): {_reason(asked)}"
    if not plan.alternatives and asked is not None and asked.failures:
        text += f"; sizes that divide this model are {', '.join(map(str, plan.valid_tp))}"
    changes = [f"{a.change}: {a.detail}" for a in plan.alternatives]
    return text + "".join(f"; {change}" for change in changes)


def _reason(candidate: Candidate) -> str:
    if candidate.missing_gpus:
        have = candidate.tp - candidate.missing_gpus
        return f"{candidate.tp} GPUs are needed, {have} {'is' if have == 1 else 'are'} there"
    if candidate.verdict in ("fits", "short") and candidate.not_yet is not None:
        return candidate.not_yet
    return candidate.reason


def compare(prediction: Prediction, weight_bytes: int, kv_tokens: int) -> tuple[tuple[str, bool], ...]:
    """(a line for the log, whether it is further off than 3%) for weights and for KV tokens."""
    lines = []
    for what, predicted, measured in (
        ("weights", prediction.weight_bytes, weight_bytes),
        ("KV tokens", prediction.kv_tokens, kv_tokens),
    ):
        gap = (measured - predicted) / predicted if predicted else 0.0
        told = (gib(predicted), gib(measured)) if what == "weights" else (f"{predicted:,}", f"{measured:,}")
        off = abs(gap) > TOLERANCE
        text = f"{what}: predicted {told[0]}, measured {told[1]} ({gap:+.1%})"
        lines.append((text + (", which is more than 3% off" if off else ""), off))
    return tuple(lines)


def _source(config: ServeConfig, model: ModelConfig) -> ModelSource:
    # The weights are on this machine by now, whatever the id.
    return ModelSource(config.model, config.model.rstrip("/").split("/")[-1], model, "folder", None, True)
