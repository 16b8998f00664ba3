"""RadixCache: matching by page, splitting, locks and eviction; and against a plain dict of prefixes."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ziphius.kv_cache.radix_cache import RadixCache

PAGE_SIZE = 2


def tokens(text):
    return array("q", [ord(letter) for letter in text])


def matched(cache, text, max_pages=100):
    return cache.match(tokens(text), max_pages).pages


@pytest.fixture
def cache():
    return RadixCache(PAGE_SIZE)


def test_an_empty_cache_knows_nothing(cache):
    assert matched(cache, "abcd") == []
    assert (cache.num_pages, cache.num_evictable) == (0, 0)


def test_a_prefix_is_found_in_whole_pages(cache):
    cache.insert(tokens("abcdef"), [7, 8, 9])
    assert matched(cache, "abcdef") == [7, 8, 9]
    assert matched(cache, "abcdefgh") == [7, 8, 9]
    assert matched(cache, "abcde") == [7, 8]
    assert matched(cache, "abcxef") == [7]
    assert matched(cache, "axcdef") == []


def test_a_match_can_be_limited(cache):
    cache.insert(tokens("abcdef"), [7, 8, 9])
    assert matched(cache, "abcdef", max_pages=2) == [7, 8]
    assert matched(cache, "abcdef", max_pages=0) == []


def test_branches_split_at_page_boundaries(cache):
    cache.insert(tokens("abcdef"), [1, 2, 3])
    present, _ = cache.insert(tokens("abcdxyzz"), [11, 12, 13, 14])
    assert present == 2
    assert matched(cache, "abcdef") == [1, 2, 3]
    assert matched(cache, "abcdxyzz") == [1, 2, 13, 14]
    assert cache.num_pages == 5
    assert sorted(cache.pages()) == [1, 2, 3, 13, 14]


def test_inserting_what_is_there_takes_nothing(cache):
    cache.insert(tokens("abcdef"), [1, 2, 3])
    assert cache.insert(tokens("abcd"), [8, 9]).present == 2
    assert cache.insert(tokens("abcdef"), [1, 2, 3]).present == 3
    assert sorted(cache.pages()) == [1, 2, 3]


def test_tokens_beyond_the_pages_are_not_inserted(cache):
    cache.insert(tokens("abcde"), [1, 2])
    assert matched(cache, "abcdefg") == [1, 2]
    with pytest.raises(RuntimeError, match="2 pages to insert, but only 3 tokens"):
        cache.insert(tokens("abc"), [1, 2])


def test_the_least_recently_used_goes_first_from_its_end(cache):
    cache.insert(tokens("aabbcc"), [1, 2, 3])
    cache.insert(tokens("xxyyzz"), [4, 5, 6])
    matched(cache, "aabbcc")
    assert cache.evict(1) == [6]
    assert matched(cache, "xxyyzz") == [4, 5]
    assert cache.evict(1) == [3]
    assert cache.evict(3) == [1, 2, 5]
    assert matched(cache, "xxyyzz") == [4]
    assert cache.evict(1) == [4]
    assert (cache.num_pages, cache.num_evictable) == (0, 0)


def test_a_parent_outlives_its_children(cache):
    cache.insert(tokens("aabbcc"), [1, 2, 3])
    cache.insert(tokens("aabbdd"), [1, 2, 4])
    assert cache.evict(2) == [3, 4]
    assert cache.evict(2) == [1, 2]


def test_a_locked_path_stays(cache):
    cache.insert(tokens("aabbcc"), [1, 2, 3])
    held = cache.match(tokens("aabb"), 100)
    cache.lock(held.node)
    assert cache.num_evictable == 1
    assert cache.evict(1) == [3]
    with pytest.raises(RuntimeError, match="1 pages to evict, 0 evictable"):
        cache.evict(1)
    cache.unlock(held.node)
    assert cache.evict(2) == [1, 2]


def test_a_lock_survives_a_split_above_it(cache):
    _, node = cache.insert(tokens("aabbcc"), [1, 2, 3])
    cache.lock(node)
    cache.insert(tokens("aaxx"), [1, 9])
    assert cache.num_evictable == 1
    assert cache.evict(1) == [9]
    cache.unlock(node)
    assert cache.num_evictable == 3
    assert cache.evict(2) == [2, 3]
    assert matched(cache, "aabbcc") == [1]


def test_locks_count(cache):
    _, node = cache.insert(tokens("aa"), [1])
    cache.lock(node)
    cache.lock(node)
    cache.unlock(node)
    assert cache.num_evictable == 0
    cache.unlock(node)
    assert cache.num_evictable == 1
    with pytest.raises(RuntimeError, match="unlocked more often"):
        cache.unlock(node)


def test_clearing_gives_all_pages_back_unless_locked(cache):
    _, node = cache.insert(tokens("aabb"), [1, 2])
    cache.insert(tokens("ccdd"), [3, 4])
    cache.lock(node)
    with pytest.raises(RuntimeError, match="cannot be cleared"):
        cache.clear()
    cache.unlock(node)
    assert sorted(cache.clear()) == [1, 2, 3, 4]
    assert matched(cache, "aabb") == []
    cache.insert(tokens("aabb"), [5, 6])
    assert cache.evict(2) == [5, 6]


def test_eviction_entries_do_not_pile_up(cache):
    """An entry takes more than 100 bytes."""

    def use(times):
        for _ in range(times):
            _, node = cache.insert(tokens("aabb"), [1, 2])
            cache.lock(node)
            cache.unlock(node)

    use(10)
    tracemalloc.start()
    use(1000)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 50 * 1000


WORDS = st.text(alphabet="ab", min_size=0, max_size=12)


class AgainstADictOfPrefixes(RuleBasedStateMachine):
    """The model: each cached prefix (a whole number of pages) and its page."""

    def __init__(self):
        super().__init__()
        self.cache = RadixCache(PAGE_SIZE)
        self.page_of = {}
        self.next_page = 0
        self.locks = []

    def known(self, text):
        prefixes = [text[:end] for end in range(PAGE_SIZE, len(text) + 1, PAGE_SIZE)]
        count = next((i for i, prefix in enumerate(prefixes) if prefix not in self.page_of), len(prefixes))
        return prefixes, count

    @rule(text=WORDS)
    def insert(self, text):
        prefixes, count = self.known(text)
        pages = [self.page_of[p] for p in prefixes[:count]]
        for prefix in prefixes[count:]:
            self.page_of[prefix] = self.next_page
            pages.append(self.next_page)
            self.next_page += 1
        assert self.cache.insert(tokens(text), pages).present == count

    @rule(text=WORDS, limit=st.integers(0, 8))
    def match(self, text, limit):
        prefixes, count = self.known(text)
        assert matched(self.cache, text, limit) == [self.page_of[p] for p in prefixes[: min(count, limit)]]

    @rule(text=WORDS)
    def lock(self, text):
        prefixes, count = self.known(text)
        node = self.cache.match(tokens(text), 100).node
        self.cache.lock(node)
        self.locks.append((node, prefixes[:count]))

    @precondition(lambda self: self.locks)
    @rule(data=st.data())
    def unlock(self, data):
        node, _ = self.locks.pop(data.draw(st.integers(0, len(self.locks) - 1)))
        self.cache.unlock(node)

    @rule(data=st.data())
    def evict(self, data):
        evicted = set(self.cache.evict(data.draw(st.integers(0, self.cache.num_evictable))))
        gone = {prefix for prefix, page in self.page_of.items() if page in evicted}
        assert len(gone) == len(evicted)
        assert not gone & self.locked()
        for prefix in gone:
            del self.page_of[prefix]

    @precondition(lambda self: not self.locks)
    @rule()
    def clear(self):
        assert sorted(self.cache.clear()) == sorted(self.page_of.values())
        self.page_of.clear()

    def locked(self):
        return {prefix for _, prefixes in self.locks for prefix in prefixes}

    @invariant()
    def it_holds_the_same_pages(self):
        assert sorted(self.cache.pages()) == sorted(self.page_of.values())
        assert self.cache.num_pages == len(self.page_of)
        assert self.cache.num_evictable == len(self.page_of.keys() - self.locked())
        # No prefix is kept whose beginning has gone.
        assert all(p[:-PAGE_SIZE] in self.page_of for p in self.page_of if len(p) > PAGE_SIZE)


TestAgainstADictOfPrefixes = AgainstADictOfPrefixes.TestCase
TestAgainstADictOfPrefixes.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
