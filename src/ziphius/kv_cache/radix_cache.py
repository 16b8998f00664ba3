"""RadixCache: which pages hold which token prefixes, and which pages are evicted first.

It is a radix tree over whole pages (after RadixAttention, Zheng et al. 2023, arXiv:2312.07104): each edge is a run of
pages with their tokens, and two children of a node differ within their first page. The tree owns its pages. A request
that reads pages locks the node where they end, and the lock keeps everything above that node as well. Pages without a
lock may be evicted: from the leaves upwards, the least recently used first.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from typing import NamedTuple

TOKEN_TYPE = "q"
"""The type code of the token arrays that `match` and `insert` take."""
_TOKEN_BYTES = array(TOKEN_TYPE).itemsize


class RadixNode:
    """One edge and the node at its end. For others it is only a handle that they lock and unlock."""

    __slots__ = ("children", "key", "last_used", "lock_count", "pages", "parent", "queued")

    def __init__(self, key: bytearray, pages: list[int], parent: RadixNode | None, last_used: int) -> None:
        self.key = key
        """The edge's tokens as bytes: a comparison is one memcmp, and cutting off the end copies nothing."""
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, RadixNode] = {}
        """By the bytes of the child's first page."""
        self.lock_count = 0
        """Locks on this node and on all nodes below it."""
        self.last_used = last_used
        self.queued = False
        """Whether the eviction heap has an entry for it."""


class PrefixMatch(NamedTuple):
    pages: list[int]
    node: RadixNode
    """Where the match ends: lock it to keep `pages`."""


class Insertion(NamedTuple):
    present: int
    """Leading pages that the tree already had; it took over the pages after them."""
    node: RadixNode
    """Where the inserted tokens end."""


