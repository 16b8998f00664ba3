"""What this version of Ziphius can start, read from its own options, so that a plan never promises more."""

from __future__ import annotations

from dataclasses import dataclass

from ziphius.config import option_fields
from ziphius.planner.find_model import ModelSource
from ziphius.planner.memory import WeightsFormat
from ziphius.planner.plan import Device
from ziphius.planner.validity import Engine

FETCHES_FROM_HUB = True
"""Whether `ziphius start --model owner/name` fetches weights from the Hugging Face hub."""
OF_SGLANG_ONLY = frozenset({"fp8"})
"""Weights formats that --weights-format takes, and the native engine does not hold."""


@dataclass(frozen=True, slots=True)
class Abilities:
    devices: frozenset[str]
    weights_formats: frozenset[str]
    tensor_parallel: bool
    launches_sglang: bool
    """Whether `ziphius start --engine sglang` exists; SGLang's own command works either way."""
    fetches_from_hub: bool = FETCHES_FROM_HUB


def abilities() -> Abilities:
    choices = {option.name: frozenset(option.metadata["choices"]) for option in option_fields()}
    return Abilities(
        devices=choices["device"] - {"auto"},
        weights_formats=choices["weights_format"] - {"auto", *OF_SGLANG_ONLY},
        tensor_parallel="tp" in choices,
        launches_sglang="sglang" in choices.get("engine", frozenset()),
    )


def not_yet(
    able: Abilities, engine: Engine, device: Device, tp: int, weights_format: WeightsFormat, source: ModelSource
) -> str | None:
    """Why this version cannot run it, in a few words; None when it can. It says nothing of memory."""
    if engine == "sglang":
        return None
    if device not in able.devices:
        return f"this version does not compute on {device}"
    if weights_format not in able.weights_formats:
        return f"{weights_format} is planned, not in this version"
    if source.quantization is not None:
        return f"checkpoints quantized with {source.quantization} are planned, not in this version"
    if tp > 1 and not able.tensor_parallel:
        return "--tp is planned, not in this version"
    if source.origin in ("hub", "hub cache") and not source.has_weights and not able.fetches_from_hub:
        return "fetching from the hub is planned: download the model and give its folder"
    return None
