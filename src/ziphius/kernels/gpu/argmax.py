"""The most likely token of each row of logits, stored where the next step reads it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.gpu.device import GpuDevice, allow_next, wait_for_previous


@triton.jit
def _argmax_kernel(logits, tokens, rows, last_token, vocab, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    allow_next(PDL)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, vocab, BLOCK):
        inside = start + at < vocab
        value = tl.load(logits + row.to(tl.int64) * stride + start + at, mask=inside, other=float("-inf"))
        better = value > best
        best = tl.where(better, value, best)
        best_at = tl.where(better, start + at, best_at)
    # Among equals, take the lowest id.
    highest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == highest, best_at, vocab), axis=0)
    token = tl.minimum(token, vocab - 1)  # A NaN never compares as equal.
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(last_token + tl.load(rows + row), token.to(tl.int64))


def argmax_into(gpu: GpuDevice, logits: Tensor, tokens: Tensor, rows: Tensor, last_token: Tensor) -> None:
    """logits [n, vocab] float32; tokens[i] and last_token[rows[i]] become row i's best, the lowest id among equals."""
    count, vocab = logits.shape
    block = min(8192, triton.next_power_of_2(vocab))
    _argmax_kernel[(count,)](
        logits, tokens, rows, last_token, vocab, logits.stride(0), BLOCK=block, num_warps=16, **gpu.overlap
    )
