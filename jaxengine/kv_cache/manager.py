"""Which pages each request holds, and which of them its prefix could be taken from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxengine.kv_cache.block_pool import BlockPool
from jaxengine.kv_cache.prefix import extend_block_hashes

if TYPE_CHECKING:
    from jaxengine.request import Request


class KVCacheManager:
    """Lends pages of `block_size` tokens to requests, and shares those whose content is the same.

    Attributes:
        prefix_queries: Tokens of the requests that have looked for their prefix in the cache.
        prefix_hits: How many of those tokens were found.
    """

    def __init__(self, num_pages: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_pages, enable_prefix_caching)
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def num_pages(self) -> int:
        return self.pool.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds; what is cached in them counts as free."""
        return self.pool.num_free

    @property
    def usage(self) -> float:
        """Share of the pages that requests hold, 0 to 1."""
        return 1 - self.pool.num_free / self.pool.num_pages

    def get_computed_pages(self, request: Request) -> tuple[list[int], int]:
        """Finds the longest cached prefix of a request that holds no pages.

        At least one token is left to compute, since its logits are wanted. Prompt logprobs want all of them: such a
        request reads nothing from the cache.

        Returns:
            The pages, not yet held by the request, and the tokens that they cover.
        """
        pages: list[int] = []
        if self._reads_cache(request):
            num_blocks = (request.num_tokens - 1) // self.block_size
            for block_hash in extend_block_hashes(request, self.block_size, num_blocks)[:num_blocks]:
                page = self.pool.lookup(block_hash)
                if page is None:
                    break
                pages.append(page)
        return pages, len(pages) * self.block_size

    def allocate(self, request: Request, num_tokens: int, computed_pages: Sequence[int] = ()) -> bool:
        """Makes the request hold pages for its first `num_tokens` tokens, or changes nothing and returns False.

        Args:
            computed_pages: What `get_computed_pages` has just returned; only for a request that holds no pages.
        """
        if num_tokens <= len(request.page_ids) * self.block_size:
            return True
        num_new = -(-num_tokens // self.block_size) - (len(request.page_ids) or len(computed_pages))
        if request.page_ids:
            if num_new > self.pool.num_free:
                return False
            request.page_ids += self.pool.allocate(num_new)
            return True

        if num_new > self.pool.num_free - self.pool.num_free_among(computed_pages):
            return False
        self.pool.acquire(computed_pages)  # before new pages are lent: those must not be the cached ones
        request.page_ids = [*computed_pages, *self.pool.allocate(max(num_new, 0))]
        request.num_named_pages = len(computed_pages)
        if request.num_preemptions == 0 and self._reads_cache(request):
            self.prefix_queries += request.num_tokens
            self.prefix_hits += len(computed_pages) * self.block_size
        return True

    def cache_full_pages(self, request: Request, num_computed_known: int) -> None:
        """Offers the request's full pages to others.

        Args:
            num_computed_known: Tokens that the host knows and whose computation has been scheduled. Later steps may
                read their pages, since the device runs the steps in order; the step that writes them must not.
        """
        num_full = num_computed_known // self.block_size
        if num_full <= request.num_named_pages or not self.enable_prefix_caching:
            return
        hashes = extend_block_hashes(request, self.block_size, num_full)
        for i in range(request.num_named_pages, num_full):
            self.pool.register(request.page_ids[i], hashes[i])
        request.num_named_pages = num_full

    def free(self, request: Request) -> None:
        """Gives all of the request's pages back. The list of them stays as it was; the request gets a new one."""
        self.pool.release(request.page_ids)
        request.page_ids, request.num_named_pages = [], 0

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached content (after a change of weights, say). False, and no change, while pages are held."""
        return self.pool.reset()

    def _reads_cache(self, request: Request) -> bool:
        params = request.sampling_params
        skips = params.skip_reading_prefix_cache or params.prompt_logprobs is not None
        return self.enable_prefix_caching and not skips