class RadixCache:
    """Prefixes by page. `match` and `insert` cost O(tokens given), `lock` and `unlock` O(edges on the path)."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page_bytes = page_size * _TOKEN_BYTES
        self._clock = 0
        self._num_pages = 0
        self._num_locked = 0
        self._root = RadixNode(bytearray(), [], None, 0)
        # A heap of (last_used, tie-break, leaf). Entries become out of date, and are corrected when they come to the
        # top, so that locking and matching never search the heap. Because of `queued` a node has one entry at most.
        self._leaves: list[tuple[int, int, RadixNode]] = []

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_evictable(self) -> int:
        """Pages without a lock: `evict` can return all of them."""
        return self._num_pages - self._num_locked

    def pages(self) -> Iterator[int]:
        """Every page in the tree, for checks."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            yield from node.pages
            stack.extend(node.children.values())

    def match(self, tokens: array[int], max_pages: int) -> PrefixMatch:
        """The longest cached prefix of `tokens` in whole pages, at most `max_pages` of them."""
        pages, node = self._descend(tokens[: max_pages * self._page_size].tobytes())
        return PrefixMatch(pages, node)

    def insert(self, tokens: array[int], pages: list[int]) -> Insertion:
        """Keep `pages`, which hold the first len(pages) * page_size of `tokens`.

        If the tree has a prefix of these tokens already, it keeps its own pages for that prefix, and the caller still
        owns the first `present` of `pages`.
        """
        key = tokens[: len(pages) * self._page_size].tobytes()
        if len(key) != len(pages) * self._page_bytes:
            raise RuntimeError(f"{len(pages)} pages to insert, but only {len(tokens)} tokens")
        known, node = self._descend(key)
        present = len(known)
        if present < len(pages):
            rest = key[present * self._page_bytes :]
            leaf = RadixNode(bytearray(rest), pages[present:], node, self._clock)
            node.children[rest[: self._page_bytes]] = leaf
            self._num_pages += len(leaf.pages)
            self._queue_if_leaf(leaf)
            node = leaf
        return Insertion(present, node)

    def lock(self, node: RadixNode) -> None:
        """Protect `node` and all above it from eviction, until `unlock` was called as often as `lock`."""
        step: RadixNode | None = node
        while step is not None:
            if step.lock_count == 0:
                self._num_locked += len(step.pages)
            step.lock_count += 1
            step = step.parent

    def unlock(self, node: RadixNode) -> None:
        step: RadixNode | None = node
        while step is not None:
            if step.lock_count == 0:
                raise RuntimeError("a node of the prefix cache was unlocked more often than locked")
            step.lock_count -= 1
            if step.lock_count == 0:
                self._num_locked -= len(step.pages)
            step = step.parent
        self._queue_if_leaf(node)

    def evict(self, count: int) -> list[int]:
        """Remove `count` pages from the tree; the caller owns them then. RuntimeError when fewer are evictable.

        A leaf loses its last pages first, and is removed only when all its pages are taken.
        """
        if count > self.num_evictable:
            raise RuntimeError(f"{count} pages to evict, {self.num_evictable} evictable")
        evicted: list[int] = []
        while len(evicted) < count:
            leaf = self._oldest_leaf()
            dropped = min(count - len(evicted), len(leaf.pages))
            evicted += leaf.pages[-dropped:]
            if dropped == len(leaf.pages):
                self._remove(leaf)
            else:
                del leaf.pages[-dropped:]
                del leaf.key[-dropped * self._page_bytes :]
        self._num_pages -= count
        return evicted

    def clear(self) -> list[int]:
        """Remove all pages from the tree; the caller owns them then. RuntimeError while anything is locked."""
        if self._root.lock_count:
            raise RuntimeError("the prefix cache cannot be cleared while requests use it")
        pages = list(self.pages())
        self._root.children.clear()
        self._leaves.clear()
        self._num_pages = 0
        return pages

    def _descend(self, key: bytes) -> tuple[list[int], RadixNode]:
        """Follow `key` as far as the tree has it, in whole pages. An edge that it leaves in the middle is split."""
        self._clock += 1
        node, pages, done = self._root, list[int](), 0
        while (child := node.children.get(key[done : done + self._page_bytes])) is not None:
            common = self._common_bytes(child.key, key, done)
            node = child if common == len(child.key) else self._split(child, common)
            node.last_used = self._clock
            pages += node.pages
            done += common
        return pages, node

    def _common_bytes(self, edge: bytearray, key: bytes, done: int) -> int:
        """How many bytes of `edge` and of `key` from `done` on are equal, in whole pages; the first page is."""
        if key.startswith(edge, done):
            return len(edge)
        size = self._page_bytes
        common = size
        while edge[common : common + size] == key[done + common : done + common + size]:
            common += size
        return common

    def _split(self, node: RadixNode, length: int) -> RadixNode:
        """Cut `node`'s edge after `length` bytes; returns the new upper part.

        `node` itself stays the lower part: those who locked it have also locked what is now above it.
        """
        pages = length // self._page_bytes
        upper = RadixNode(node.key[:length], node.pages[:pages], node.parent, node.last_used)
        upper.lock_count = node.lock_count
        assert node.parent is not None
        node.parent.children[self._first_page(node)] = upper
        node.key = node.key[length:]
        node.pages = node.pages[pages:]
        node.parent = upper
        upper.children[self._first_page(node)] = node
        return upper

    def _remove(self, leaf: RadixNode) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[self._first_page(leaf)]
        leaf.parent = None
        self._queue_if_leaf(parent)

    def _first_page(self, node: RadixNode) -> bytes:
        return bytes(node.key[: self._page_bytes])

    def _queue_if_leaf(self, node: RadixNode) -> None:
        if not node.queued and self._is_evictable_leaf(node):
            self._push(node)

    def _is_evictable_leaf(self, node: RadixNode) -> bool:
        return not node.children and node.lock_count == 0 and node.parent is not None

    def _oldest_leaf(self) -> RadixNode:
        while True:
            last_used, _, node = self._leaves[0]
            if self._is_evictable_leaf(node) and node.last_used == last_used:
                return node
            heapq.heappop(self._leaves)
            node.queued = False
            self._queue_if_leaf(node)

    def _push(self, node: RadixNode) -> None:
        node.queued = True
        heapq.heappush(self._leaves, (node.last_used, id(node), node))
