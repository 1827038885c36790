"""Requests spread over shards: where they go, and that none is lost and no page leaks."""

import random
from typing import Any

import pytest

from jaxengine.config import SchedulerConfig
from jaxengine.kv_cache import KVCacheManager
from jaxengine.request import Request, RequestStatus
from jaxengine.sampling_params import SamplingParams
from jaxengine.scheduler import Scheduler, ShardedScheduler
from jaxengine.scheduler.shards import AFFINITY

BLOCK = 4


def make(num_shards: int, num_pages: int = 16, **config) -> ShardedScheduler:
    fields: dict[str, Any] = {"max_model_len": 32, "max_num_seqs": 4, "max_num_batched_tokens": 16} | config
    limits = SchedulerConfig(**fields)
    return ShardedScheduler([Scheduler(limits, KVCacheManager(num_pages, BLOCK)) for _ in range(num_shards)])


def request(name: str, prompt: list[int], max_tokens: int = 4, **kwargs) -> Request:
    return Request(name, prompt, SamplingParams(), max_tokens, **kwargs)


def run(scheduler: ShardedScheduler) -> None:
    while scheduler.has_unfinished_requests():
        step(scheduler)


def step(scheduler: ShardedScheduler) -> None:
    batches = scheduler.schedule()
    assert batches is not None
    assert len(batches) == len(scheduler.shards)
    for shard, batch in zip(scheduler.shards, batches, strict=True):
        shard.update(batch, [[7] if seq.samples else [] for seq in batch.sequences])


def shard_of(scheduler: ShardedScheduler, name: str) -> int:
    (index,) = [i for i, shard in enumerate(scheduler.shards) if shard.has_request(name)]
    return index


def test_requests_go_to_the_shard_with_the_fewest():
    scheduler = make(3)
    for i in range(7):
        scheduler.add_request(request(str(i), [i] * (5 + i)))
    assert [shard.num_waiting for shard in scheduler.shards] == [3, 2, 2]
    scheduler.finish_request("1", RequestStatus.FINISHED_ABORTED)
    scheduler.finish_request("4", RequestStatus.FINISHED_ABORTED)
    scheduler.add_request(request("new", [1, 2, 3]))
    assert shard_of(scheduler, "new") == 1
    run(scheduler)
    assert scheduler.cache_usage == 0


def test_of_equals_the_one_that_was_given_least():
    scheduler = make(2)
    for name, length in (("long", 20), ("short", 2), ("next", 2)):
        scheduler.add_request(request(name, list(range(length))))
    assert shard_of(scheduler, "next") == shard_of(scheduler, "short") != shard_of(scheduler, "long")


def test_a_prompt_follows_its_prefix_until_that_shard_has_too_many():
    scheduler, prefix = make(2), list(range(100, 116))
    scheduler.add_request(request("first", [*prefix, 1]))
    home = shard_of(scheduler, "first")
    run(scheduler)
    for i in range(AFFINITY + 2):
        scheduler.add_request(request(str(i), [*prefix, 2 + i]))
    places = [shard_of(scheduler, str(i)) for i in range(AFFINITY + 2)]
    assert places[: AFFINITY - 1] == [home] * (AFFINITY - 1)
    assert set(places) == {0, 1}
    run(scheduler)
    assert scheduler.prefix_hits >= (AFFINITY - 1) * len(prefix)


def test_an_id_is_in_use_on_all_shards():
    scheduler = make(2)
    for name in ("a", "b"):
        scheduler.add_request(request(name, [1, 2, 3]))
        with pytest.raises(ValueError, match="already in use"):
            scheduler.add_request(request(name, [9]))
    assert scheduler.num_waiting == 2
    assert scheduler.finish_request("unknown", RequestStatus.FINISHED_ABORTED) is None


def test_the_prefix_cache_is_reset_everywhere_or_nowhere():
    scheduler = make(2)
    for name in ("a", "b"):
        scheduler.add_request(request(name, [ord(name)] * 9))
    run(scheduler)
    scheduler.add_request(request("c", [1] * 9))
    step(scheduler)
    assert not scheduler.reset_prefix_cache()
    assert all(shard.kv_cache.pool.num_cached for shard in scheduler.shards)
    run(scheduler)
    assert scheduler.reset_prefix_cache()
    assert not any(shard.kv_cache.pool.num_cached for shard in scheduler.shards)


def test_shards_without_work_get_an_empty_batch():
    scheduler = make(3)
    scheduler.add_request(request("only", [1, 2, 3]))
    batches = scheduler.schedule()
    assert batches is not None
    assert sorted(batch.num_tokens for batch in batches) == [0, 0, 3]
    assert scheduler.schedule() is not None  # one step ahead: its decode
    assert make(2).schedule() is None


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("seed", range(5))
def test_random_workloads_lose_nothing(seed, policy):
    draw = random.Random(seed)
    scheduler = make(draw.choice([2, 3, 4]), num_pages=10, policy=policy)
    requests, kept = [], set()
    for i in range(60):
        prefix = [draw.randrange(3)] * draw.randrange(13)
        requests.append(
            request(str(i), [*prefix, 50 + i], draw.randrange(1, 20), priority=draw.randrange(3), arrival_time=i)
        )
    to_add = list(requests)
    while to_add or scheduler.has_unfinished_requests():
        for _ in range(draw.randrange(4)):
            if to_add:
                scheduler.add_request(to_add.pop())
        if draw.random() < 0.1:
            scheduler.finish_request(str(draw.randrange(60)), RequestStatus.FINISHED_ABORTED)
        if scheduler.has_unfinished_requests():
            step(scheduler)
    for one in requests:
        assert one.status.is_finished
        kept.add(one.status)
        if one.status is RequestStatus.FINISHED_LENGTH:
            assert len(one.output_token_ids) == min(one.max_tokens, 32 - one.num_prompt_tokens)
    assert RequestStatus.FINISHED_LENGTH in kept
    assert scheduler.num_preemptions > 0
    assert scheduler.cache_usage == 0
    for shard in scheduler.shards:
        assert not any(shard.kv_cache.pool.ref_counts)
        assert (shard.num_running, shard.num_waiting) == (0, 0)
