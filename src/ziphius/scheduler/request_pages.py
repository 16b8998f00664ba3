"""RequestPages: which request holds which page. Only this class takes pages from the pool or gives them back."""

from __future__ import annotations

from collections.abc import Iterable

from ziphius.kv_cache.page_pool import PagePool
from ziphius.kv_cache.radix_cache import RadixCache
from ziphius.scheduler.request import Holding, Request


class RequestPages:
    """Every page is free (the pool's), cached (the prefix cache's) or held (one request's own).

    `release` alone takes pages away from a request. Only KV that a finished step has computed is cached.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool) -> None:
        self._pool = PagePool(num_pages)
        self._cache = RadixCache(page_size)
        self._page_size = page_size
        self._prefix_cache = prefix_cache

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_reclaimable(self) -> int:
        """Cached pages that no request uses now."""
        return self._cache.num_evictable

    def admit(self, request: Request, reserve: int) -> Holding | None:
        """Give `request` its longest cached prefix, and pages for all its tokens.

        Returns None and changes nothing unless `reserve` pages would remain for others.
        """
        max_pages = request.max_cached_tokens // self._page_size if self._prefix_cache else 0
        match = self._cache.match(request.tokens, max_pages)
        self._cache.lock(match.node)
        fresh = self._take(-(-len(request.tokens) // self._page_size) - len(match.pages), reserve)
        if fresh is None:
            self._cache.unlock(match.node)
            return None
        num_cached = len(match.pages)
        request.holding = Holding(match.node, match.pages + fresh, num_cached)
        return request.holding

    def expected_growth(self, request: Request, tokens: int) -> int:
        """The pages that a running request will need to decode `tokens` more tokens, or fewer if it ends before."""
        assert request.holding is not None
        # The KV of an answer's last token is never computed.
        end = min(max(request.launched, request.prefill_end) + tokens, request.max_length - 1)
        return max(0, -(-end // self._page_size) - len(request.holding.pages))

    def has_room(self, request: Request) -> bool:
        """Whether it has the page for its next token."""
        assert request.holding is not None
        return request.launched < len(request.holding.pages) * self._page_size

    def grow(self, request: Request) -> list[int] | None:
        """One more page for `request`, evicting from the cache if need be; None when there is none."""
        assert request.holding is not None
        fresh = self._take(1)
        if fresh is not None:
            request.holding.pages += fresh
        return fresh

    def share(self, request: Request) -> None:
        """Put its full computed pages into the cache for others while it still uses them.

        This is not done when the cache has some of these tokens from another request: there would be two copies.
        """
        holding = request.holding
        assert holding is not None
        full = self._num_cacheable(request)
        if full > holding.num_shared and len(self._cache.match(request.tokens, full).pages) == holding.num_shared:
            _, node = self._cache.insert(request.tokens, holding.pages[:full])
            self._cache.lock(node)
            self._cache.unlock(holding.node)
            holding.node, holding.num_shared = node, full

    def release(self, request: Request) -> None:
        """Take all pages from `request`: the full computed ones stay in the cache unless it has them already."""
        holding = request.holding
        assert holding is not None
        kept_from, kept_to = holding.num_shared, self._num_cacheable(request)
        if kept_to > kept_from:
            kept_from, _ = self._cache.insert(request.tokens, holding.pages[:kept_to])
        else:
            kept_to = kept_from
        self._pool.free(holding.pages[holding.num_shared : kept_from])
        self._pool.free(holding.pages[kept_to:])
        self._cache.unlock(holding.node)
        request.holding = None

    def flush(self) -> None:
        """Empty the prefix cache. RuntimeError while a request holds a part of it."""
        self._pool.free(self._cache.clear())

    def check(self, holders: Iterable[Request]) -> None:
        """RuntimeError unless free + cached + held by `holders` are all pages."""
        held = sum(request.holding.num_private for request in holders if request.holding)
        free, cached = self._pool.num_free, self._cache.num_pages
        if free + cached + held != self.num_pages:
            raise RuntimeError(f"{free} pages free + {cached} cached + {held} held are not {self.num_pages}")

    def owners(self, holders: Iterable[Request]) -> list[int]:
        """Every page once for each owner it has, for checks: free, then cached, then held."""
        pages = [*self._pool.free_pages(), *self._cache.pages()]
        for request in holders:
            if request.holding is not None:
                pages += request.holding.pages[request.holding.num_shared :]
        return pages

    def _num_cacheable(self, request: Request) -> int:
        """The number of its first pages that are full of KV which others may reuse."""
        return request.computed // self._page_size if self._prefix_cache and request.keeps_prefix else 0

    def _take(self, count: int, reserve: int = 0) -> list[int] | None:
        missing = count - self._pool.num_free
        if missing + reserve > self._cache.num_evictable:
            return None
        if missing > 0:
            self._pool.free(self._cache.evict(missing))
        return self._pool.allocate(count)
