"""Latent and grouped-query attention kernels against their plain bodies."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import DTYPES, assert_close, poison_memory

from ziphius.kernels.gpu import combine, flash_prefill, mla_inputs, paged_decode
from ziphius.kernels.gpu.device import GpuDevice
from ziphius.kernels.gpu.paged_decode import Paged, SplitPlan

PAGE = 4
NOPE, ROPE, LORA, VALUE = 16, 8, 32, 16
LENGTHS = [1, 37, 70]


def make_paged(device: torch.device, page: int = PAGE) -> Paged:
    most = 80 // page + 1
    table = torch.randperm(3 * most).view(3, most).to(device, torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    for row, length in enumerate(LENGTHS):
        table[row, -(-length // page) :] = 10**6
    return Paged(table, lengths, page)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [SplitPlan(1, 0), SplitPlan(4, 0), SplitPlan(8, 16)])
@pytest.mark.parametrize("heads", [2, 20])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_mla_decode(
    device: torch.device, dtype: torch.dtype, plan: SplitPlan, heads: int, batch_invariant: bool
) -> None:
    gpu, paged = GpuDevice.of(device, batch_invariant), make_paged(device)
    q = torch.randn(3, heads, LORA + ROPE, device=device).to(dtype)
    cache = torch.randn(252, LORA + ROPE, device=device).to(dtype)
    w_uv = torch.randn(heads, LORA, VALUE, device=device).to(dtype)
    poison_memory(device)
    parts = paged_decode.mla_parts(gpu, q, cache, paged, 0.2, plan)
    expected = paged_decode.mla_parts_torch(q, cache, paged, 0.2, plan)
    whole = combine.combine_torch(paged_decode.mla_parts_torch(q.float(), cache.float(), paged, 0.2, SplitPlan(1, 0)))
    assert_close(combine.combine(gpu, parts, dtype), whole.to(dtype))
    assert_close(combine.combine_torch(expected).to(dtype), whole.to(dtype))
    assert_close(combine.combine_values(gpu, parts, w_uv), combine.combine_values_torch(expected, w_uv))
    poison_memory(device)
    keys_first = paged_decode.MLADecodeConfig(16, 16, 2, 4, keys_first=True)
    parts = paged_decode.mla_parts(gpu, q, cache, paged, 0.2, plan, keys_first)
    assert_close(combine.combine(gpu, parts, dtype), whole.to(dtype))


@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_pages_smaller_and_larger_than_a_round(device: torch.device, page: int) -> None:
    """A round takes several pages, or a part of one, or, where neither divides the other, looks up each row."""
    gpu, paged, plan = GpuDevice.of(device), make_paged(device, page), SplitPlan(2, 0)
    q = torch.randn(3, 2, LORA + ROPE, device=device)
    cache = torch.full((3 * (80 // page + 1) * page, LORA + ROPE), float("nan"), device=device)
    for row, length in enumerate(LENGTHS):
        position = torch.arange(length, device=device)
        slots = paged.page_table[row, position // page] * page + position % page
        cache[slots] = torch.randn(length, LORA + ROPE, device=device)
    expected = combine.combine_torch(paged_decode.mla_parts_torch(q, cache, paged, 0.2, plan))
    poison_memory(device)
    actual = combine.combine(gpu, paged_decode.mla_parts(gpu, q, cache, paged, 0.2, plan), torch.float32)
    assert_close(actual, expected)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 16), (4, 4, 24), (3, 1, 8)])
@pytest.mark.parametrize("plan", [SplitPlan(1, 0), SplitPlan(4, 0)])
def test_gqa_decode(device: torch.device, heads: int, kv_heads: int, dim: int, plan: SplitPlan) -> None:
    gpu, paged = GpuDevice.of(device), make_paged(device)
    q = torch.randn(3, heads + 2, dim, device=device)[:, :heads]
    k, v = (torch.randn(252, kv_heads, dim, device=device) for _ in range(2))
    poison_memory(device)
    parts = paged_decode.gqa_parts(gpu, q, k, v, paged, 0.2, plan)
    expected = combine.combine_torch(paged_decode.gqa_parts_torch(q, k, v, paged, 0.2, SplitPlan(1, 0)))
    assert_close(combine.combine(gpu, parts, torch.float32), expected)


def make_new_tokens(device: torch.device, dtype: torch.dtype, tokens: int) -> mla_inputs.NewTokens:
    projected = torch.randn(tokens, 5 + LORA + ROPE, device=device).to(dtype)
    return mla_inputs.NewTokens(
        latent=projected[:, 5 : 5 + LORA],
        k_pe=projected[:, 5 + LORA :],
        norm_weight=torch.randn(LORA, device=device).to(dtype),
        eps=1e-6,
        cos=torch.randn(tokens, ROPE // 2, device=device),
        sin=torch.randn(tokens, ROPE // 2, device=device),
        slots=torch.randperm(50, device=device)[:tokens],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 2), (19, 5)])
def test_inputs(device: torch.device, dtype: torch.dtype, tokens: int, heads: int) -> None:
    gpu, new = GpuDevice.of(device), make_new_tokens(device, dtype, tokens)
    wide = torch.randn(tokens, 3 + heads * (NOPE + ROPE), device=device).to(dtype)
    q = wide[:, 3:].unflatten(1, (heads, NOPE + ROPE))
    w_uk = torch.randn(heads, NOPE, LORA, device=device).to(dtype)
    caches = [torch.randn(50, LORA + ROPE, device=device).to(dtype)] * 2
    caches = [cache.clone() for cache in caches]
    poison_memory(device)
    actual = mla_inputs.decode_inputs(gpu, q, new, w_uk, caches[0])
    assert_close(actual, mla_inputs.decode_inputs_torch(q, new, w_uk, caches[1]))
    assert_close(caches[0], caches[1])
    q_twin = q.clone()
    rows = mla_inputs.prompt_inputs(gpu, q, new, NOPE, caches[0])
    assert_close(rows, mla_inputs.prompt_inputs_torch(q_twin, new, NOPE, caches[1]))
    assert_close(caches[0], caches[1])
    assert_close(q, q_twin)


@pytest.mark.parametrize("latent", [True, False])
def test_flash_prefill(device: torch.device, latent: bool) -> None:
    """A fresh prompt, a chunk over a prefix, one token."""
    heads, kv_heads, dim, pe, value = (4, 4, 16, 8, 12) if latent else (6, 2, 24, 0, 24)
    query_starts, prefixes = [2, 9, 150, 151], [0, 30, 5]
    counts = [query_starts[i + 1] - query_starts[i] + prefixes[i] for i in range(3)]
    key_starts = [0, counts[0], counts[0] + counts[1]]
    tiles = flash_prefill.make_tiles(query_starts, key_starts, [p + 1 for p in prefixes], device)
    q = torch.randn(151, heads, dim + pe, device=device)
    k = torch.randn(kv_heads, sum(counts), dim, device=device).transpose(0, 1)
    v = torch.randn(sum(counts), kv_heads, value, device=device)
    k_pe = torch.randn(sum(counts), pe, device=device) if latent else None
    actual, expected = (torch.full((151, heads, value), 7.0, device=device) for _ in range(2))
    flash_prefill.flash_prefill(GpuDevice.of(device), q, k, k_pe, v, actual, tiles, 0.3)
    flash_prefill.flash_prefill_torch(q, k, k_pe, v, expected, tiles, 0.3)
    assert_close(actual, expected)
