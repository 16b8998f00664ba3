"""Paged attention of the CPU kernels: equal to plain torch, and the same however a token is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ziphius.kernels.cpu.attention import attention_reference, group_keys
from ziphius.kernels.cpu.paged_attention import PagedAttention, takes
from ziphius.kernels.cpu.pool import ThreadPool


@pytest.fixture(scope="module", params=[1, 3])
def attention(request: pytest.FixtureRequest) -> Iterator[PagedAttention]:
    pool = ThreadPool(request.param)
    yield PagedAttention(pool)
    pool.close()


@dataclass(slots=True)
class Paged:
    """Caches of some sequences on shuffled pages; what belongs to no sequence is NaN."""

    k: Tensor
    v: Tensor
    page_table: Tensor
    page_size: int
    lens: list[int]


def paged(kv_heads: int, size: int, lens: list[int], page_size: int) -> Paged:
    pages = [-(-length // page_size) for length in lens]
    order = torch.randperm(sum(pages) + 2).int()
    table = torch.full((len(lens), max(pages) + 1), 10**6, dtype=torch.int32)
    k, v = (torch.full(((len(order)) * page_size, kv_heads, size), torch.nan) for _ in range(2))
    taken = 0
    for row, (length, count) in enumerate(zip(lens, pages, strict=True)):
        table[row, :count] = order[taken : taken + count]
        taken += count
        index = torch.arange(length)
        slots = table[row].long()[index // page_size] * page_size + index % page_size
        k[slots], v[slots] = torch.randn(length, kv_heads, size), torch.randn(length, kv_heads, size)
    return Paged(k, v, table, page_size, lens)


def run(attention: PagedAttention, cache: Paged, q: Tensor, starts: list[int], decodes: int, lens: list[int]) -> Tensor:
    attention.begin(cache.page_table, cache.page_size, lens, starts, decodes)
    return attention(q, group_keys(cache.k), cache.v, q.shape[2] ** -0.5)


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 32), (8, 1, 128), (2, 2, 16), (8, 2, 80), (5, 1, 48)]
)
def test_equals_plain_torch(attention: PagedAttention, heads: int, kv_heads: int, size: int, page_size: int) -> None:
    torch.manual_seed(heads * size + page_size)
    lens, queries, decodes = [1, 5, 64, 65, 200, 17, 130, 64, 1], [1, 1, 1, 1, 1, 17, 3, 64, 1], 5
    cache = paged(kv_heads, size, lens, page_size)
    starts = [0, *torch.tensor(queries).cumsum(0).tolist()]
    q = torch.randn(starts[-1], heads, size)
    actual = run(attention, cache, q, starts, decodes, lens)
    expected = attention_reference(q, cache.k, cache.v, cache.page_table, page_size, lens, starts, size**-0.5)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)


def test_a_token_is_the_same_however_it_is_computed(attention: PagedAttention) -> None:
    torch.manual_seed(0)
    length, heads = 150, 6
    cache = paged(2, 32, [length], 16)
    q = torch.randn(length, heads, 32) * 5
    whole = run(attention, cache, q, [0, length], 0, [length])
    for start, end in ((0, 7), (7, 64), (64, 70), (70, 150)):
        part = run(attention, cache, q[start:end], [0, end - start], 0, [end])
        assert torch.equal(part, whole[start:end]), "in chunks"
    for position in (0, 1, 15, 16, 63, 64, 65, 127, 149):
        decoded = run(attention, cache, q[position : position + 1], [0, 1], 1, [position + 1])
        assert torch.equal(decoded, whole[position : position + 1]), "decoded"


def test_a_row_does_not_depend_on_the_batch(attention: PagedAttention) -> None:
    torch.manual_seed(1)
    lens = [3, 90, 64, 129]
    cache = paged(1, 16, lens, 16)
    q = torch.randn(len(lens), 4, 16)
    together = run(attention, cache, q, [0, 1, 2, 3, 4], 4, lens)
    for row, length in enumerate(lens):
        alone = Paged(cache.k, cache.v, cache.page_table[row : row + 1], 16, [length])
        assert torch.equal(run(attention, alone, q[row : row + 1], [0, 1], 1, [length]), together[row : row + 1])


def test_scores_far_apart_do_not_overflow(attention: PagedAttention) -> None:
    torch.manual_seed(2)
    cache = paged(1, 16, [100], 16)
    q = torch.randn(2, 2, 16) * 1e4
    starts = [0, 2]
    actual = run(attention, cache, q, starts, 0, [100])
    expected = attention_reference(q, cache.k, cache.v, cache.page_table, 16, [100], starts, 0.25)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_what_is_stored_is_found(attention: PagedAttention) -> None:
    torch.manual_seed(3)
    k, v = torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    slots = torch.tensor([0, 17, 18, 47, 33])
    k_cache, v_cache = torch.zeros(48, 2, 16), torch.zeros(48, 2, 16)
    attention.store(k, v, k_cache, v_cache, slots)
    plain = torch.zeros(48, 2, 16)
    plain[slots] = k
    assert torch.equal(k_cache, group_keys(plain))
    assert torch.equal(v_cache[slots], v)


def test_sizes_it_does_not_take() -> None:
    assert takes(torch.zeros(16, 1, 32), 32)
    assert not takes(torch.zeros(16, 1, 32), 8)
    assert not takes(torch.zeros(16, 1, 24), 16)
    assert not takes(torch.zeros(16, 1, 32, dtype=torch.bfloat16), 16)
