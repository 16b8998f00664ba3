"""The one memory formula: bytes of weights and cache on a rank, and how large the pool may be; no torch, no I/O.

The planner, the check at start and the engine's pool sizing all call it. So a start can compare
what was predicted with what was measured. All sizes are bytes of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from ziphius.checkpoint.config import ModelConfig, MoEConfig
from ziphius.checkpoint.parameters import Kind, Matrix, Part
from ziphius.errors import DoesNotFit
from ziphius.formats import FORMATS, Use, WeightsFormat

GIB = 1 << 30
MIB = 1 << 20
CPU_SHARE = 0.25
"""Share of the memory left after loading that the pool on a CPU may take, unless --mem-fraction says otherwise."""
CPU_KEEP_FREE = 0.10
"""Share of the memory left after loading that stays free even where one context needs more than CPU_SHARE."""
CUDA_WORKSPACE = 2 * GIB
"""CUDA graphs, expanded keys and values, libraries' workspaces, the allocator's rounding: an allowance."""
CUDA_CONTEXT = 730 * MIB
"""What a process loses on a GPU to its CUDA context and libraries before it loads a model (727 on an H200)."""
NCCL_BUFFERS = 512 * MIB
"""What a process loses besides to NCCL, with several ranks: an allowance."""
CPU_PROCESS = 512 * MIB
"""Main memory of a rank's process without weights and cache: interpreter, torch, buffers."""

