"""Several schedulers side by side, one for each data-parallel shard. Plain Python.

A shard has its own slots, pages and prefix cache, and keeps a request until it ends; all shards step together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxengine.kv_cache.groups import page_groups
from jaxengine.kv_cache.manager import KVCacheManager
from jaxengine.scheduler.batch import ScheduledBatch
from jaxengine.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from jaxengine.config import EngineConfig, SchedulerConfig
    from jaxengine.request import Request, RequestStatus

AFFINITY = 4
"""How many more requests a shard may have than another and still get a prompt all of which it has in its cache."""


class ShardedScheduler:
    """Spreads requests over shards, and plans a step of all of them.

    Attributes:
        shards: The schedulers, with equal configurations and equally many pages.
    """

    def __init__(self, shards: Sequence[Scheduler]) -> None:
        self.shards = list(shards)
        self._num_tokens_given = [0] * len(self.shards)

    @property
    def config(self) -> SchedulerConfig:
        """The configuration, which all shards share."""
        return self.shards[0].config

    @property
    def num_running(self) -> int:
        """Requests that hold a slot, of all shards."""
        return sum(shard.num_running for shard in self.shards)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, of all shards."""
        return sum(shard.num_waiting for shard in self.shards)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far, of all shards."""
        return sum(shard.num_preemptions for shard in self.shards)

    @property
    def prefix_queries(self) -> int:
        """See `KVCacheManager`."""
        return sum(shard.kv_cache.prefix_queries for shard in self.shards)

    @property
    def prefix_hits(self) -> int:
        """See `KVCacheManager`."""
        return sum(shard.kv_cache.prefix_hits for shard in self.shards)

    @property
    def cache_usage(self) -> float:
        """Share of all pages that requests hold, 0 to 1."""
        return sum(shard.kv_cache.usage for shard in self.shards) / len(self.shards)

    def has_unfinished_requests(self) -> bool:
        """Returns whether any request of any shard waits or runs."""
        return any(shard.has_unfinished_requests() for shard in self.shards)

    @property
    def unfinished_requests(self) -> list[Request]:
        """Requests that run or wait, those of a shard oldest first."""
        return [request for shard in self.shards for request in shard.unfinished_requests]

    def check_request(self, request: Request) -> None:
        """Checks that a new request can be added; see `Scheduler.check_request`."""
        for shard in self.shards:
            shard.check_request(request)

    def preempt_all(self) -> None:
        """See `Scheduler.preempt_all`."""
        for shard in self.shards:
            shard.preempt_all()

    def add_request(self, request: Request) -> None:
        """Queues a new request at the shard with the fewest, or at one that has its prefix in the cache.

        Raises:
            ValueError: See `Scheduler.add_request`.
        """
        index = self._choose(request) if len(self.shards) > 1 else 0
        self.shards[index].add_request(request)
        self._num_tokens_given[index] += request.num_prompt_tokens

    def finish_request(
        self, request_id: str, status: RequestStatus, stop_reason: int | str | None = None
    ) -> Request | None:
        """See `Scheduler.finish_request`."""
        for shard in self.shards:
            request = shard.finish_request(request_id, status, stop_reason)
            if request is not None:
                return request
        return None

    def schedule(self, max_tokens: int | None = None, num_steps: int = 1) -> list[ScheduledBatch] | None:
        """Plans the next step of every shard; see `Scheduler.schedule`.

        Args:
            max_tokens: Bounds the step of each shard.
            num_steps: How often it is run if that is possible; otherwise once.

        Returns:
            A batch for each shard, empty where there is nothing to do; None if that is so everywhere.
        """
        if num_steps > 1 and not all(shard.may_repeat(num_steps, max_tokens) for shard in self.shards):
            num_steps = 1
        batches = [shard.schedule(max_tokens, num_steps) for shard in self.shards]
        if not any(batches):
            return None
        return [batch or ScheduledBatch([], 0, 0, num_steps) for batch in batches]

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False, and no change, while requests hold pages."""
        if self.cache_usage > 0:
            return False
        return all(shard.kv_cache.reset_prefix_cache() for shard in self.shards)

    def _choose(self, request: Request) -> int:
        """Index of the shard that a request goes to; one that has its id already will refuse it."""
        for index, shard in enumerate(self.shards):
            if shard.has_request(request.request_id):
                return index
        return min(range(len(self.shards)), key=lambda index: self._cost(index, request))

    def _cost(self, index: int, request: Request) -> tuple[float, int]:
        """Sort key: the load that counts, and among equals what the shard was given so far."""
        shard = self.shards[index]
        share = shard.kv_cache.get_computed_pages(request).num_tokens / max(request.num_prompt_tokens, 1)
        return shard.num_running + shard.num_waiting - AFFINITY * share, self._num_tokens_given[index]


def make_scheduler(config: EngineConfig, num_pages: int) -> ShardedScheduler:
    """Returns the scheduler of an engine whose shards have so many pages each."""
    groups, most = page_groups(config), config.scheduler.max_num_batched_tokens
    caches = [
        KVCacheManager(num_pages, config.block_size, config.enable_prefix_caching, groups, most)
        for _ in range(config.data_parallel_size)
    ]
    return ShardedScheduler([Scheduler(config.scheduler, cache) for cache in caches])
