"""Which pages each request holds, and which of them its prefix could be taken from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxengine.kv_cache.block_pool import BlockPool
from jaxengine.kv_cache.groups import MAX_TOKENS, PageGroup, most_pages, most_tokens
from jaxengine.kv_cache.prefix import extend_block_hashes

if TYPE_CHECKING:
    from jaxengine.request import Request


class CachedPrefix(NamedTuple):
    """The part of a prompt whose keys and values are in the cache.

    Attributes:
        num_tokens: Its length.
        page_ids: Of each group, its pages; any number where the next token sees none of a page.
    """

    num_tokens: int = 0
    page_ids: tuple[list[int], ...] = ()


NOTHING = CachedPrefix()


class KVCacheManager:
    """Lends pages to requests, and shares those whose content is the same.

    A request has pages of every group. All groups take them from one pool. Groups without a window hold pages for all
    of a request's tokens; those with one give back the pages that no later token sees.

    Attributes:
        block_size: Tokens that are hashed together; pages have a multiple of it.
        groups: See `PageGroup`.
        max_tokens: Length of the longest sequence that the pages always hold.
        prefix_queries: Tokens of the requests that have looked for their prefix in the cache.
        prefix_hits: How many of those tokens were found.
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        groups: Sequence[PageGroup] = (),
        max_step_tokens: int = MAX_TOKENS,
    ) -> None:
        """Makes a cache in which nothing is held.

        Args:
            num_pages: Of the pool.
            block_size: Tokens of a block.
            enable_prefix_caching: Whether pages are shared, and kept for later requests.
            groups: By default one without a window.
            max_step_tokens: Tokens of a request that a step computes at most.
        """
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        self.block_size = block_size
        self.groups = tuple(groups) or (PageGroup(block_size),)
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_pages, enable_prefix_caching)
        self.max_step_tokens = max_step_tokens
        self.max_tokens = most_tokens(self.groups, num_pages, max_step_tokens)
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._prefix_unit = math.lcm(*(group.page_size for group in self.groups))

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self.pool.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds; what is cached in them counts as free."""
        return self.pool.num_free

    @property
    def usage(self) -> float:
        """Share of the pages that requests hold, 0 to 1."""
        return 1 - self.pool.num_free / self.pool.num_pages

    def most_pages(self, num_tokens: int) -> int:
        """Returns the pages that a request of so many tokens holds at most."""
        return most_pages(self.groups, num_tokens, self.max_step_tokens)

    def num_held_pages(self, request: Request) -> int:
        """Returns the pages that a request holds."""
        return sum(map(len, request.page_ids)) - sum(request.num_dropped_pages)

    def get_computed_pages(self, request: Request) -> CachedPrefix:
        """Finds the longest cached prefix of a request that holds no pages.

        At least one token is left to compute, since its logits are wanted. Prompt logprobs want all of them: such a
        request reads nothing from the cache. The pages are not yet held by the request.
        """
        if not self._reads_cache(request):
            return NOTHING
        num_tokens = (request.num_tokens - 1) // self._prefix_unit * self._prefix_unit
        hashes = extend_block_hashes(request, self.block_size, num_tokens // self.block_size)
        shortest = None
        while num_tokens and num_tokens != shortest:  # until all groups have the same
            shortest = num_tokens
            for index in range(len(self.groups)):
                num_tokens = self._cached_tokens(index, hashes, num_tokens)
        if not num_tokens:
            return NOTHING
        return CachedPrefix(
            num_tokens,
            tuple(self._cached_pages(index, hashes, num_tokens) for index in range(len(self.groups))),
        )

    def allocate(
        self, request: Request, num_tokens: int, num_reserved: int = 0, computed: CachedPrefix = NOTHING
    ) -> bool:
        """Makes the request hold pages for a step, or returns False.

        Pages that the step does not see are given back in either case.

        Args:
            request: The request, which has `num_computed_tokens` before the step.
            num_tokens: Its tokens after the step.
            num_reserved: Groups without a window hold pages for so many tokens already.
            computed: What `get_computed_pages` has just returned; only for a request that holds no pages.
        """
        if num_tokens <= request.num_page_tokens:
            return True
        if request.num_page_tokens:
            self._drop_unseen(request)
            return self._extend(request, num_tokens, num_reserved)
        held = [
            page for index, pages in enumerate(computed.page_ids) for page in pages[self._dropped(index, computed) :]
        ]
        num_new = self._num_new_pages(computed.page_ids or ((),) * len(self.groups), num_tokens, num_reserved)
        if num_new > self.pool.num_free - self.pool.num_free_among(held):
            return False
        self.pool.acquire(held)  # before new pages are lent: those must not be the cached ones
        if computed.num_tokens:
            request.page_ids = [list(pages) for pages in computed.page_ids]
            request.num_dropped_pages = [self._dropped(index, computed) for index in range(len(self.groups))]
        else:
            request.page_ids, request.num_dropped_pages = [[] for _ in self.groups], [0] * len(self.groups)
        self._extend(request, num_tokens, num_reserved)
        request.num_named_blocks = computed.num_tokens // self.block_size
        if request.num_preemptions == 0 and self._reads_cache(request):
            self.prefix_queries += request.num_tokens
            self.prefix_hits += computed.num_tokens
        return True

    def cache_full_pages(self, request: Request, num_computed_known: int) -> None:
        """Offers the request's full pages to others.

        Args:
            request: The request.
            num_computed_known: Tokens that the host knows and whose computation has been scheduled. Later steps may
                read their pages, since the device runs the steps in order; the step that writes them must not.
        """
        num_full = num_computed_known // self.block_size
        if num_full <= request.num_named_blocks or not self.enable_prefix_caching:
            return
        hashes = extend_block_hashes(request, self.block_size, num_full)
        for index, group in enumerate(self.groups):
            blocks, pages = group.page_size // self.block_size, request.page_ids[index]
            first = max(request.num_named_blocks // blocks, request.num_dropped_pages[index])
            for i in range(first, num_full // blocks):
                self.pool.register(pages[i], _name(index, hashes[(i + 1) * blocks - 1]))
        request.num_named_blocks = num_full

    def free(self, request: Request) -> None:
        """Gives all of the request's pages back. The lists of them stay as they were; the request gets new ones."""
        parts = zip(self.groups, request.page_ids, request.num_dropped_pages, strict=False)
        held = [
            (end * group.page_size, page)
            for group, pages, first in parts
            for end, page in enumerate(pages[first:], first + 1)
        ]
        if len(self.groups) > 1:
            held.sort(key=lambda entry: entry[0])
        self.pool.release([page for _, page in held])
        request.page_ids, request.num_dropped_pages = [], []
        request.num_page_tokens = request.num_named_blocks = 0

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached content (after a change of weights, say). False, and no change, while pages are held."""
        return self.pool.reset()

    def _reads_cache(self, request: Request) -> bool:
        params = request.sampling_params
        skips = params.skip_reading_prefix_cache or params.prompt_logprobs is not None
        return self.enable_prefix_caching and not skips

    def _dropped(self, index: int, computed: CachedPrefix) -> int:
        """Returns pages at the beginning of a cached prefix that the tokens after it do not see."""
        return self.groups[index].first_page(computed.num_tokens)

    def _lookup(self, index: int, hashes: Sequence[bytes], page: int) -> int | None:
        blocks = self.groups[index].page_size // self.block_size
        return self.pool.lookup(_name(index, hashes[(page + 1) * blocks - 1]))

    def _cached_tokens(self, index: int, hashes: Sequence[bytes], num_tokens: int) -> int:
        """Returns the length of the longest prefix of which a group has all pages that later tokens see.

        It is at most `num_tokens`.
        """
        group, unit = self.groups[index], self._prefix_unit
        if group.window is None:
            page = 0
            while (page + 1) * group.page_size <= num_tokens and self._lookup(index, hashes, page) is not None:
                page += 1
            return page * group.page_size // unit * unit
        page = num_tokens // group.page_size
        while num_tokens and page > group.first_page(num_tokens):
            page -= 1
            if self._lookup(index, hashes, page) is None:
                num_tokens = page * group.page_size // unit * unit
                page = num_tokens // group.page_size
        return num_tokens

    def _cached_pages(self, index: int, hashes: Sequence[bytes], num_tokens: int) -> list[int]:
        group = self.groups[index]
        first, end = group.first_page(num_tokens), num_tokens // group.page_size
        found = [self._lookup(index, hashes, page) for page in range(first, end)]
        return [0] * first + [page for page in found if page is not None]

    def _drop_unseen(self, request: Request) -> None:
        """Gives back the pages that no token after the computed ones sees."""
        for index, group in enumerate(self.groups):
            first, dropped = group.first_page(request.num_computed_tokens), request.num_dropped_pages[index]
            if first > dropped:
                self.pool.release(request.page_ids[index][dropped:first])
                request.num_dropped_pages[index] = first

    def _num_new_pages(self, page_ids: Sequence[Sequence[int]], num_tokens: int, num_reserved: int) -> int:
        return sum(
            max(_target(group, num_tokens, num_reserved) - len(pages), 0)
            for group, pages in zip(self.groups, page_ids, strict=True)
        )

    def _extend(self, request: Request, num_tokens: int, num_reserved: int) -> bool:
        """Lends what is missing of all groups, or nothing."""
        if self._num_new_pages(request.page_ids, num_tokens, num_reserved) > self.pool.num_free:
            return False
        for group, pages in zip(self.groups, request.page_ids, strict=True):
            num_new = _target(group, num_tokens, num_reserved) - len(pages)
            if num_new > 0:
                pages += self.pool.allocate(num_new)
        parts = zip(self.groups, request.page_ids, strict=True)
        request.num_page_tokens = min(group.page_size * len(pages) for group, pages in parts)
        return True


def _target(group: PageGroup, num_tokens: int, num_reserved: int) -> int:
    """Returns pages of a group, those given back included, that a request must have had for its first tokens."""
    return group.num_pages(num_tokens if group.window is not None else max(num_tokens, num_reserved))


def _name(index: int, block_hash: bytes) -> bytes:
    """Returns what a page of a group is found by."""
    return block_hash + index.to_bytes(1)
