"""The scheduler, case by case. test_scheduler_properties.py has the random workloads."""

import time
from typing import Any

import pytest

from jaxengine.config import SchedulerConfig
from jaxengine.kv_cache import KVCacheManager
from jaxengine.request import Request, RequestStatus
from jaxengine.sampling_params import SamplingParams
from jaxengine.scheduler import ScheduledBatch, Scheduler


def make_scheduler(num_pages=64, block_size=4, caching=True, **config) -> Scheduler:
    fields: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16} | config
    return Scheduler(SchedulerConfig(**fields), KVCacheManager(num_pages, block_size, caching))


def make_request(request_id="a", prompt_len=6, max_tokens=8, params=None, **kwargs) -> Request:
    start = 1000 * ord(request_id[0])  # no prefix in common
    prompt = list(range(start, start + prompt_len))
    return Request(request_id, prompt, params or SamplingParams(), max_tokens, **kwargs)


def add(scheduler: Scheduler, *args, **kwargs) -> Request:
    request = make_request(*args, **kwargs)
    scheduler.add_request(request)
    return request


def schedule(scheduler: Scheduler, max_tokens: int | None = None) -> ScheduledBatch:
    batch = scheduler.schedule(max_tokens)
    assert batch is not None
    return batch


def rows(batch: ScheduledBatch) -> dict[str, tuple[int, int]]:
    return {seq.request.request_id: (seq.start, seq.num_new_tokens) for seq in batch.sequences}


def update(scheduler: Scheduler, batch: ScheduledBatch, token_id=7):
    return scheduler.update(batch, [[token_id] if seq.samples else [] for seq in batch.sequences])


def step(scheduler: Scheduler, token_id=7) -> ScheduledBatch:
    batch = schedule(scheduler)
    update(scheduler, batch, token_id)
    return batch


class TestStep:
    def test_prefill_then_decode(self):
        scheduler = make_scheduler()
        request = add(scheduler)
        (seq,) = step(scheduler).sequences
        assert (seq.start, seq.num_new_tokens, seq.samples, seq.new_in_slot) == (0, 6, True, True)
        assert (seq.token_on_device, seq.num_output_tokens, len(seq.page_ids[0])) == (False, 0, 2)
        batch = step(scheduler)
        (seq,) = batch.sequences
        assert (seq.start, seq.num_new_tokens, seq.samples, seq.new_in_slot) == (6, 1, True, False)
        assert (seq.token_on_device, seq.num_output_tokens) == (False, 1)
        assert (batch.num_tokens, batch.num_decodes) == (1, 1)
        assert request.output_token_ids == [7, 7]

    def test_nothing_to_do(self):
        scheduler = make_scheduler()
        assert scheduler.schedule() is None
        add(scheduler)
        assert scheduler.schedule(0) is None
        assert scheduler.schedule(1) is not None

    def test_long_prompt_is_chunked(self):
        scheduler = make_scheduler()
        add(scheduler, prompt_len=20)
        first, second = step(scheduler), step(scheduler)
        assert [(s.start, s.num_new_tokens, s.samples) for s in first.sequences] == [(0, 16, False)]
        assert [(s.start, s.num_new_tokens, s.samples) for s in second.sequences] == [(16, 4, True)]

    def test_decodes_come_first_and_share_the_budget_with_prompts(self):
        scheduler = make_scheduler()
        add(scheduler, "a", 20)
        step(scheduler)
        add(scheduler, "b", 1)
        add(scheduler, "c", 30)
        batch = step(scheduler)
        assert rows(batch) == {"b": (0, 1), "a": (16, 4), "c": (0, 11)}
        assert (batch.num_tokens, batch.num_decodes) == (16, 1)
        assert list(rows(step(scheduler))) == ["a", "b", "c"]

    def test_running_goes_before_waiting(self):
        scheduler = make_scheduler()
        add(scheduler, "a", 40)
        step(scheduler)
        add(scheduler, "b", 4)
        assert rows(step(scheduler)) == {"a": (16, 16)}
        assert rows(step(scheduler)) == {"a": (32, 8), "b": (0, 4)}

    def test_max_tokens_bounds_a_step(self):
        scheduler = make_scheduler()
        add(scheduler, "a", 10)
        assert schedule(scheduler, 3).num_tokens == 3
        assert schedule(scheduler, 100).num_tokens == 7

    def test_long_prefill_token_threshold(self):
        scheduler = make_scheduler(long_prefill_token_threshold=5)
        add(scheduler, "a", 12)
        add(scheduler, "b", 12)
        assert rows(step(scheduler)) == {"a": (0, 5), "b": (0, 5)}

    def test_without_chunking_a_prompt_waits_for_room(self):
        scheduler = make_scheduler(enable_chunked_prefill=False, max_num_batched_tokens=64)
        add(scheduler, "a", 40)
        add(scheduler, "b", 40)
        add(scheduler, "c", 2)
        assert rows(step(scheduler)) == {"a": (0, 40)}  # c does not overtake b
        assert rows(step(scheduler)) == {"a": (40, 1), "b": (0, 40), "c": (0, 2)}

    def test_max_num_seqs(self):
        scheduler = make_scheduler(max_num_seqs=2)
        a, _, _ = (add(scheduler, name, 2, max_tokens=3) for name in "abc")
        batch = step(scheduler)
        assert sorted(seq.slot for seq in batch.sequences) == [0, 1]
        assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
        slot = a.slot
        scheduler.abort_request("a")
        assert a.slot == -1
        last = step(scheduler).sequences[-1]
        assert (last.request.request_id, last.slot, last.new_in_slot) == ("c", slot, True)


