"""The KV pool of one rank: how many tokens it holds, and how long a context it serves; pure bytes, no torch, no I/O.

A plan, the check before a start and the engine all size the pool with `fit_pool`, so that a start can compare what was
predicted with what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ziphius.checkpoint.config import ModelConfig
from ziphius.errors import DoesNotFit
from ziphius.formats import Device
from ziphius.planner.memory import BatchLimits, cuda_reserve, gib, kv_bytes_per_token
from ziphius.planner.plan import PlanRequest

SHORTEST_CONTEXT = 1024
"""A pool of fewer tokens is of no use, unless the context that is wanted is shorter still."""
CPU_SHARE = 0.25
"""Share of the memory left after loading that the pool on a CPU may take, unless --mem-fraction says otherwise."""
CPU_KEEP_FREE = 0.10
"""Share of the memory left after loading that stays free even where one context needs more than CPU_SHARE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """What the size of a KV pool depends on, besides the model."""

    device: Device
    dtype: str
    context_length: int
    max_running_requests: int
    page_size: int
    free_bytes: int
    """After the weights are loaded. CPU: memory available on the host (psutil's `available`); CUDA: free on the GPU."""
    free_before_bytes: int = 0
    """CUDA: free on the GPU before the weights were loaded. Needed with `mem_fraction`."""
    reserve_bytes: int = 0
    """CUDA without `mem_fraction`: what must stay free (`cuda_reserve`)."""
    mem_fraction: float | None = None
    max_total_tokens: int | None = None
    ranks_on_host: int = 1
    """CPU: ranks that share `free_bytes`."""


def pool_limits(
    config: ModelConfig,
    request: PlanRequest,
    device: Device,
    dtype: str,
    *,
    tp: int,
    context_length: int,
    free_bytes: int,
    free_before_bytes: int = 0,
    ranks_on_host: int = 1,
) -> PoolLimits:
    """PoolLimits of the native engine for what `request` asks of one of `tp` ranks."""
    batch = BatchLimits.of(device, request.max_running_requests, request.chunked_prefill_size)
    return PoolLimits(
        device=device,
        dtype=dtype,
        context_length=context_length,
        max_running_requests=batch.requests,
        page_size=request.page_size,
        free_bytes=free_bytes,
        free_before_bytes=free_before_bytes,
        reserve_bytes=cuda_reserve(config, tp, batch, dtype=dtype) if device == "cuda" else 0,
        mem_fraction=request.mem_fraction,
        max_total_tokens=request.max_total_tokens,
        ranks_on_host=ranks_on_host,
    )


@dataclass(frozen=True, slots=True)
class PoolSize:
    """A KV pool on one rank. `tokens` is a multiple of the page size."""

    tokens: int
    bytes_per_token: int
    limited_by: Literal["requests", "memory", "option"]
    """`requests`: every request can have its full context; `memory`: no room for more; `option`: max_total_tokens."""

    @property
    def nbytes(self) -> int:
        return self.tokens * self.bytes_per_token

    def pages(self, page_size: int) -> int:
        return self.tokens // page_size


@dataclass(frozen=True, slots=True)
class FittedPool:
    """A pool, and the longest context that it serves."""

    context_length: int
    size: PoolSize


def served_context(tokens: int, wanted: int) -> int:
    """The context length that a pool of `tokens` serves: `wanted`, or less where memory is short; 0: too little."""
    context = min(tokens, wanted)
    return context if context >= min(SHORTEST_CONTEXT, wanted) else 0


def fit_pool(config: ModelConfig, tp: int, limits: PoolLimits) -> FittedPool:
    """The pool of one rank: for the context that `limits` want, or for a shorter one where memory is short.

    DoesNotFit, with the numbers and what to do, when not even a context of any use has room, or when max_total_tokens
    has none.
    """
    wanted = limits.context_length
    try:
        size = kv_pool_tokens(config, tp, limits)
    except DoesNotFit:
        page = limits.page_size
        room = pool_room(limits) // kv_bytes_per_token(config, tp, limits.dtype) // page * page
        shorter = served_context(room, wanted)
        if limits.max_total_tokens is not None or not shorter:
            raise
        return FittedPool(shorter, kv_pool_tokens(config, tp, replace(limits, context_length=shorter)))
    return FittedPool(min(wanted, size.tokens), size)


