"""Random workloads on a simulated device: whatever happens, outputs are the model's and no page goes astray.

The simulated model's "keys and values" of a token are a hash of the token and of what the page before it holds, and the
next token is a function of them. So every output token depends on the content of every page of its request: a page that
is lent twice, shared wrongly or read too early changes the output, or is caught by the checks before. So with several
cache groups: each has its own pages, of which it may read those in its window only.
"""

import random
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxengine.config import SchedulerConfig
from jaxengine.kv_cache import BlockPool, KVCacheManager, PageGroup, manager, prefix
from jaxengine.request import Request, RequestStatus
from jaxengine.sampling_params import SamplingParams
from jaxengine.scheduler import ScheduledBatch, Scheduler

VOCAB = 13
Content = int


def root(request: Request) -> Content:
    return zlib.crc32(repr((request.cache_salt, request.extra_keys)).encode())  # unlike `hash`, the same in every run


def chain(content: Content, token_id: int) -> Content:
    return hash((content, token_id))


def next_token(content: Content) -> int:
    return content % VOCAB


def expected_output(request: Request, limit: int) -> tuple[list[int], RequestStatus]:
    """What the model answers, computed without any engine. `limit`: prompt and output tokens at most."""
    content, output = root(request), []
    for token_id in request.prompt_token_ids:
        content = chain(content, token_id)
    while True:
        output.append(next_token(content))
        content = chain(content, output[-1])
        if output[-1] in request.stop_token_ids and len(output) >= request.sampling_params.min_tokens:
            return output, RequestStatus.FINISHED_STOPPED
        if len(output) >= request.max_tokens or len(request.prompt_token_ids) + len(output) >= limit:
            return output, RequestStatus.FINISHED_LENGTH