class TestStops:
    def test_max_tokens(self):
        scheduler = make_scheduler()
        request = add(scheduler, max_tokens=2)
        step(scheduler)
        (done,) = update(scheduler, schedule(scheduler))
        assert done.finished
        assert (done.request, done.new_token_ids, done.index) == (request, [7], 0)
        assert request.status.finish_reason == "length"
        assert not scheduler.has_unfinished_requests()
        assert scheduler.kv_cache.num_free_pages == 64

    def test_max_model_len(self):
        scheduler = make_scheduler(max_model_len=8)
        request = add(scheduler, prompt_len=6, max_tokens=100)
        step(scheduler)
        step(scheduler)
        assert request.status is RequestStatus.FINISHED_LENGTH
        assert request.num_tokens == 8

    @pytest.mark.parametrize(("named", "stop_reason"), [([7], 7), ([], None)])
    def test_stop_token(self, named, stop_reason):
        """A stop token of the user's is the stop reason; EOS is none."""
        scheduler = make_scheduler()
        params = SamplingParams(stop_token_ids=named)
        request = add(scheduler, params=params, stop_token_ids=frozenset([7]))
        step(scheduler)
        assert (request.status.finish_reason, request.stop_reason) == ("stop", stop_reason)
        assert request.output_token_ids == [7]

    def test_min_tokens(self):
        scheduler = make_scheduler()
        request = add(scheduler, params=SamplingParams(min_tokens=3), stop_token_ids=frozenset([7]))
        while not request.status.is_finished:
            step(scheduler)
        assert request.output_token_ids == [7, 7, 7]

    def test_tokens_after_a_stop_are_dropped(self):
        scheduler = make_scheduler()
        request = add(scheduler, stop_token_ids=frozenset([9]))
        (done,) = scheduler.update(schedule(scheduler), [[8, 9, 10]])
        assert done.new_token_ids == [8, 9]
        assert request.output_token_ids == [8, 9]

    def test_update_must_match_the_batch(self):
        scheduler = make_scheduler()
        add(scheduler)
        batch = schedule(scheduler)
        with pytest.raises(ValueError, match="rows"):
            scheduler.update(batch, [])
        with pytest.raises(ValueError, match="samples=True"):
            scheduler.update(batch, [[]])


