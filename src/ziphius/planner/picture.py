"""bars: what fills each GPU under a plan, as segments of bars for a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ziphius.planner.hardware import Gpu, with_more_gpus
from ziphius.planner.memory import MIB
from ziphius.planner.plan import Candidate, Plan

Key = Literal["taken", "experts", "attention", "mlp", "vocabulary", "other", "cache", "reserve", "free", "over"]
LABELS: dict[Key, str] = {
    "taken": "taken already",
    "experts": "routed experts",
    "attention": "attention",
    "mlp": "shared experts, dense",
    "vocabulary": "embedding, head",
    "other": "other weights",
    "cache": "KV cache",
    "reserve": "reserve",
    "free": "free",
    "over": "too much",
}


@dataclass(frozen=True, slots=True)
class Segment:
    key: Key
    nbytes: int


@dataclass(frozen=True, slots=True)
class Bar:
    """One GPU, or main memory. Its segments lie side by side; a segment `over` lies beyond `total_bytes`."""

    label: str
    total_bytes: int
    segments: tuple[Segment, ...]
    there: bool = True
    """False for a GPU that would have to be added."""


def bars(plan: Plan) -> tuple[Bar, ...]:
    """A bar for each GPU of the host and each that the shown candidate lacks; for a CPU, one for main memory."""
    shown = plan.shown
    if plan.device == "cpu":
        return _main_memory(plan, shown)
    gpus = with_more_gpus(plan.host, shown.tp if shown else 1).gpus
    used = set(shown.gpus) if shown else set()
    have = {(g.index, g.name, g.mig) for g in plan.host.gpus}
    found = []
    for position, gpu in enumerate(gpus):
        slice_ = gpu.mig and sum(g.index == gpu.index for g in gpus[:position])
        label = f"GPU {gpu.index}" + (f" slice {slice_}" if gpu.mig else "")
        # Slices of one GPU share its number, and a candidate uses only the first of them.
        takes_part = gpu.index in used and not (gpu.mig and position != gpus.index(gpu))
        segments = _segments(gpu, shown if takes_part else None)
        found.append(Bar(label, gpu.memory_total_mib * MIB, segments, (gpu.index, gpu.name, gpu.mig) in have))
    return tuple(found)


def _segments(gpu: Gpu, candidate: Candidate | None) -> tuple[Segment, ...]:
    total = gpu.memory_total_mib * MIB
    taken = Segment("taken", total - gpu.memory_free_mib * MIB)
    if candidate is None:
        return (taken, Segment("free", gpu.memory_free_mib * MIB))
    start_up = max(0, gpu.memory_free_mib * MIB - candidate.memory_bytes)
    return _filled(taken, start_up, candidate, total)


def _filled(taken: Segment, start_up: int, candidate: Candidate, total: int) -> tuple[Segment, ...]:
    """Segments that add up to `total`, and `over` beyond it where the candidate is too big."""
    reserve = start_up if candidate.verdict == "too_big" else candidate.reserve_bytes + start_up
    segments = [taken, *_weights(candidate), Segment("cache", candidate.kv_bytes), Segment("reserve", reserve)]
    rest = total - sum(s.nbytes for s in segments)
    if rest >= 0:
        return (*segments, Segment("free", rest))
    return _clipped([s for s in segments if s.key != "reserve"], total)


def _clipped(segments: list[Segment], total: int) -> tuple[Segment, ...]:
    """Segments cut at `total`: what lies beyond becomes one segment `over`, what is missing becomes reserve."""
    kept: list[Segment] = []
    room = total
    for segment in segments:
        kept.append(Segment(segment.key, min(segment.nbytes, room)))
        room -= kept[-1].nbytes
    over = sum(s.nbytes for s in segments) - total
    return (*kept, Segment("over", over) if over > 0 else Segment("reserve", room))


def _weights(candidate: Candidate) -> tuple[Segment, ...]:
    weights = candidate.weights
    if weights is None:
        return ()
    derived = candidate.loaded_bytes - weights.total
    return (
        Segment("experts", weights.routed_experts),
        Segment("attention", weights.attention),
        Segment("mlp", weights.shared_experts + weights.dense),
        Segment("vocabulary", weights.embedding + weights.head),
        Segment("other", weights.router + weights.norms + derived),
    )


def _main_memory(plan: Plan, shown: Candidate | None) -> tuple[Bar, ...]:
    host = plan.host
    if host.memory_available_mib is None:
        return ()
    total = (host.memory_total_mib or host.memory_available_mib) * MIB
    taken = Segment("taken", total - host.memory_available_mib * MIB)
    if shown is None or shown.weights is None:
        return (Bar("memory", total, (taken, Segment("free", total - taken.nbytes))),)
    one = [Segment(s.key, s.nbytes * shown.tp) for s in _weights(shown)]
    segments = [taken, *one, Segment("cache", shown.kv_bytes * shown.tp)]
    rest = total - sum(s.nbytes for s in segments)
    return (Bar("memory", total, (*segments, Segment("free", rest)) if rest >= 0 else _clipped(segments, total)),)