@dataclass
class Device:
    """Runs batches in the order they come: last_token[slot] is the token sampled last.

    pages[page][offset] is content, and the number of the group that has written it.
    """

    groups: tuple[PageGroup, ...]
    pages: dict[int, dict[int, tuple[int, Content]]] = field(default_factory=dict)
    last_token: dict[int, tuple[Request, int]] = field(default_factory=dict)
    tokens: dict[Request, list[int]] = field(default_factory=dict)  # what it has sampled, for the checks

    def run(self, batch: ScheduledBatch) -> list[list[int]]:
        runs = [self.run_once(batch, index) for index in range(batch.num_steps)]
        return [[token_id for tokens in own for token_id in tokens] for own in zip(*runs, strict=True)]

    def run_once(self, batch: ScheduledBatch, index: int) -> list[list[int]]:
        # All reads come before all writes: within a step, no request may rely on what another one writes.
        contents = [self.read(seq.request, seq.page_ids, seq.start + index) for seq in batch.sequences]
        sampled: list[list[int]] = []
        for seq, content in zip(batch.sequences, contents, strict=True):
            request, start = seq.request, seq.start + index
            end = start + seq.num_new_tokens
            if seq.new_in_slot and not index:
                self.last_token[seq.slot] = request, -1
            assert self.last_token[seq.slot][0] is request, "the slot's state belongs to another request"
            if seq.token_on_device or index:
                assert seq.num_new_tokens == 1
                inputs = [self.last_token[seq.slot][1]]
            else:
                inputs = request.all_token_ids[start:end]
            assert len(inputs) == seq.num_new_tokens
            for position, token_id in enumerate(inputs, start):
                content = chain(content, token_id)
                for number, (group, page_ids) in enumerate(zip(self.groups, seq.page_ids, strict=True)):
                    page = self.pages.setdefault(page_ids[position // group.page_size], {})
                    page[position % group.page_size] = number, content
            outputs = self.tokens.setdefault(request, [])
            assert seq.samples == (end == request.num_prompt_tokens + len(outputs))
            assert seq.num_output_tokens + index == len(outputs)
            sampled.append([next_token(content)] if seq.samples else [])
            if seq.samples:
                outputs += sampled[-1]
                self.last_token[seq.slot] = request, outputs[-1]
        return sampled

    def read(self, request: Request, page_ids, num_tokens: int) -> Content:
        """Walks the pages as attention would, and checks that they hold what the next token sees of the request."""
        content = root(request)
        tokens = request.prompt_token_ids + self.tokens.get(request, [])
        for position in range(num_tokens):
            content = chain(content, tokens[position])
            for number, (group, own_ids) in enumerate(zip(self.groups, page_ids, strict=True)):
                if group.window is None or position > num_tokens - group.window:
                    page = self.pages[own_ids[position // group.page_size]]
                    found = page[position % group.page_size]
                    assert found == (number, content), f"{request.request_id}: wrong content at {position}"
        return content


@dataclass
class Simulation:
    """One random workload: everything is drawn from `rng`."""

    rng: random.Random
    run_ahead: int  # batches in flight when the next is scheduled
    with_events: bool = True  # aborts, outside stops and bounded steps
    with_caching: bool = True
    with_groups: bool = False  # else one, without a window
    num_pages: int = 0  # 0: drawn
    live: dict[str, Request] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    ended_from_outside: set[Request] = field(default_factory=set)
    in_flight: deque[tuple[ScheduledBatch, list[list[int]]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        rng = self.rng
        self.block_size = rng.choice([1, 2, 4])
        chunked = rng.random() < 0.8
        max_num_seqs = rng.randint(1, 5)
        max_model_len = rng.randint(16, 50)
        self.config = SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=rng.randint(max_num_seqs, 24) if chunked else max_model_len + max_num_seqs,
            policy=rng.choice(["fcfs", "priority"]),
            enable_chunked_prefill=chunked,
            long_prefill_token_threshold=rng.choice([0, 3]) if chunked else 0,
        )
        num_pages = self.num_pages or max(1, rng.randint(12, 70) // self.block_size)
        groups = self.draw_groups() if self.with_groups else (PageGroup(self.block_size),)
        num_pages *= len(groups)
        most = self.config.max_num_batched_tokens
        self.kv = KVCacheManager(num_pages, self.block_size, self.with_caching, groups, most)
        self.scheduler = Scheduler(self.config, self.kv)
        self.device = Device(groups)
        self.limit = min(max_model_len, self.kv.max_tokens)
        self.prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randint(0, 16))] for _ in range(2)]
        self.to_add = rng.randint(1, 12)
        self.num_steps = self.num_repeats = 0

    def draw_groups(self) -> tuple[PageGroup, ...]:
        rng = self.rng
        windows = [None, *range(2, 12), 20]
        sizes = [self.block_size * rng.choice([1, 1, 2, 3]) for _ in range(rng.randint(1, 4))]
        return tuple(PageGroup(size, rng.choice(windows)) for size in sizes)

    def add(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.prefixes) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
        params = SamplingParams(min_tokens=rng.randint(0, 3), prompt_logprobs=rng.choice([None, None, None, 0]))
        request = Request(
            f"r{self.to_add}",
            prompt,
            params,
            max_tokens=rng.randint(1, 24),
            stop_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice([0, 0, 0, 1, 2]))),
            priority=rng.randint(0, 2),
            arrival_time=float(rng.randint(0, 3)),
            cache_salt=rng.choice([None, None, "salt"]),
            extra_keys=rng.choice([(), (), (1,)]),
        )
        self.to_add -= 1
        if len(prompt) + 1 > self.limit:
            with pytest.raises(ValueError, match="prompt_token_ids"):
                self.scheduler.add_request(request)
            return
        self.scheduler.add_request(request)
        self.requests.append(request)
        self.live[request.request_id] = request

    def run(self) -> "Simulation":
        while self.to_add or self.live or self.in_flight:
            self.num_steps += 1
            assert self.num_steps < 1000, "does not end"
            if self.to_add and (not self.live or self.rng.random() < 0.7):
                self.add()
            if self.with_events:
                self.event()
            self.step()
        assert self.kv.num_free_pages == self.kv.num_pages
        assert self.kv.reset_prefix_cache()
        assert not self.scheduler.has_unfinished_requests()
        self.check_outputs()
        return self

    def event(self) -> None:
        if not self.live or self.rng.random() > 0.03:
            return
        request = self.rng.choice(list(self.live.values()))
        status = self.rng.choice([RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_STOPPED])
        assert self.scheduler.finish_request(request.request_id, status) is request
        assert self.scheduler.abort_request(request.request_id) is None
        assert request.status is status
        self.ended_from_outside.add(request)
        del self.live[request.request_id]
        self.check()

    def step(self) -> None:
        bound = self.rng.randint(1, 12) if self.with_events and self.rng.random() < 0.1 else None
        repeat = self.rng.choice([1, 2, 4])
        repeat = repeat if repeat > 1 and self.scheduler.may_repeat(repeat, bound) else 1
        self.num_repeats += repeat - 1
        batch = self.scheduler.schedule(bound, repeat)
        if batch is None:
            in_flight_or_bounded = self.in_flight or (bound and not self.config.enable_chunked_prefill)
            assert not self.live or in_flight_or_bounded, "unfinished requests, but nothing is scheduled"
        else:
            self.check_batch(batch, bound)
            self.in_flight.append((batch, self.device.run(batch)))
        self.check()
        for request in self.live.values():
            if request.slot >= 0:
                self.device.read(request, request.page_ids, request.num_computed_tokens)
        if self.in_flight and (batch is None or len(self.in_flight) > self.run_ahead):
            self.update()

    def update(self) -> None:
        batch, sampled = self.in_flight.popleft()
        for update in self.scheduler.update(batch, sampled):
            request = batch.sequences[update.index].request
            assert update.request is request
            taken = sampled[update.index][: len(update.new_token_ids)]
            assert update.new_token_ids == taken
            assert update.finished or taken == sampled[update.index]
            assert update.finished == request.status.is_finished
            assert self.live[request.request_id] is request, "an update for a finished request"
            if update.finished:
                del self.live[request.request_id]
        self.check()

    def check_batch(self, batch: ScheduledBatch, bound: int | None) -> None:
        counts = [seq.num_new_tokens for seq in batch.sequences]
        assert batch.num_tokens == sum(counts) <= min(self.config.max_num_batched_tokens, bound or 1000)
        assert batch.num_decodes == counts.count(1)
        assert set(counts[: batch.num_decodes]) <= {1}, "decodes come first"
        assert min(counts) > 0
        assert len(counts) <= self.config.max_num_seqs
        requests = [seq.request for seq in batch.sequences]
        assert len(set(requests)) == len(requests)
        assert all(seq.request.status is RequestStatus.RUNNING for seq in batch.sequences)
        for seq in batch.sequences:
            num_tokens = seq.start + seq.num_new_tokens + batch.num_steps - 1
            for group, pages in zip(self.kv.groups, seq.page_ids, strict=True):
                assert len(pages) * group.page_size >= num_tokens
            assert batch.num_steps == 1 or (seq.samples and seq.num_new_tokens == 1)
            assert seq.page_ids is seq.request.page_ids
            threshold = self.config.long_prefill_token_threshold
            assert not threshold or seq.num_new_tokens <= threshold
        if self.config.policy == "fcfs" and bound is None:
            # Nobody starves: the oldest request is in every step, unless all that is left for it is its last token.
            oldest = next(iter(self.live.values()))
            assert oldest in requests or oldest.num_tokens + oldest.num_pending_tokens >= oldest.max_total_tokens

    def check(self) -> None:
        """Every page is held by exactly those whom its count says; every cached page holds what it held when named."""
        pool, live = self.kv.pool, self.live.values()
        holders: Counter[int] = Counter()
        for request in live:
            parts = zip(request.page_ids, request.num_dropped_pages, strict=True)
            pages = [page for own, dropped in parts for page in own[dropped:]]
            assert len(set(pages)) == len(pages) == self.kv.num_held_pages(request)
            assert len(pages) <= self.kv.most_pages(request.max_total_tokens) + len(self.kv.groups)  # repeated steps'
            assert (request.status is RequestStatus.RUNNING) == (request.slot >= 0) == bool(request.page_ids)
            holders.update(pages)
        assert pool.ref_counts == [holders[page] for page in range(pool.num_pages)]
        assert set(pool._free) == {page for page in range(pool.num_pages) if not holders[page]}
        slots = [request.slot for request in live if request.slot >= 0] + self.scheduler._free_slots
        assert sorted(slots) == list(range(self.config.max_num_seqs))
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(live)
        for request in live:
            if not self.in_flight:
                assert request.num_pending_tokens == 0
        for block_hash, page in pool._page_of.items():
            assert pool._hash_of[page] == block_hash

    def check_outputs(self) -> None:
        for request in self.requests:
            output, status = expected_output(request, self.limit)
            if request in self.ended_from_outside:
                assert request.output_token_ids == output[: request.num_output_tokens]
            else:
                assert (request.output_token_ids, request.status) == (output, status)
            assert request.all_token_ids == request.prompt_token_ids + request.output_token_ids


seeds = st.integers(0, 2**32 - 1)
slow_is_fine = settings(
    deadline=None, database=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)


@pytest.mark.parametrize("run_ahead", [0, 1])
@slow_is_fine
@given(seed=seeds)
def test_random_workloads(run_ahead, seed):
    Simulation(random.Random(seed), run_ahead).run()


@pytest.mark.parametrize("run_ahead", [0, 1])
@slow_is_fine
@given(seed=seeds)
def test_random_workloads_of_several_cache_groups(run_ahead, seed):
    Simulation(random.Random(seed), run_ahead, with_groups=True).run()


@settings(slow_is_fine, max_examples=40)
@given(seed=seeds)
def test_random_workloads_two_steps_ahead(seed):
    """The engine does not go there, but nothing in the scheduler depends on it."""
    Simulation(random.Random(seed), run_ahead=2).run()


@settings(slow_is_fine, max_examples=40)
@given(seed=seeds, run_ahead=st.integers(0, 1))
def test_without_caching_and_with_ample_memory_nothing_is_preempted(seed, run_ahead):
    simulation = Simulation(random.Random(seed), run_ahead, with_caching=False, num_pages=400).run()
    assert simulation.scheduler.num_preemptions == 0
    assert simulation.kv.prefix_queries == 0


@pytest.mark.parametrize("with_groups", [False, True])
def test_workloads_reach_the_hard_cases(with_groups):
    """Else the tests above would prove little."""
    seen = Counter()
    for seed in range(60):
        simulation = Simulation(random.Random(seed), run_ahead=1, with_groups=with_groups).run()
        seen["preemptions"] += simulation.scheduler.num_preemptions
        seen["hits"] += simulation.kv.prefix_hits
        seen["repeats"] += simulation.num_repeats
        for request in simulation.requests:
            seen[request.status] += 1
            seen["full"] += request.num_tokens == simulation.kv.max_tokens
    assert seen["preemptions"] > 40
    assert seen["hits"] > 100
    assert seen["repeats"] > 100
    assert seen["full"] > 3
    assert all(seen[status] > 5 for status in RequestStatus if status.is_finished and status.finish_reason != "error")


def _lend_without_counting(pool: BlockPool, pages) -> None:
    for page in pages:
        pool._free.pop(page, None)
        pool.ref_counts[page] = 1


def _cache_at_once(old):
    def allocate(kv, request, num_tokens, *args):
        done = old(kv, request, num_tokens, *args)
        if done:
            kv.cache_full_pages(request, min(num_tokens, request.num_tokens))
        return done

    return allocate


def _forget_pending_token(old):
    def preempt(scheduler, step, request):
        old(scheduler, step, request)
        request.num_pending_tokens = 0

    return preempt


def _hash_blocks_alone(old):
    def extend(request, block_size, num_blocks):
        starts = range(0, num_blocks * block_size, block_size)
        return [repr(request.all_token_ids[start : start + block_size]).encode() for start in starts]

    return extend


def _give_slot_back_twice(old):
    def stop_running(scheduler, request):
        scheduler._free_slots.append(request.slot)
        old(scheduler, request)

    return stop_running


MUTATIONS = {
    "a page leaks": (BlockPool, "release", lambda old: lambda pool, pages: old(pool, pages[1:])),
    "shared pages are not counted": (BlockPool, "acquire", lambda old: _lend_without_counting),
    "an evicted page is still found": (BlockPool, "_forget", lambda old: lambda pool, page: None),
    "pages are cached before they are written": (KVCacheManager, "allocate", _cache_at_once),
    "chunks to come are cached": (
        KVCacheManager,
        "cache_full_pages",
        lambda old: lambda kv, request, n: old(kv, request, request.num_tokens),
    ),
    "salts are ignored": (prefix, "root_hash", lambda old: lambda salt, extra: b""),
    "block hashes are not chained": (manager, "extend_block_hashes", _hash_blocks_alone),
    "preemption forgets the pending token": (Scheduler, "_preempt", _forget_pending_token),
    "a slot is lent twice": (Scheduler, "_stop_running", _give_slot_back_twice),
    "pages that are seen are given back": (PageGroup, "first_page", lambda old: lambda group, n: old(group, n + 1)),
    "groups share names": (manager, "_name", lambda old: lambda index, block_hash: block_hash),
    "what a window sees is not looked for": (
        KVCacheManager,
        "_cached_tokens",
        lambda old: lambda kv, index, hashes, n: n if kv.groups[index].window else old(kv, index, hashes, n),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch):
    """The checks above find every one of these mistakes."""
    owner, attribute, mutate = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, mutate(getattr(owner, attribute)))

    def fails(seed: int) -> bool:
        try:
            Simulation(random.Random(seed), run_ahead=1, with_groups=seed % 2 == 1).run()
        except (AssertionError, ValueError, KeyError, IndexError):
            return True
        return False

    assert any(fails(seed) for seed in range(100))
