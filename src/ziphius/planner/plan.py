"""Plan and its parts: request, candidates, recommendation. Their fields are also the shape of `--json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ziphius.formats import Device, WeightsFormat
from ziphius.planner.hardware import Host
from ziphius.planner.memory import WeightBytes
from ziphius.planner.roofline import Roofline
from ziphius.planner.validity import Engine, TpFailure

Verdict = Literal["fits", "short", "too_big", "invalid", "unsupported"]
"""fits: there is room for at least one request of the context length. short: only for a shorter context. too_big: there
is no room for that either. invalid: the size does not divide the model. unsupported: this engine or hardware cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the user asks for; None leaves it to the plan."""

    device: Device | None = None
    engine: Engine | None = None
    tp: int | None = None
    weights_format: WeightsFormat | None = None
    dtype: str | None = None
    """Of the cache: float32 on a CPU, bfloat16 on a GPU."""
    mem_fraction: float | None = None
    context_length: int | None = None
    max_running_requests: int | None = None
    max_total_tokens: int | None = None
    page_size: int = 16
    chunked_prefill_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One engine, tensor-parallel size and weights format on this hardware. Bytes are those of one rank."""

    engine: Engine
    tp: int
    weights_format: WeightsFormat
    device: Device
    verdict: Verdict
    reason: str
    """Why this verdict: one sentence with the numbers."""
    failures: tuple[TpFailure, ...] = ()
    missing_gpus: int = 0
    """How many GPUs like these would have to be added. The verdict is then about the larger machine."""
    not_yet: str | None = None
    """Why this version cannot run it, though it may fit; None when it can."""
    gpus: tuple[int, ...] = ()
    """The GPUs that it would use, by the driver's numbers."""
    weights: WeightBytes | None = None
    loaded_bytes: int = 0
    """Weights and what the engine derives from them on loading."""
    memory_bytes: int = 0
    """What is free for a rank before loading: on a GPU after CUDA and NCCL, on a CPU its share of what is available."""
    reserve_bytes: int = 0
    """Kept free for activations, graphs and workspaces (on a CPU: what the cache leaves to the system)."""
    kv_bytes_per_token: int = 0
    kv_tokens: int = 0
    requests: float = 0.0
    """How many requests of the whole context length the cache holds."""
    mem_fraction: float | None = None
    """sglang: its --mem-fraction-static; native: as given."""
    roofline: Roofline | None = None

    @property
    def kv_bytes(self) -> int:
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def runs(self) -> bool:
        """Whether it fits on the GPUs that are there and this version can run it, perhaps with a shorter context."""
        return self.verdict in ("fits", "short") and self.missing_gpus == 0 and self.not_yet is None


@dataclass(frozen=True, slots=True)
class Recommendation:
    engine: Engine
    tp: int
    weights_format: WeightsFormat
    context_length: int
    mem_fraction: float
    """Share of a rank's free memory that weights and cache take."""
    kv_tokens: int
    command: str
    why: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """A change after which it would fit."""

    change: str
    """`shorter context`, `another size`, `fewer bits`, `an fp8 checkpoint`, `free memory` or `more GPUs`."""
    detail: str
    """What, with the numbers."""
    command: str | None = None
    """None where this version cannot run it, or where hardware is missing."""


@dataclass(frozen=True, slots=True)
class ModelSummary:
    name: str
    given: str
    origin: str
    architecture: str
    parameters: int
    active_parameters: int
    """Parameters that one token uses."""
    layers: int
    max_context: int
    quantization: str | None
    kv_bytes_per_token: int
    """On one rank of the smallest tensor-parallel size shown, in the cache's type."""
    kv_replicated: bool
    """MLA: every rank holds the whole cache."""


@dataclass(frozen=True, slots=True)
class Plan:
    model: ModelSummary
    host: Host
    request: PlanRequest
    context_length: int
    device: Device
    candidates: tuple[Candidate, ...]
    """Those that were asked for."""
    valid_tp: tuple[int, ...]
    """Every size up to 128 that divides the model in 16 bits."""
    fits: bool
    recommendation: Recommendation | None
    """A command that works with this version on this hardware; None when there is none."""
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    shown: Candidate | None = None
    """The candidate that pictures draw: the recommended one, else the nearest."""
