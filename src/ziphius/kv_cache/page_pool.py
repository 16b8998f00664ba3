"""PagePool: which pages of the KV cache are free."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """The pages 0..num_pages-1. Each is free or has one owner. Allocating and freeing cost O(1) a page."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack with the lowest page on top, so that a fresh pool gives out neighbouring pages in order.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\1" * num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def free_pages(self) -> list[int]:
        """A copy, for checks."""
        return list(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. RuntimeError when fewer are free; the caller must look at `num_free` first."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages wanted, {len(self._free)} free")
        if count == 0:
            return []
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. RuntimeError for a page that is free already: two requests would get it next."""
        for page in pages:
            if self._is_free[page]:
                raise RuntimeError(f"page {page} was freed twice")
            self._is_free[page] = 1
            self._free.append(page)
