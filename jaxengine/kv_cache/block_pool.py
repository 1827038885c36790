"""Who holds which page of the KV cache, and which free pages still hold something worth keeping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Pages 0 .. num_pages - 1, each lent to as many holders as its reference count says.

    A page with no holder is free. A free page may still be cached: it keeps its content, and its hash, until it is lent
    anew. Free pages without a hash are lent first, then the cached one that was released longest ago.
    """

    def __init__(self, num_pages: int, enable_caching: bool = True) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages}: must be at least 1")
        self.num_pages = num_pages
        self.enable_caching = enable_caching
        self.ref_counts = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))  # next to be lent first
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages, free or held, that can be found by their hash."""
        return len(self._page_of)

    def allocate(self, num_pages: int) -> list[int]:
        """Lends free pages to one holder, and forgets what was cached in them.

        Raises:
            ValueError: There are not so many free pages.
        """
        if num_pages > len(self._free):
            raise ValueError(f"num_pages={num_pages}: only {len(self._free)} pages are free")
        pages = [self._free.popitem(last=False)[0] for _ in range(num_pages)]
        for page in pages:
            self.ref_counts[page] = 1
            self._forget(page)
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """Adds one holder to each page: a cached free page, or one that others hold as well."""
        for page in pages:
            if self.ref_counts[page] == 0:
                del self._free[page]
            self.ref_counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Takes one holder from each of a request's pages, given in the order of its tokens.

        The last pages are freed first: a prefix is useless without its beginning, and shared less the longer it is.

        Raises:
            ValueError: A page has no holder.
        """
        for page in reversed(pages):
            if self.ref_counts[page] == 0:
                raise ValueError(f"page {page} is released, but nothing holds it")
            self.ref_counts[page] -= 1
            if self.ref_counts[page] == 0:
                self._free[page] = None
                if self._hash_of[page] is None:
                    self._free.move_to_end(page, last=False)

    def lookup(self, block_hash: bytes) -> int | None:
        """Returns the page with this content, if there is one."""
        return self._page_of.get(block_hash)

    def register(self, page: int, block_hash: bytes) -> None:
        """Names the content of a held page that has no name yet.

        If another page has the same content, that one stays the cached one.
        """
        if self.enable_caching and block_hash not in self._page_of:
            self._hash_of[page] = block_hash
            self._page_of[block_hash] = page

    def num_free_among(self, pages: Iterable[int]) -> int:
        """Returns how many of these pages nobody holds."""
        return sum(self.ref_counts[page] == 0 for page in pages)

    def reset(self) -> bool:
        """Forgets all cached content. Does nothing, and returns False, while any page is held."""
        if len(self._free) < self.num_pages:
            return False
        for page in list(self._page_of.values()):
            self._forget(page)
        return True

    def _forget(self, page: int) -> None:
        block_hash = self._hash_of[page]
        if block_hash is not None:
            del self._page_of[block_hash]
            self._hash_of[page] = None
