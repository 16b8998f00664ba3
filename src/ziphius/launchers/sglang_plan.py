"""The plan before a start of SGLang: whether it fits, and with which memory fraction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ziphius.checkpoint.architectures import architecture_of
from ziphius.config import Resolved
from ziphius.errors import ConfigError, ModelError
from ziphius.launchers.sglang_settings import Planned
from ziphius.planner.admission import overridden, plan_on_host, refusal
from ziphius.planner.find_model import find_model
from ziphius.planner.hardware import Host
from ziphius.planner.plan import Plan
from ziphius.planner.probe import probe_host


@dataclass(frozen=True, slots=True)
class SglangStartPlan:
    """What the plan says about a start."""

    planned: Planned
    gpus: bool
    """Whether it will compute on GPUs."""
    predicted_kv_tokens: int | None = None
    """Tokens of one rank's pool. None on a CPU, where SGLang's rule is not known, and for an unknown model."""
    notes: tuple[str, ...] = ()


def plan_start(
    resolved: Resolved, env: Mapping[str, str], *, force: bool, probe: Callable[[], Host] = probe_host
) -> SglangStartPlan:
    """Plan a start on this machine. DoesNotFit, with the numbers and the nearest changes, unless `force`.

    A model that the planner does not know is not refused, because SGLang knows many more.
    """
    config = resolved.config
    host = probe()
    gpus = config.device == "cuda" or (config.device == "auto" and bool(host.gpus))
    try:
        source = find_model(config.model, env, config.revision)
        plan = plan_on_host(config, source, host, torch_cuda=True)
    except ModelError as e:
        return SglangStartPlan(Planned(), gpus, notes=(f"started without a plan: {e.message}",))
    except ConfigError as e:
        if not force:
            raise
        return SglangStartPlan(Planned(), gpus, notes=(f"started without a plan: {e.message}",))
    remote_code = architecture_of(source.config.architecture).remote_code
    if plan.recommendation is None:
        return SglangStartPlan(Planned(None, remote_code), gpus, notes=(overridden(refusal(plan), force),))
    return _start_plan(plan, gpus, remote_code)


def _start_plan(plan: Plan, gpus: bool, remote_code: bool) -> SglangStartPlan:
    chosen = plan.shown
    if not gpus or chosen is None:
        return SglangStartPlan(Planned(None, remote_code), gpus)
    start_plan = SglangStartPlan(Planned(chosen.mem_fraction, remote_code), gpus, chosen.kv_tokens)
    return replace(start_plan, notes=(f"planned: {chosen.reason}",))
