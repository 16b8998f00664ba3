"""Which weights formats the native engine of this version computes in, so that a plan never promises more."""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.checkpoint.quantization import Quantization
from ziphius.formats import FORMATS, Device, WeightsFormat
from ziphius.planner.validity import Engine


@dataclass(frozen=True, slots=True)
class Abilities:
    """Weights formats that the native engine runs, by device."""

    cuda: frozenset[str]
    cpu: frozenset[str]

    def on(self, device: Device) -> frozenset[str]:
        return self.cuda if device == "cuda" else self.cpu


def abilities() -> Abilities:
    """Of this version, by its table of formats."""
    cuda, cpu = (frozenset(row.name for row in FORMATS.values() if device in row.native) for device in ("cuda", "cpu"))
    return Abilities(cuda=cuda, cpu=cpu)


def not_yet(
    able: Abilities, engine: Engine, device: Device, weights_format: WeightsFormat, stored: Quantization | None
) -> str | None:
    """Why this version cannot run it, in a few words; None when it can. Memory does not count here."""
    if engine == "sglang":
        return None
    if stored is not None:
        return f"checkpoints quantized with {stored.method} are planned, not in this version"
    if weights_format in able.on(device):
        return None
    if weights_format in able.cpu:
        return f"{weights_format} is for CPUs in this version"
    return f"{weights_format} is planned, not in this version"
