"""TorchBackend against attention written out token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from ziphius.attention.batch import ForwardBatch
from ziphius.attention.torch_reference import TorchBackend
from ziphius.kv_cache.kv_pool import KVCache, LatentCache

PAGE = 4
SCALE = 0.3
# (tokens in the cache before, tokens of this step): two decode rows, a fresh prompt, a chunk over a prefix, one token.
SEQUENCES = [(9, 1), (3, 1), (0, 7), (13, 6), (4, 1)]
DECODES = 2


def make_batch(seed: int = 0) -> tuple[ForwardBatch, list[Tensor]]:
    """A mixed batch in shuffled pages, and every sequence's slots in order."""
    pages = list(range(40))
    random.Random(seed).shuffle(pages)
    table = torch.full((len(SEQUENCES), 8), 10**6, dtype=torch.int32)
    slots, starts, all_slots = [], [0], []
    for row, (old, new) in enumerate(SEQUENCES):
        mine = [pages.pop() for _ in range(math.ceil((old + new) / PAGE))]
        table[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        all_slots.append(torch.tensor([mine[i // PAGE] * PAGE + i % PAGE for i in range(old + new)]))
        slots.append(all_slots[-1][old:])
        starts.append(starts[-1] + new)
    lens = [old + new for old, new in SEQUENCES]
    positions = torch.cat([torch.arange(old, old + new) for old, new in SEQUENCES])
    batch = ForwardBatch(
        input_ids=torch.zeros(starts[-1], dtype=torch.int64),
        positions=positions,
        slots=torch.cat(slots),
        num_decodes=DECODES,
        query_starts=starts,
        seq_lens=lens,
        seq_lens_device=torch.tensor(lens, dtype=torch.int32),
        page_table=table,
        page_size=PAGE,
        sample_indices=torch.tensor([0]),
    )
    return batch, all_slots


def attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [D], k [L, D], v [L, Dv] -> [Dv]."""
    return ((k @ q * SCALE).softmax(0).unsqueeze(1) * v).sum(0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend(kv_heads: int) -> None:
    torch.manual_seed(0)
    batch, all_slots = make_batch()
    tokens, heads, dim = batch.num_tokens, 4, 8
    cache = KVCache(torch.randn(200, kv_heads, dim), torch.randn(200, kv_heads, dim))
    before = cache.k.clone()
    q = torch.randn(tokens, heads, dim)
    k, v = torch.randn(tokens, kv_heads, dim), torch.randn(tokens, kv_heads, dim)
    backend = TorchBackend()
    backend.prepare(batch)
    out = backend.attend(q, k, v, cache, batch, SCALE)
    torch.testing.assert_close(cache.k[batch.slots], k)
    torch.testing.assert_close(cache.v[batch.slots], v)
    untouched = torch.ones(200, dtype=torch.bool)
    untouched[batch.slots] = False
    torch.testing.assert_close(cache.k[untouched], before[untouched])
    for seq, slots in enumerate(all_slots):
        for token in range(batch.query_starts[seq], batch.query_starts[seq + 1]):
            seen = slots[: int(batch.positions[token]) + 1]
            for head in range(heads):
                kv = head * kv_heads // heads
                expected = attend_one(q[token, head], cache.k[seen, kv], cache.v[seen, kv])
                torch.testing.assert_close(out[token, head], expected, rtol=1e-5, atol=1e-5)


def test_attend_latent() -> None:
    torch.manual_seed(0)
    batch, all_slots = make_batch(1)
    tokens, heads, nope, rope, lora, value = batch.num_tokens, 3, 6, 4, 10, 5
    cache = LatentCache(torch.randn(200, lora + rope))
    q_nope, q_pe = torch.randn(tokens, heads, nope), torch.randn(tokens, heads, rope)
    latent, k_pe = torch.randn(tokens, lora), torch.randn(tokens, rope)
    w_uk, w_uv = torch.randn(heads, nope, lora), torch.randn(heads, lora, value)
    backend = TorchBackend()
    backend.prepare(batch)
    out = backend.attend_latent(q_nope, q_pe, latent, k_pe, w_uk, w_uv, cache, batch, SCALE)
    torch.testing.assert_close(cache.latent[batch.slots], torch.cat((latent, k_pe), 1))
    for seq, slots in enumerate(all_slots):
        for token in range(batch.query_starts[seq], batch.query_starts[seq + 1]):
            rows = cache.latent[slots[: int(batch.positions[token]) + 1]]
            for head in range(heads):
                keys = torch.cat((rows[:, :lora] @ w_uk[head].T, rows[:, lora:]), dim=1)
                q = torch.cat((q_nope[token, head], q_pe[token, head]))
                expected = attend_one(q, keys, rows[:, :lora] @ w_uv[head])
                torch.testing.assert_close(out[token, head], expected, rtol=1e-4, atol=1e-4)


def test_prepare_must_come_first() -> None:
    batch, _ = make_batch()
    other, _ = make_batch()
    backend = TorchBackend()
    backend.prepare(other)
    cache = KVCache(torch.zeros(200, 1, 4), torch.zeros(200, 1, 4))
    x = torch.zeros(batch.num_tokens, 1, 4)
    with pytest.raises(RuntimeError, match="prepare"):
        backend.attend(x, x, x, cache, batch, 1.0)


def test_the_cache_may_have_another_type() -> None:
    batch, _ = make_batch()
    backend = TorchBackend()
    backend.prepare(batch)
    cache = KVCache(torch.zeros(200, 2, 8, dtype=torch.bfloat16), torch.zeros(200, 2, 8, dtype=torch.bfloat16))
    q, k = torch.randn(batch.num_tokens, 4, 8), torch.randn(batch.num_tokens, 2, 8)
    out = backend.attend(q, k, k, cache, batch, SCALE)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