class TestAsync:
    def test_pending_token_stays_on_the_device(self):
        scheduler = make_scheduler()
        request = add(scheduler)
        first, second = schedule(scheduler), schedule(scheduler)
        (seq,) = second.sequences
        assert (seq.start, seq.num_new_tokens, seq.token_on_device, seq.num_output_tokens) == (6, 1, True, 1)
        update(scheduler, first, 8)
        assert (request.output_token_ids, request.num_pending_tokens) == ([8], 1)
        update(scheduler, second, 9)
        assert (request.output_token_ids, request.num_pending_tokens) == ([8, 9], 0)

    def test_nothing_is_scheduled_past_the_length_limit(self):
        scheduler = make_scheduler()
        request = add(scheduler, max_tokens=2)
        first, second = schedule(scheduler), schedule(scheduler)
        assert scheduler.schedule() is None
        update(scheduler, first)
        assert scheduler.schedule() is None
        update(scheduler, second)
        assert request.status is RequestStatus.FINISHED_LENGTH

    def test_token_computed_past_a_stop_is_dropped(self):
        scheduler = make_scheduler()
        request = add(scheduler, stop_token_ids=frozenset([9]))
        first, second = schedule(scheduler), schedule(scheduler)
        update(scheduler, first, 9)
        other = add(scheduler, "b")  # may have the slot and the pages at once
        third = schedule(scheduler)
        assert third.sequences[0].slot == second.sequences[0].slot
        assert update(scheduler, second) == []
        assert request.output_token_ids == [9]
        update(scheduler, third)
        assert other.output_token_ids == [7]

    def test_id_of_a_finished_request_may_be_used_again_while_its_batch_is_in_flight(self):
        scheduler = make_scheduler()
        old = add(scheduler)
        batch = schedule(scheduler)
        assert scheduler.abort_request("a") is old
        new = add(scheduler)
        assert update(scheduler, batch) == []
        assert new.output_token_ids == []

    def test_preempted_with_a_pending_token(self):
        scheduler = make_scheduler(num_pages=4, caching=False)
        a, b = add(scheduler, "a", 8), add(scheduler, "b", 7)
        first = schedule(scheduler)
        second = schedule(scheduler)  # a's 9th token wants a fifth page
        assert rows(second) == {"a": (8, 1)}
        assert (b.status, b.num_pending_tokens, b.num_computed_tokens) == (RequestStatus.PREEMPTED, 1, 0)
        update(scheduler, first, 8)
        assert (b.output_token_ids, b.num_pending_tokens) == ([8], 0)
        scheduler.abort_request("a")
        (seq,) = schedule(scheduler).sequences
        assert (seq.request, seq.start, seq.num_new_tokens, seq.num_output_tokens) == (b, 0, 8, 1)
        assert seq.new_in_slot
        assert not seq.token_on_device
        assert a.status is RequestStatus.FINISHED_ABORTED

    def test_preempted_request_may_finish_with_its_pending_token(self):
        scheduler = make_scheduler(num_pages=4)
        add(scheduler, "a", 8)
        b = add(scheduler, "b", 7, stop_token_ids=frozenset([9]))
        first, _ = schedule(scheduler), schedule(scheduler)
        assert b.status is RequestStatus.PREEMPTED
        update(scheduler, first, 9)
        assert b.status is RequestStatus.FINISHED_STOPPED
        assert scheduler.num_waiting == 0


