"""The plan before a start of the native engine: it refuses what cannot work and predicts the cache of what can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ziphius.checkpoint.locate import locate
from ziphius.config import Resolved
from ziphius.errors import ConfigError, DoesNotFit, DownloadError, ModelError, ModelNotFound
from ziphius.launchers.software import torch_has_cuda
from ziphius.planner.admission import admit_on_host, overridden, require_device
from ziphius.planner.find_model import find_model
from ziphius.planner.hardware import Host
from ziphius.planner.plan import Plan
from ziphius.ranks.layout import rank_layout


@dataclass(frozen=True, slots=True)
class NativeStartPlan:
    """What the plan says about a start."""

    predicted_kv_tokens: int | None = None
    """Tokens of one rank's cache; None without a plan."""
    gpus: tuple[int, ...] = ()
    """The GPUs to use, by the driver's numbers; () when they are the first ones of this machine."""
    notes: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make an engine use `gpus`."""
        if not self.gpus:
            return {}
        # The driver numbers GPUs by their place on the bus. CUDA does so only when this variable says so.
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def plan_native(
    resolved: Resolved,
    env: Mapping[str, str],
    *,
    force: bool,
    probe: Callable[[], Host],
    torch_cuda: bool | None = None,
) -> NativeStartPlan:
    """Plan a start on this machine.

    Raises DoesNotFit, with the numbers and the nearest changes; ConfigError for options that contradict the model or
    the machine; ModelError for a config that cannot be read. With `force` these are notes instead.

    A model that must still be fetched is started without a plan: the engine checks again when it has the model.
    `torch_cuda`: whether torch has CUDA (default: read from the installed torch's files).
    """
    config = resolved.config
    rank_layout(config)  # A contradiction is refused before the machine is probed, and --force does not change that.
    host = probe()
    try:
        require_device(config, host)
        source = find_model(config.model, env, config.revision)
        plan = admit_on_host(config, source, host, torch_cuda=torch_has_cuda() if torch_cuda is None else torch_cuda)
    except (ModelNotFound, DownloadError) as e:
        if locate(config.model) is None:  # The server could not fetch it either.
            return NativeStartPlan(notes=(overridden(e, force),))
        return NativeStartPlan()
    except (DoesNotFit, ConfigError, ModelError) as e:
        return NativeStartPlan(notes=(overridden(e, force),))
    return _start_plan(plan, host, config.nnodes, env.get("CUDA_VISIBLE_DEVICES", ""))


def _start_plan(plan: Plan, host: Host, machines: int, visible: str) -> NativeStartPlan:
    chosen = plan.shown
    if chosen is None:
        return NativeStartPlan()
    notes = (f"planned: {chosen.reason}",)
    first = tuple(gpu.index for gpu in host.gpus[: chosen.tp])
    # Some clusters name the visible GPUs by UUID. Only those may be used, and their numbers are not known here.
    by_uuid = not all(part.strip().isdigit() for part in visible.split(",") if part.strip())
    sliced = any(gpu.mig for gpu in host.gpus)
    if chosen.device == "cpu" or machines > 1 or chosen.gpus == first or sliced or by_uuid:
        return NativeStartPlan(chosen.kv_tokens, notes=notes)
    numbers = ", ".join(map(str, chosen.gpus))
    return NativeStartPlan(
        chosen.kv_tokens, chosen.gpus, (*notes, f"on GPU {numbers}, which have the most free memory")
    )
