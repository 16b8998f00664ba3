"""All layers of a Llama as one program: int8 products with float32 between them. It has no embedding and no head.

Compared with a call for each operation, this saves about three hundred calls and thread switches a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ziphius.kernels.cpu.attention import (
    DECODE,
    FINISH_DECODE,
    PREFILL,
    AttentionBlock,
    partial_floats,
    scratch_bytes,
    softmax_factor,
)
from ziphius.kernels.cpu.int8_tile import TILE_COLUMNS
from ziphius.kernels.cpu.linear import MULTIPLY, QUANTIZE_ROWS
from ziphius.kernels.cpu.llama_jobs import GATE_ROWS, GATE_UP, NORM_ROWS, ROTATE_AND_STORE
from ziphius.kernels.cpu.memory import aligned_bytes
from ziphius.kernels.cpu.pool import Program, ThreadPool
from ziphius.kernels.cpu.quantize import PackedWeight, row_bytes
from ziphius.kernels.cpu.row_tiles import LANES
from ziphius.kernels.cpu.sync import RUN_PROGRAM

JOBS = (NORM_ROWS, MULTIPLY, ROTATE_AND_STORE, DECODE, PREFILL, FINISH_DECODE, QUANTIZE_ROWS, GATE_UP, RUN_PROGRAM)
"""Everything that a LlamaStack and an Int8Linear run."""

KVTensors = tuple[Tensor, Tensor]
"""One layer's keys and values, each float32 [slots, kv_heads, head_dim], in attention.py's order."""


@dataclass(frozen=True, slots=True)
class LlamaLayerWeights:
    """One layer. Norms are float32 [hidden]; gate_up has all rows of gate, then all of up."""

    input_norm: Tensor
    qkv: PackedWeight
    o: PackedWeight
    post_attention_norm: Tensor
    gate_up: PackedWeight
    down: PackedWeight


@dataclass(frozen=True, slots=True)
class LlamaSizes:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    page_size: int

    @property
    def fits(self) -> bool:
        """Whether the tiles divide these sizes."""
        by_lanes = self.hidden % LANES == 0 and self.head_dim % (2 * LANES) == 0 and self.page_size % LANES == 0
        return by_lanes and all(n % TILE_COLUMNS == 0 for n in (self.hidden, self.intermediate, self.qkv))

    @property
    def attended(self) -> int:
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class LlamaStep:
    """What one step computes; see ForwardBatch."""

    x: Tensor
    """float32 [tokens, hidden]: embedded."""
    cos: Tensor
    """float32 [tokens, head_dim / 2], like sin."""
    sin: Tensor
    slots: Tensor
    """int64 [tokens]."""
    page_table: Tensor
    """int32 [sequences, max_pages]."""
    seq_lens: Sequence[int]
    query_starts: Sequence[int]
    num_decodes: int


class LlamaStack:
    """The layers and the final norm of a Llama on one rank, bound to a cache. Not for two threads at once."""

    def __init__(
        self,
        layers: Sequence[LlamaLayerWeights],
        final_norm: Tensor,
        sizes: LlamaSizes,
        caches: Sequence[KVTensors],
        pool: ThreadPool,
    ) -> None:
        """Weights and caches are read in place: their contents may change, but their addresses may not."""
        if not sizes.fits:
            raise ValueError(f"no tiles for {sizes}")
        self._layers = list(zip(layers, caches, strict=True))
        self._final_norm = final_norm
        self._sizes = sizes
        self._pool = pool
        self._tokens = np.zeros(1, dtype=np.int64)
        self._inputs = np.zeros(3, dtype=np.int64)
        self._attention = np.zeros(len(AttentionBlock._fields), dtype=np.int64)
        self._scratch = aligned_bytes(pool.threads * scratch_bytes(sizes.heads, sizes.head_dim))
        self._partials = torch.empty(0)
        self._buffers: _Buffers | None = None
        self._program: Program | None = None

    def __call__(self, step: LlamaStep) -> Tensor:
        """-> float32 [tokens, hidden], after the final norm, in a buffer that the next call overwrites."""
        tokens = step.x.shape[0]
        if self._buffers is None or self._program is None or self._buffers.x.shape[0] < tokens:
            self._buffers = _Buffers(tokens, self._sizes, self._pool.threads)
            self._program = self._make_program(self._buffers)
        self._buffers.x[:tokens].copy_(step.x)
        self._tokens[0] = tokens
        self._inputs[:] = (step.cos.data_ptr(), step.sin.data_ptr(), step.slots.data_ptr())
        seq_lens = np.array(step.seq_lens, dtype=np.int64)
        query_starts = np.array(step.query_starts, dtype=np.int64)
        page_table = step.page_table.contiguous()
        self._attention[:] = self._attention_block(step, page_table, seq_lens, query_starts)
        self._pool.run(self._program)
        return self._buffers.out[:tokens]

    def _attention_block(
        self, step: LlamaStep, page_table: Tensor, seq_lens: np.ndarray, query_starts: np.ndarray
    ) -> AttentionBlock:
        sizes = self._sizes
        floats = partial_floats(sizes.heads, sizes.head_dim, step.seq_lens[: step.num_decodes])
        if self._partials.numel() < floats:
            self._partials = torch.empty(2 * floats)
        return AttentionBlock(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            page_size=sizes.page_size,
            page_table=page_table.data_ptr(),
            table_width=page_table.shape[1],
            seq_lens=seq_lens.ctypes.data,
            query_starts=query_starts.ctypes.data,
            num_decodes=step.num_decodes,
            num_seqs=len(step.seq_lens),
            partials=self._partials.data_ptr(),
            scratch=self._scratch.data_ptr(),
        )

    def _make_program(self, buffers: _Buffers) -> Program:
        """The model: what each layer does to the buffers, in order."""
        sizes, program = self._sizes, Program()
        tokens, attention = self._tokens.ctypes.data, self._attention.ctypes.data
        x, quantized, qkv = buffers.x.data_ptr(), buffers.quantized.data_ptr(), buffers.qkv.data_ptr()
        attended, gated, out = buffers.attended.data_ptr(), buffers.gated.data_ptr(), buffers.out.data_ptr()
        hidden, eps, q_factor = sizes.hidden, _bits(sizes.eps), _bits(softmax_factor(sizes.head_dim**-0.5))
        rows = (qkv, 4 * sizes.qkv)
        results = (attended, 4 * sizes.attended)

        def multiply(weight: PackedWeight, y: int, add: int) -> None:
            data, scale = weight.data.data_ptr(), weight.scale.data_ptr()
            program.add(MULTIPLY, tokens, quantized, weight.in_features, data, scale, weight.out_features, y, add, 0)

        for layer, (k, v) in self._layers:
            cache = (k.data_ptr(), v.data_ptr())
            program.add(NORM_ROWS, tokens, x, layer.input_norm.data_ptr(), hidden, eps, out, quantized)
            multiply(layer.qkv, qkv, add=0)
            program.add(ROTATE_AND_STORE, tokens, attention, self._inputs.ctypes.data, *rows, *cache, q_factor)
            program.add(DECODE, attention, *rows, *cache, *results)
            program.add(PREFILL, attention, *rows, *cache, *results)
            program.add(FINISH_DECODE, attention, *results)
            program.add(QUANTIZE_ROWS, tokens, attended, sizes.attended, quantized)
            multiply(layer.o, x, add=1)
            program.add(NORM_ROWS, tokens, x, layer.post_attention_norm.data_ptr(), hidden, eps, out, quantized)
            gate_up = (layer.gate_up.data.data_ptr(), layer.gate_up.scale.data_ptr())
            program.add(
                GATE_UP, tokens, quantized, hidden, *gate_up, sizes.intermediate, buffers.gates.data_ptr(), gated
            )
            program.add(QUANTIZE_ROWS, tokens, gated, sizes.intermediate, quantized)
            multiply(layer.down, x, add=1)
        program.add(NORM_ROWS, tokens, x, self._final_norm.data_ptr(), hidden, eps, out, 0)
        return program


def compile_jobs() -> None:
    """Compile what is not compiled yet. This takes seconds, unless compiled code has been kept."""
    for job in JOBS:
        _ = job.address


class _Buffers:
    """The buffers between the jobs of a step of up to `tokens` tokens."""

    def __init__(self, tokens: int, sizes: LlamaSizes, threads: int) -> None:
        widest = max(sizes.hidden, sizes.attended, sizes.intermediate)
        self.x = torch.empty((tokens, sizes.hidden))
        self.out = torch.empty((tokens, sizes.hidden))
        self.quantized = torch.empty(tokens * row_bytes(widest), dtype=torch.uint8)
        self.qkv = torch.empty((tokens, sizes.qkv))
        self.attended = torch.empty((tokens, sizes.attended))
        self.gated = torch.empty((tokens, sizes.intermediate))
        self.gates = aligned_bytes(threads * 2 * 4 * GATE_ROWS * TILE_COLUMNS)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))