class TestPreemption:
    def test_latest_goes_first_and_resumes_with_all_its_tokens(self):
        scheduler = make_scheduler(num_pages=4, caching=False)
        a, b = add(scheduler, "a", 7, max_tokens=5), add(scheduler, "b", 7, max_tokens=5)
        step(scheduler)
        step(scheduler)
        assert rows(step(scheduler)) == {"a": (8, 1)}
        assert (b.status, b.slot, b.num_preemptions) == (RequestStatus.PREEMPTED, -1, 1)
        while not a.status.is_finished:
            step(scheduler)
        (seq,) = step(scheduler).sequences
        assert (seq.start, seq.num_new_tokens, seq.num_output_tokens, seq.new_in_slot) == (0, 9, 2, True)
        while not b.status.is_finished:
            step(scheduler)
        assert len(b.output_token_ids) == 5
        assert scheduler.num_preemptions == 1

    def test_last_request_preempts_itself(self):
        scheduler = make_scheduler(num_pages=3)
        add(scheduler, "a", 6, max_tokens=3)
        b = add(scheduler, "b", 4, max_tokens=3)
        step(scheduler)
        assert rows(step(scheduler)) == {"a": (6, 1)}
        assert b.status is RequestStatus.PREEMPTED
        while scheduler.has_unfinished_requests():
            step(scheduler)
        assert (b.num_preemptions, b.num_output_tokens) == (1, 3)

    def test_priority_decides_who_goes(self):
        scheduler = make_scheduler(num_pages=4, policy="priority")
        low = add(scheduler, "a", 8, priority=5)
        high = add(scheduler, "b", 8, priority=1)
        step(scheduler)
        assert rows(step(scheduler)) == {"b": (8, 1)}
        assert (low.status, high.status) == (RequestStatus.PREEMPTED, RequestStatus.RUNNING)

    def test_priority_order_of_waiting_requests(self):
        scheduler = make_scheduler(policy="priority", max_num_seqs=1)
        for name, priority, arrival in (("a", 1, 0.0), ("b", 0, 2.0), ("c", 0, 1.0)):
            add(scheduler, name, 4, max_tokens=1, priority=priority, arrival_time=arrival)
        assert [next(iter(rows(step(scheduler)))) for _ in range(3)] == ["c", "b", "a"]

    def test_waiting_preempts_lower_priority_when_pages_are_short_only(self):
        scheduler = make_scheduler(num_pages=6, policy="priority", caching=False)
        low = add(scheduler, "a", 8, priority=5)
        step(scheduler)  # two pages
        add(scheduler, "b", 8, priority=1)
        assert rows(step(scheduler)) == {"a": (8, 1), "b": (0, 8)}
        add(scheduler, "c", 8, priority=1, arrival_time=1.0)
        batch = step(scheduler)  # b decodes on a third page, one is missing for c
        assert rows(batch) == {"b": (8, 1), "c": (0, 8)}
        assert batch.num_tokens == 9  # what a would have decoded is taken back
        assert low.status is RequestStatus.PREEMPTED

    @pytest.mark.parametrize(("policy", "priority"), [("fcfs", 0), ("priority", 5), ("priority", 6)])
    def test_waiting_does_not_preempt_otherwise(self, policy, priority):
        scheduler = make_scheduler(num_pages=4, policy=policy)
        add(scheduler, "a", 12, priority=5)
        step(scheduler)
        add(scheduler, "b", 8, priority=priority)
        assert rows(step(scheduler)) == {"a": (12, 1)}

    def test_nobody_is_preempted_in_vain(self):
        scheduler = make_scheduler(num_pages=4, policy="priority")
        add(scheduler, "a", 7, priority=1)
        low = add(scheduler, "b", 4, priority=5)
        step(scheduler)
        add(scheduler, "c", 12, priority=2)  # would need a's pages as well
        assert rows(step(scheduler)) == {"a": (7, 1), "b": (4, 1)}
        assert low.num_preemptions == 0

    def test_fills_the_whole_cache_alone(self):
        scheduler = make_scheduler(num_pages=2)
        request = add(scheduler, prompt_len=5, max_tokens=100)
        while scheduler.has_unfinished_requests():
            step(scheduler)
        assert request.status is RequestStatus.FINISHED_LENGTH
        assert request.num_tokens == 8
        assert request.num_preemptions == 0


class TestPrefixCache:
    def test_later_request_starts_after_the_common_prefix(self):
        scheduler = make_scheduler()
        add(scheduler, "a", 10)
        step(scheduler)
        b = add(scheduler, "a2", 10)
        batch = step(scheduler)
        assert rows(batch)["a2"] == (8, 2)
        assert b.num_cached_tokens == 8

    def test_not_within_the_step_that_computes_it(self):
        scheduler = make_scheduler(max_num_batched_tokens=32)
        add(scheduler, "a", 10)
        add(scheduler, "a2", 10)
        assert rows(step(scheduler)) == {"a": (0, 10), "a2": (0, 10)}

    def test_only_what_a_scheduled_step_computes(self):
        scheduler = make_scheduler(max_num_batched_tokens=10)
        add(scheduler, "a", 20)
        schedule(scheduler)  # ten of its tokens: two full pages
        scheduler.abort_request("a")
        add(scheduler, "a2", 20)
        assert rows(schedule(scheduler)) == {"a2": (8, 10)}

    def test_outputs_are_cached_too(self):
        scheduler = make_scheduler()
        a = add(scheduler, "a", 4, max_tokens=6)
        while scheduler.has_unfinished_requests():
            step(scheduler)
        follow_up = Request("b", [*a.all_token_ids, 1], SamplingParams(), max_tokens=4)
        scheduler.add_request(follow_up)
        assert rows(step(scheduler)) == {"b": (8, 3)}

    def test_prompt_logprobs_want_every_token(self):
        scheduler = make_scheduler()
        add(scheduler, "a", 10)
        step(scheduler)
        add(scheduler, "a2", 10, params=SamplingParams(prompt_logprobs=1))
        assert rows(step(scheduler))["a2"] == (0, 10)


