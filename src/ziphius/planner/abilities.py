"""Which weights formats the native engine of this version computes in, so that a plan never promises more."""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.config import option_fields
from ziphius.planner.find_model import ModelSource
from ziphius.planner.memory import WeightsFormat
from ziphius.planner.plan import Device
from ziphius.planner.validity import Engine

OF_SGLANG_ONLY = frozenset({"fp8"})
"""Weights formats that --weights-format takes, and the native engine does not hold."""
OF_CPU_ONLY = frozenset({"int8"})
"""Weights formats that have kernels for CPUs alone: on a GPU plain torch would unpack them at every step."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """Weights formats that the native engine runs, by device."""

    cuda: frozenset[str]
    cpu: frozenset[str]

    def on(self, device: Device) -> frozenset[str]:
        return self.cuda if device == "cuda" else self.cpu


def abilities() -> Abilities:
    """Of this version, read from its own options."""
    (option,) = (o for o in option_fields() if o.name == "weights_format")
    cpu = frozenset(option.metadata["choices"]) - {"auto"} - OF_SGLANG_ONLY
    return Abilities(cuda=cpu - OF_CPU_ONLY, cpu=cpu)


def not_yet(
    able: Abilities, engine: Engine, device: Device, weights_format: WeightsFormat, source: ModelSource
) -> str | None:
    """Why this version cannot run it, in a few words; None when it can. It says nothing of memory."""
    if engine == "sglang":
        return None
    if source.quantization is not None:
        return f"checkpoints quantized with {source.quantization.method} are planned, not in this version"
    if weights_format in able.on(device):
        return None
    if weights_format in able.cpu:
        return f"{weights_format} is for CPUs in this version"
    return f"{weights_format} is planned, not in this version"
