"""BlockPool, block hashes and KVCacheManager."""

from collections.abc import Iterable

import pytest

from jaxengine.kv_cache import BlockPool, KVCacheManager
from jaxengine.kv_cache.manager import NOTHING
from jaxengine.kv_cache.prefix import extend_block_hashes
from jaxengine.request import Request
from jaxengine.sampling_params import SamplingParams


def make_request(request_id="r", prompt: Iterable[int] = range(10), **kwargs) -> Request:
    params = SamplingParams(prompt_logprobs=kwargs.pop("prompt_logprobs", None))
    return Request(request_id, list(prompt), params, max_tokens=16, **kwargs)


def compute(kv: KVCacheManager, request: Request) -> list[int]:
    """What the scheduler does for a prompt in one step. Returns the request's pages."""
    assert kv.allocate(request, request.num_tokens, 0, kv.get_computed_pages(request))
    kv.cache_full_pages(request, request.num_tokens)
    return request.page_ids[0]


class TestBlockPool:
    def test_lends_each_page_once(self):
        pool = BlockPool(4)
        assert sorted(pool.allocate(3) + pool.allocate(1)) == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="num_pages=1"):
            pool.allocate(1)

    def test_shared_page_is_free_after_its_last_release(self):
        pool = BlockPool(2)
        pages = pool.allocate(1)
        pool.acquire(pages)
        pool.release(pages)
        assert pool.num_free == 1
        pool.release(pages)
        assert pool.num_free == 2
        with pytest.raises(ValueError, match="nothing holds it"):
            pool.release(pages)

    def test_cached_free_page_can_be_taken_back(self):
        pool = BlockPool(2)
        pages = pool.allocate(1)
        pool.register(pages[0], b"a")
        pool.release(pages)
        assert pool.lookup(b"a") == pages[0]
        pool.acquire(pages)
        assert pool.num_free == 1

    def test_evicts_uncached_first_then_least_recently_released_then_ends_of_prefixes(self):
        pool = BlockPool(5)
        first, second, uncached = pool.allocate(2), pool.allocate(2), pool.allocate(1)
        for page, block_hash in zip(first + second, (b"a0", b"a1", b"b0", b"b1"), strict=True):
            pool.register(page, block_hash)
        for pages in (second, uncached, first):
            pool.release(pages)
        assert pool.allocate(5) == [*uncached, *reversed(second), *reversed(first)]
        assert pool.num_cached == 0
        assert pool.lookup(b"a0") is None

    def test_first_page_with_a_content_stays_the_cached_one(self):
        pool = BlockPool(2)
        pages = pool.allocate(2)
        for page in pages:
            pool.register(page, b"same")
        assert pool.lookup(b"same") == pages[0]
        pool.release([pages[1]])
        assert pool.lookup(b"same") == pages[0]

    def test_reset_waits_for_holders(self):
        pool = BlockPool(2)
        pages = pool.allocate(1)
        pool.register(pages[0], b"a")
        assert not pool.reset()
        assert pool.lookup(b"a") is not None
        pool.release(pages)
        assert pool.reset()
        assert pool.lookup(b"a") is None

    def test_without_caching_nothing_is_registered(self):
        pool = BlockPool(1, enable_caching=False)
        pool.register(pool.allocate(1)[0], b"a")
        assert pool.num_cached == 0

    def test_needs_a_page(self):
        with pytest.raises(ValueError, match="num_pages=0"):
            BlockPool(0)


class TestPrefix:
    def test_equal_prefixes_have_equal_hashes(self):
        a = extend_block_hashes(make_request(prompt=[1, 2, 3, 4, 5, 6]), 2, 3)
        b = extend_block_hashes(make_request(prompt=[1, 2, 3, 4, 0, 6]), 2, 3)
        assert a[:2] == b[:2]
        assert a[2] != b[2]

    def test_a_block_depends_on_those_before_it(self):
        a = extend_block_hashes(make_request(prompt=[1, 2, 3, 4]), 2, 2)
        b = extend_block_hashes(make_request(prompt=[9, 2, 3, 4]), 2, 2)
        assert a[1] != b[1]

    @pytest.mark.parametrize("other", [{"cache_salt": "s"}, {"extra_keys": ("lora", 1)}, {"extra_keys": (("s",),)}])
    def test_salt_and_extra_keys_are_mixed_in(self, other):
        assert extend_block_hashes(make_request(), 4, 2) != extend_block_hashes(make_request(**other), 4, 2)

    def test_each_block_is_hashed_once(self):
        request = make_request(prompt=[1, 2, 3, 4])
        first = extend_block_hashes(request, 2, 2)[1]
        request.all_token_ids += [5, 6]
        hashes = extend_block_hashes(request, 2, 3)
        assert hashes is request.block_hashes
        assert hashes[1] is first
        assert hashes == extend_block_hashes(make_request(prompt=[1, 2, 3, 4, 5, 6]), 2, 3)
        assert extend_block_hashes(request, 2, 1) is hashes