class TestAddAndFinish:
    @pytest.mark.parametrize(
        ("request_kwargs", "message"),
        [
            ({"prompt_len": 0}, "prompt tokens"),
            ({"max_tokens": 0}, "max_tokens=0"),
            ({"prompt_len": 16}, "KV cache of 4 pages of 4 tokens leaves room for 15"),
            ({"prompt_len": 64}, "max_model_len=64 leaves room for 63"),
        ],
    )
    def test_what_cannot_run_is_refused(self, request_kwargs, message):
        scheduler = make_scheduler(num_pages=4)
        with pytest.raises(ValueError, match=message):
            add(scheduler, **request_kwargs)
        assert not scheduler.has_unfinished_requests()

    def test_id_in_use(self):
        scheduler = make_scheduler()
        request = add(scheduler)
        with pytest.raises(ValueError, match="'a'"):
            add(scheduler)
        scheduler.abort_request("a")
        with pytest.raises(ValueError, match="finished_aborted"):
            scheduler.add_request(request)

    def test_abort_in_every_state(self):
        scheduler = make_scheduler(num_pages=4, max_num_seqs=2)
        waiting, running, preempted = make_request("c", 4), make_request("a", 8), make_request("b", 8)
        for request in (running, preempted, waiting):
            scheduler.add_request(request)
        in_flight = [schedule(scheduler), schedule(scheduler)]
        expected = [RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.PREEMPTED]
        for request, status in zip((waiting, running, preempted), expected, strict=True):
            assert request.status is status
            assert scheduler.abort_request(request.request_id) is request
            assert request.status.finish_reason == "abort"
            assert scheduler.abort_request(request.request_id) is None
        for batch in in_flight:
            assert update(scheduler, batch) == []
        assert scheduler.kv_cache.num_free_pages == 4
        assert scheduler.num_running == scheduler.num_waiting == 0
        assert scheduler.abort_request("unknown") is None

    def test_finish_from_outside(self):
        scheduler = make_scheduler()
        request = add(scheduler)
        step(scheduler)
        with pytest.raises(ValueError, match="running"):
            scheduler.finish_request("a", RequestStatus.RUNNING)
        assert scheduler.finish_request("a", RequestStatus.FINISHED_STOPPED, "###") is request
        assert (request.status.finish_reason, request.stop_reason) == ("stop", "###")
        assert scheduler.finish_request("a", RequestStatus.FINISHED_LENGTH) is None
        assert request.status.finish_reason == "stop"


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"max_num_seqs": 0}, "max_num_seqs=0"),
            ({"max_model_len": 1}, "max_model_len=1"),
            ({"policy": "lifo"}, "'lifo'.*fcfs"),
            ({"max_num_batched_tokens": 3}, "max_num_batched_tokens=3"),
            ({"enable_chunked_prefill": False}, "max_num_batched_tokens=16.*max_model_len=64"),
            ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold=-1"),
            (
                {"enable_chunked_prefill": False, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 8},
                "long_prefill_token_threshold=8",
            ),
        ],
    )
    def test_errors_name_the_field(self, fields, message):
        with pytest.raises(ValueError, match=message):
            make_scheduler(**fields)


def test_a_step_of_256_decodes_costs_the_host_little():
    """About 1 ms for schedule() and update(); the bound is lax, for slow and busy machines."""
    scheduler = make_scheduler(8192, 16, max_model_len=4096, max_num_seqs=256, max_num_batched_tokens=60_000)
    for i in range(256):
        add(scheduler, f"{chr(65 + i % 26)}{i}", 200, max_tokens=300)
    in_flight, times = schedule(scheduler), []
    for _ in range(40):
        start = time.perf_counter()
        batch = schedule(scheduler)
        sampled = [[7]] * len(in_flight.sequences)
        scheduler.update(in_flight, sampled)
        times.append(time.perf_counter() - start)
        in_flight = batch
    assert min(times) < 5e-3
