"""The one memory formula: bytes of weights and cache on a rank, and what a step needs beside them; no torch, no I/O.

The planner, the check at start and the engine's pool sizing all call it. So a start can compare
what was predicted with what was measured. All sizes are bytes of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from ziphius.checkpoint.config import ModelConfig, MoEConfig
from ziphius.checkpoint.parameters import Kind, Matrix, Part
from ziphius.formats import FORMATS, Use, WeightsFormat

GIB = 1 << 30
MIB = 1 << 20
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


def gib(nbytes: float) -> str:
    """`1.23 GiB`; small sizes in MiB."""
    return f"{nbytes / GIB:.2f} GiB" if abs(nbytes) >= GIB else f"{nbytes / MIB:.0f} MiB"
