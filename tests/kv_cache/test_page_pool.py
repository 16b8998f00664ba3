"""PagePool: every page is handed out once, and comes back once."""

from __future__ import annotations

import pytest

from ziphius.kv_cache.page_pool import PagePool


def test_a_fresh_pool_hands_out_neighbours_in_order():
    pool = PagePool(5)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    assert pool.num_free == 0


def test_pages_come_back_and_are_reused():
    pool = PagePool(4)
    pages = pool.allocate(4)
    pool.free(pages[1:3])
    assert pool.num_free == 2
    assert sorted(pool.allocate(2)) == sorted(pages[1:3])


def test_nothing_is_taken_for_zero_pages():
    pool = PagePool(2)
    assert pool.allocate(0) == []
    assert sorted(pool.free_pages()) == [0, 1]


def test_asking_for_too_many_takes_none():
    pool = PagePool(2)
    with pytest.raises(RuntimeError, match="3 pages wanted, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_double_free_is_noticed():
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.free(pages[:1])
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.free(pages[:1])