def kv_pool_tokens(config: ModelConfig, tp: int, limits: PoolLimits) -> PoolSize:
    """How many tokens of KV cache one rank may hold; the engine and the planner both ask this.

    CPU: max_running_requests full contexts, but not more than a share of what is available after the
    weights (25%, or mem_fraction), yet at least one context where 90% of what is available holds it.
    CUDA: everything but the reserve; with mem_fraction f, free_bytes - (1 - f) x free_before_bytes
    (SGLang's meaning of the knob). `max_total_tokens` sets the size itself, within what is there.
    DoesNotFit, with the numbers and what to do, when not even one context has room.
    """
    per_token = kv_bytes_per_token(config, tp, limits.dtype)
    page = limits.page_size
    most = pool_room(limits)
    if limits.max_total_tokens is not None:
        tokens = limits.max_total_tokens // page * page
        if tokens * per_token > most or tokens <= 0:
            raise DoesNotFit(_too_large(limits, per_token, most))
        return PoolSize(tokens, per_token, "option")
    one_context = _round_up(limits.context_length, page)
    affordable = _unasked(limits, most) // per_token // page * page
    if limits.device == "cpu":
        wanted = one_context * limits.max_running_requests
        if affordable >= wanted:
            return PoolSize(wanted, per_token, "requests")
        if affordable < one_context <= most // per_token:
            affordable = one_context
    if affordable < one_context:
        raise DoesNotFit(_no_context(limits, per_token, most))
    return PoolSize(affordable, per_token, "memory")


def pool_room(limits: PoolLimits) -> int:
    """The most bytes that the pool of one rank may have, whatever is asked for."""
    if limits.device == "cpu":
        share = CPU_SHARE if limits.mem_fraction is None else limits.mem_fraction
        room = limits.free_bytes // limits.ranks_on_host * max(share, 1 - CPU_KEEP_FREE)
    elif limits.mem_fraction is None:
        room = limits.free_bytes - limits.reserve_bytes
    else:
        room = limits.free_bytes - (1 - limits.mem_fraction) * limits.free_before_bytes
    return max(0, int(room))


def _unasked(limits: PoolLimits, most: int) -> int:
    """Bytes that the pool takes when no size is asked for."""
    if limits.device == "cuda":
        return most
    share = CPU_SHARE if limits.mem_fraction is None else limits.mem_fraction
    return max(0, int(limits.free_bytes // limits.ranks_on_host * share))


def _round_up(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size) * page_size


def _no_context(limits: PoolLimits, per_token: int, room: int) -> str:
    need = _round_up(limits.context_length, limits.page_size) * per_token
    fits = room // per_token // limits.page_size * limits.page_size
    shorter = f"use --context-length {fits} or less" if fits > 0 else "no context length fits"
    more = ", raise --mem-fraction" if limits.device == "cuda" else ", free memory"
    where = "host" if limits.device == "cpu" else "GPU"
    return (
        f"the KV cache of one context of {limits.context_length} tokens needs {gib(need)} "
        f"({per_token} bytes a token), but {gib(room)} are there for it after the weights "
        f"({gib(limits.free_bytes)} free on the {where}): {shorter}{more} or take a smaller weights format"
    )


def _too_large(limits: PoolLimits, per_token: int, room: int) -> str:
    asked = limits.max_total_tokens or 0
    if asked < limits.page_size:
        return f"max_total_tokens {asked} is less than one page of {limits.page_size} tokens"
    return (
        f"a KV cache of {asked} tokens needs {gib(asked * per_token)} ({per_token} bytes a token), "
        f"but {gib(max(0, room))} are there for it: lower --max-total-tokens to "
        f"{max(0, room) // per_token // limits.page_size * limits.page_size} or less"
    )
