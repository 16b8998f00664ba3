"""PagedAttention: runs the jobs of attention.py for one layer at a time, and owns a step's buffers."""

from __future__ import annotations

from collections.abc import Sequence

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
from ziphius.kernels.cpu.attention_tiles import KEY_GROUP, LANES
from ziphius.kernels.cpu.memory import aligned_bytes
from ziphius.kernels.cpu.pool import Program, ThreadPool


def takes(cache: Tensor, page_size: int) -> bool:
    """Whether the jobs take a cache [slots, kv_heads, head_dim] of pages of this size."""
    return cache.dtype == torch.float32 and cache.shape[2] % LANES == 0 and page_size % KEY_GROUP == 0


class PagedAttention:
    """Not for two threads at once."""

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool
        self._block = np.zeros(len(AttentionBlock._fields), dtype=np.int64)
        self._program = Program()
        self._decode = self._program.add(DECODE, *[0] * 7)
        self._prefill = self._program.add(PREFILL, *[0] * 7)
        self._finish = self._program.add(FINISH_DECODE, *[0] * 3)
        self._partials = torch.empty(0)
        self._scratch = aligned_bytes(0)
        self._kept: tuple[object, ...] = ()

    def begin(
        self,
        page_table: Tensor,
        page_size: int,
        seq_lens: Sequence[int],
        query_starts: Sequence[int],
        num_decodes: int,
    ) -> None:
        """Begin a new step, described as in ForwardBatch. Call it before the first layer."""
        lens, starts = np.array(seq_lens, dtype=np.int64), np.array(query_starts, dtype=np.int64)
        table = page_table.contiguous()
        self._kept = (lens, starts, table)
        self._block[:] = AttentionBlock(
            heads=0,
            kv_heads=0,
            head_dim=0,
            page_size=page_size,
            page_table=table.data_ptr(),
            table_width=table.shape[1],
            seq_lens=lens.ctypes.data,
            query_starts=starts.ctypes.data,
            num_decodes=num_decodes,
            num_seqs=len(lens),
            partials=0,
            scratch=0,
        )
        self._decode_lens = list(seq_lens[:num_decodes])

    def store(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        """k and v [tokens, kv_heads, head_dim] into the caches, in attention.py's order."""
        _, heads, size = k_cache.shape
        k_cache.view(-1, heads, size, KEY_GROUP)[slots // KEY_GROUP, :, :, slots % KEY_GROUP] = k
        v_cache[slots] = v

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """q [tokens, heads, head_dim] -> the same shape, float32."""
        heads, size = q.shape[1:]
        queries = (q.float() * softmax_factor(scale)).contiguous()
        out = torch.empty(q.shape)
        floats = partial_floats(heads, size, self._decode_lens)
        if self._partials.numel() < floats:
            self._partials = torch.empty(2 * floats)
        if self._scratch.numel() < self._pool.threads * scratch_bytes(heads, size):
            self._scratch = aligned_bytes(self._pool.threads * scratch_bytes(heads, size))
        self._block[:3] = (heads, k_cache.shape[1], size)
        self._block[-2:] = (self._partials.data_ptr(), self._scratch.data_ptr())
        block, row_bytes = self._block.ctypes.data, 4 * heads * size
        addresses = (queries.data_ptr(), row_bytes, k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(), row_bytes)
        self._decode[:] = (block, *addresses)
        self._prefill[:] = (block, *addresses)
        self._finish[:] = (block, out.data_ptr(), row_bytes)
        self._pool.run(self._program)
        return out