class TestManager:
    def test_allocates_pages_as_tokens_come(self):
        kv, request = KVCacheManager(4, block_size=4), make_request()
        assert kv.allocate(request, 4)
        (pages,) = request.page_ids
        assert len(pages) == 1
        assert kv.allocate(request, 4)
        assert len(pages) == 1
        assert kv.allocate(request, 5)
        assert len(pages) == 2  # the live list
        assert kv.usage == 0.5
        kv.free(request)
        assert len(pages) == 2  # a batch that holds the list still sees its pages
        assert request.page_ids == []
        assert (kv.usage, kv.num_free_pages) == (0, 4)
        kv.free(request)  # nothing held, nothing done

    def test_all_or_nothing(self):
        kv, r, s = KVCacheManager(2, block_size=4), make_request("r"), make_request("s")
        assert not kv.allocate(r, 9)
        assert kv.num_free_pages == 2
        assert kv.allocate(r, 8)
        assert not kv.allocate(r, 9)
        assert len(r.page_ids[0]) == 2
        assert not kv.allocate(s, 1)
        assert s.page_ids == []

    def test_shares_a_prefix(self):
        kv = KVCacheManager(8, block_size=4)
        pages = compute(kv, make_request("a", range(10)))
        b = make_request("b", [*range(8), 77])
        assert kv.get_computed_pages(b) == (8, (pages[:2],))
        assert kv.num_free_pages == 5
        assert compute(kv, b)[:2] == pages[:2]
        assert kv.num_free_pages == 4
        assert (kv.prefix_queries, kv.prefix_hits) == (10 + 9, 8)

    @pytest.mark.parametrize(("prompt_len", "num_cached"), [(8, 4), (9, 8), (4, 0), (3, 0)])
    def test_leaves_a_token_to_compute(self, prompt_len, num_cached):
        kv = KVCacheManager(8, block_size=4)
        compute(kv, make_request("a", range(prompt_len)))
        assert kv.get_computed_pages(make_request("b", range(prompt_len))).num_tokens == num_cached

    def test_finds_nothing_for_another_salt_or_for_prompt_logprobs_or_when_off(self):
        kv = KVCacheManager(8, block_size=4)
        compute(kv, make_request("a"))
        assert kv.get_computed_pages(make_request("b")).num_tokens == 8
        assert kv.get_computed_pages(make_request("b", cache_salt="s")) == NOTHING
        assert kv.get_computed_pages(make_request("b", prompt_logprobs=0)) == NOTHING
        off = KVCacheManager(8, block_size=4, enable_prefix_caching=False)
        compute(off, make_request("a"))
        assert off.get_computed_pages(make_request("b")) == NOTHING

    def test_prefix_outlives_its_request_until_evicted(self):
        kv = KVCacheManager(4, block_size=4)
        a = make_request("a", range(8))
        pages = list(compute(kv, a))
        kv.free(a)
        assert kv.num_free_pages == 4
        assert kv.get_computed_pages(make_request("b", range(9))) == (8, (pages,))
        c = make_request("c", range(100, 112))
        compute(kv, c)  # three pages: the two that were never used, and the end of a's prefix
        assert kv.get_computed_pages(make_request("b", range(9))) == (4, (pages[:1],))

    def test_own_prefix_is_not_evicted_for_new_pages(self):
        """Cached free pages that the request takes itself do not count as free for it."""
        kv = KVCacheManager(3, block_size=4)
        a = make_request("a", range(8))
        pages = list(compute(kv, a))
        kv.free(a)
        b = make_request("b", range(16))
        found = kv.get_computed_pages(b)
        assert not kv.allocate(b, 16, 0, found)
        assert kv.num_free_pages == 3
        assert kv.allocate(b, 12, 0, found)
        assert b.page_ids[0][:2] == pages

    def test_only_full_known_pages_are_offered(self):
        kv, request = KVCacheManager(8, block_size=4), make_request("a", range(10))
        kv.allocate(request, 12)
        kv.cache_full_pages(request, 7)
        assert kv.get_computed_pages(make_request("b", range(10))).num_tokens == 4
        kv.cache_full_pages(request, 10)
        assert kv.get_computed_pages(make_request("b", range(10))).num_tokens == 8
        request.all_token_ids += [10, 11]
        kv.cache_full_pages(request, 12)
        assert kv.get_computed_pages(make_request("b", range(13))).num_tokens == 12

    def test_reset(self):
        kv, request = KVCacheManager(4, block_size=4), make_request()
        compute(kv, request)
        assert not kv.reset_prefix_cache()
        kv.free(request)
        assert kv.reset_prefix_cache()
        assert kv.get_computed_pages(make_request("b")) == NOTHING

    def test_needs_a_block_size(self):
        with pytest.raises(ValueError, match="block_size=0"):
            KVCacheManager(4, block_size=0)