DTYPE_BYTES = {row.dtype: row.bits // 8 for row in FORMATS.values() if row.dtype is not None}


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of one rank's weights by part."""

    routed_experts: int = 0
    shared_experts: int = 0
    attention_sharded: int = 0
    attention_replicated: int = 0
    """MLA's q_a and kv_a (each rank holds them whole), and k and v heads that several ranks hold."""
    dense: int = 0
    router: int = 0
    embedding: int = 0
    head: int = 0
    norms: int = 0

    @property
    def attention(self) -> int:
        return self.attention_sharded + self.attention_replicated

    @property
    def total(self) -> int:
        return sum(int(getattr(self, f.name)) for f in fields(self))


def matrices(config: ModelConfig, tp: int = 1) -> Iterator[Matrix]:
    """One rank's parameters. `tp` must divide what it shards (planner/validity.py says whether it does)."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    moe_layers = sum(config.is_moe_layer(i) for i in range(layers))
    yield Matrix("embedding", "float", config.vocab_size // tp, hidden)
    yield Matrix("head", "tied_head" if config.tie_word_embeddings else "linear", config.vocab_size // tp, hidden)
    yield Matrix("norms", "float", hidden * (2 * layers + 1), 1)
    yield from config.attention.matrices(hidden, layers, tp)
    yield from _mlp("dense", config, config.intermediate_size // tp, layers - moe_layers)
    if config.moe is not None:
        yield from _moe(config, config.moe, tp, moe_layers)


def _mlp(part: Part, config: ModelConfig, width: int, copies: int, kind: Kind = "linear") -> Iterator[Matrix]:
    bias = config.mlp_bias and part == "dense"
    if copies and width:
        yield Matrix(part, kind, width, config.hidden_size, 2 * copies, bias)
        yield Matrix(part, kind, config.hidden_size, width, copies, bias)


def _moe(config: ModelConfig, moe: MoEConfig, tp: int, layers: int) -> Iterator[Matrix]:
    yield Matrix("router", "float", moe.n_routed_experts, config.hidden_size, layers)
    experts = layers * moe.n_routed_experts
    yield from _mlp("routed_experts", config, moe.moe_intermediate_size // tp, experts, "expert")
    yield from _mlp("shared_experts", config, moe.shared_intermediate_size // tp, layers)


def matrix_bytes(matrix: Matrix, weights_format: WeightsFormat, float_bytes: int) -> int:
    """Bytes that `matrix` takes in a format, by its row in `formats`.

    Embedding, router, norms and biases stay in the dtype, whose values have `float_bytes` each.
    """
    if matrix.kind == "float":
        return matrix.parameters * float_bytes
    stored = FORMATS[weights_format].of(_use(matrix))
    if stored is None:
        return matrix.parameters * float_bytes
    if matrix.kind == "tied_head" and stored.dtype is not None and stored.bits == 8 * float_bytes:
        return 0  # it is the embedding's own memory
    bias_bytes = matrix.copies * matrix.out_features * float_bytes if matrix.bias else 0
    return matrix.copies * stored.matrix_bytes(matrix.out_features, matrix.in_features) + bias_bytes


def _use(matrix: Matrix) -> Use:
    if matrix.part == "head":
        return "head"
    if matrix.kind == "expert" or matrix.kind == "latent_up":
        return matrix.kind
    return "linear"


def weight_bytes(
    config: ModelConfig, tp: int, weights_format: WeightsFormat, *, float_bytes: int | None = None
) -> WeightBytes:
    """Bytes of one rank's weights. `float_bytes`: size of a value in the dtype (default: what the format implies)."""
    float_bytes = FORMATS[weights_format].usual_float_bytes if float_bytes is None else float_bytes
    parts: dict[str, int] = {}
    for matrix in matrices(config, tp):
        parts[matrix.part] = parts.get(matrix.part, 0) + matrix_bytes(matrix, weights_format, float_bytes)
    return WeightBytes(**parts)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model (a tied head counts once)."""
    return sum(m.parameters for m in matrices(config))


def kv_values_per_token(config: ModelConfig, tp: int) -> int:
    """Cache values of one token over all layers on one rank."""
    return config.num_hidden_layers * config.attention.cache_values(tp)


def kv_bytes_per_token(config: ModelConfig, tp: int, dtype: str) -> int:
    """Cache bytes of one token on one rank; `dtype` is float32, bfloat16 or float16."""
    return kv_values_per_token(config, tp) * DTYPE_BYTES[dtype]


def activation_bytes(config: ModelConfig, tp: int, *, tokens: int, rows: int, dtype: str) -> int:
    """Allowance for one step's activations: `tokens` through the widest layer, `rows` rows of logits in float32.

    Counted as if everything of one layer lived at once, which no step does: an upper bound for the
    layer, standing in for what the allocator keeps of earlier layers. Of MLA only `rows` are compared in the latent
    space; what prompts expand of it is bounded by a constant (CUDA_WORKSPACE).
    """
    mlp = 3 * config.intermediate_size // tp
    if config.moe is not None:
        width = config.moe.moe_intermediate_size // tp
        experts = config.moe.num_experts_per_tok * (2 * config.hidden_size + 3 * width)
        mlp = max(mlp, experts + 3 * config.moe.shared_intermediate_size // tp)
    attention = config.attention
    values = tokens * (4 * config.hidden_size + attention.activation_values(tp) + mlp)
    values += rows * attention.latent_values(tp)
    return values * DTYPE_BYTES[dtype] + 3 * rows * config.vocab_size * 4


def cuda_reserve(config: ModelConfig, tp: int, batch: BatchLimits, *, dtype: str) -> int:
    """What the native engine leaves free on a GPU beside weights and pool: activations, workspaces, CUDA graphs."""
    tokens = batch.prompt_tokens + batch.requests
    return CUDA_WORKSPACE + activation_bytes(config, tp, tokens=tokens, rows=batch.requests, dtype=dtype)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one step takes at most."""

    requests: int
    prompt_tokens: int

    @classmethod
    def of(cls, device: Literal["cpu", "cuda"], requests: int | None, prompt_tokens: int | None) -> BatchLimits:
        """As asked, else what suits the device: a GPU is idle where a CPU's step would take seconds."""
        usual = (128, 8192) if device == "cuda" else (32, 512)
        return cls(requests or usual[0], prompt_tokens or usual[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """What the size of a KV pool depends on, besides the model."""

    device: Literal["cpu", "cuda"]
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


def gib(nbytes: float) -> str:
    """`1.23 GiB`; small sizes in MiB."""
    return f"{nbytes / GIB:.2f} GiB" if abs(nbytes) >= GIB else f"{nbytes / MIB:.0f} MiB"


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
