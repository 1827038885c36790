"""Decides, step by step, which tokens of which requests are computed. Plain Python.

The host runs ahead of the device: `schedule()` may be called again before the `update()` of the batch before. That is
sound because the device runs the steps in the order they were scheduled, so that

- `num_computed_tokens` advances when a step is scheduled: a later step may build on it;
- a request that decodes need not know its newest token: it is *pending*, and the next step finds it on the device;
- pages and slots of a finished or preempted request can be lent again at once: a step still in flight has used them
  before the next one runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxengine.request import Request, RequestStatus
from jaxengine.scheduler.batch import ScheduledBatch, ScheduledSequence, TokenUpdate
from jaxengine.scheduler.policy import RequestQueue, sort_key

if TYPE_CHECKING:
    from jaxengine.config import SchedulerConfig
    from jaxengine.kv_cache.manager import CachedPrefix, KVCacheManager


@dataclass(slots=True)
class _Step:
    """A step while it is being planned. Requests change only when it is committed, so a plan can be taken back."""

    budget: int  # tokens left
    num_steps: int = 1
    plan: dict[Request, int] = field(default_factory=dict)  # new tokens of each request
    admitted: set[Request] = field(default_factory=set)
    has_preempted: bool = False

    def add(self, request: Request, num_new_tokens: int) -> None:
        self.plan[request] = num_new_tokens
        self.budget -= num_new_tokens


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recomputation, and one step of run-ahead.

    Every unfinished request is in one of two queues, both in the policy's order. Running requests hold a slot, and
    pages: for all their known tokens from the start, and one more whenever decoding needs it; in layers with a window
    for what a step sees. When pages run out, the last running request gives its own back and waits; the first one can
    always go on, so every request finishes.
    """

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.num_preemptions = 0
        self._requests: dict[str, Request] = {}
        self._waiting = RequestQueue()
        self._running = RequestQueue()
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._num_added = 0

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first step, or, preempted, to start again."""
        return len(self._waiting)

    def has_unfinished_requests(self) -> bool:
        """Returns whether any request waits or runs."""
        return bool(self._requests)

    def has_request(self, request_id: str) -> bool:
        """Returns whether the id is that of an unfinished request."""
        return request_id in self._requests

    @property
    def unfinished_requests(self) -> list[Request]:
        """Requests that run or wait, oldest first."""
        return list(self._requests.values())

    def check_request(self, request: Request) -> None:
        """Checks that a new request can be added.

        Raises:
            ValueError: The id is in use, or there is no room for the prompt and one output token.
        """
        name, prompt_len = f"request {request.request_id!r}", request.num_prompt_tokens
        capacity = self.kv_cache.max_tokens
        if self.has_request(request.request_id):
            raise ValueError(f"request_id={request.request_id!r}: already in use by an unfinished request")
        if request.status is not RequestStatus.WAITING:
            raise ValueError(f"{name}: status={request.status.label}, but only a new request can be added")
        if prompt_len < 1 or request.max_tokens < 1:
            raise ValueError(
                f"{name}: {prompt_len} prompt tokens and max_tokens={request.max_tokens}: both must be at least 1"
            )
        for limit, what in (
            (self.config.max_model_len, f"max_model_len={self.config.max_model_len}"),
            (capacity, f"the KV cache of {self.kv_cache.num_pages} pages of {self.kv_cache.block_size} tokens"),
        ):
            if prompt_len + 1 > limit:
                raise ValueError(
                    f"{name}: prompt_token_ids has {prompt_len} tokens: {what} leaves room for {limit - 1} at most, "
                    "and one output token"
                )

    def add_request(self, request: Request) -> None:
        """Queues a new request.

        A request whose prompt and `max_tokens` would not fit in the whole cache is accepted: it ends with
        FINISHED_LENGTH when it fills the cache alone.

        Raises:
            ValueError: See `check_request`.
        """
        self.check_request(request)
        limits = self.config.max_model_len, self.kv_cache.max_tokens
        request.max_total_tokens = min(request.num_prompt_tokens + request.max_tokens, *limits)
        request.sort_key = sort_key(self.config.policy, request, self._num_added)
        self._num_added += 1
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def abort_request(self, request_id: str) -> Request | None:
        """Ends a request in whatever state it is. Returns it, or None if it is unknown or finished already."""
        return self.finish_request(request_id, RequestStatus.FINISHED_ABORTED)

    def finish_request(
        self, request_id: str, status: RequestStatus, stop_reason: int | str | None = None
    ) -> Request | None:
        """Ends a request from outside (aborted, or a stop string was found). Tokens still to come for it are dropped.

        Returns:
            The request, or None, and no change, if it is unknown or finished already.
        """
        if not status.is_finished:
            raise ValueError(f"status={status.label}: must be a finished status")
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        if request.status is RequestStatus.RUNNING:
            self._stop_running(request)
        else:
            self._waiting.discard(request)
        request.status = status
        request.stop_reason = stop_reason
        request.num_pending_tokens = 0
        return request

    def may_repeat(self, num_steps: int, max_tokens: int | None = None) -> bool:
        """Returns whether the next step can be planned to run so many times.

        It can if all requests decode, none waits, there are pages, and nothing has to look at a token before the next
        is sampled.

        Args:
            num_steps: At most `block_size`.
            max_tokens: As for `schedule`.
        """
        num_running = len(self._running)
        num_pages = num_running * len(self.kv_cache.groups)
        if self._waiting or num_running > self._budget(max_tokens) or num_pages > self.kv_cache.num_free_pages:
            return False
        return num_steps <= self.kv_cache.block_size and all(
            len(r.all_token_ids) + r.num_pending_tokens - r.num_computed_tokens <= 1
            and r.grammar is None
            and r.sampling_params.logprobs is None
            for r in self._running
        )

    def _budget(self, max_tokens: int | None) -> int:
        budget = self.config.max_num_batched_tokens
        return budget if max_tokens is None else min(budget, max_tokens)

    def schedule(self, max_tokens: int | None = None, num_steps: int = 1) -> ScheduledBatch | None:
        """Plans the next step: running requests first (decodes, then unfinished prompts), then waiting ones.

        May be called before `update()` of the batch before.

        Args:
            max_tokens: Bounds this step below `max_num_batched_tokens`.
            num_steps: How often it is run; more than once only if `may_repeat` says so.

        Returns:
            The step; None if there is nothing to do before a batch in flight is updated, a request is added or, without
            chunked prefill, `max_tokens` is raised.
        """
        step = _Step(self._budget(max_tokens), num_steps)
        self._plan_running(step)
        if not step.has_preempted:  # else pages are short
            self._plan_waiting(step)
        return self._commit(step) if step.plan else None

    def _plan_running(self, step: _Step) -> None:
        prefills: list[Request] = []
        ahead = step.num_steps - 1
        for request in self._running:  # preemption shortens the queue from its end
            if step.budget <= 0:
                break
            num_tokens = len(request.all_token_ids) + request.num_pending_tokens
            if num_tokens - request.num_computed_tokens > 1:
                prefills.append(request)
            elif num_tokens < request.max_total_tokens and (
                self.kv_cache.allocate(request, num_tokens + ahead) or self._make_room(step, request, num_tokens)
            ):
                step.add(request, 1)
        for request in prefills:
            num_new = self._chunk_len(request.num_tokens - request.num_computed_tokens, step.budget)
            if num_new <= 0 or request.status is not RequestStatus.RUNNING:  # preempted for another
                continue
            # Groups without a window have had their pages since it was admitted.
            end = request.num_computed_tokens + num_new
            if self.kv_cache.allocate(request, end) or self._make_room(step, request, end):
                step.add(request, num_new)

    def _plan_waiting(self, step: _Step) -> None:
        while self._waiting and self._free_slots and step.budget > 0:
            request = self._waiting[0]
            if request.num_pending_tokens > 0 or (step.has_preempted and request.status is RequestStatus.PREEMPTED):
                return  # its last token is not known yet; or it may have been preempted in this very step
            computed = self.kv_cache.get_computed_pages(request)
            num_cached = computed.num_tokens
            num_new = self._chunk_len(request.num_tokens - num_cached, step.budget)
            if num_new == 0 or not self._allocate_waiting(step, request, num_cached + num_new, computed):
                return  # those behind it must not overtake it, or it might never find room
            self._waiting.discard(request)
            self._running.add(request)
            request.status = RequestStatus.RUNNING
            request.slot = self._free_slots.pop()
            request.num_computed_tokens = num_cached
            if request.num_preemptions == 0:
                request.num_cached_tokens = num_cached
                request.scheduled_time = time.time()
            step.admitted.add(request)
            step.add(request, num_new)

    def _chunk_len(self, num_tokens: int, budget: int) -> int:
        """Returns how many of a prompt's `num_tokens` remaining tokens go in this step."""
        if not self.config.enable_chunked_prefill:
            return num_tokens if num_tokens <= budget else 0
        return min(num_tokens, budget, self.config.long_prefill_token_threshold or num_tokens)

    def _make_room(self, step: _Step, request: Request, num_tokens: int) -> bool:
        """Takes pages from the last running requests for a running one. False if that preempts this one itself."""
        while True:
            victim = self._running[-1]
            self._preempt(step, victim)
            if victim is request:
                return False
            if self.kv_cache.allocate(request, num_tokens):
                return True

    def _allocate_waiting(self, step: _Step, request: Request, num_tokens: int, computed: CachedPrefix) -> bool:
        """Gets a waiting request pages for its first `num_tokens`, if need be from requests of lower priority."""
        # Of all its tokens where they stay: else half-done prompts would take pages from each other.
        args = request, num_tokens, request.num_tokens, computed
        if self.kv_cache.allocate(*args):
            return True
        if self.config.policy != "priority":
            return False
        lower = [other for other in self._running if other.priority > request.priority]
        num_reclaimable = sum(map(self.kv_cache.num_held_pages, lower))
        if self.kv_cache.num_free_pages + num_reclaimable < self.kv_cache.most_pages(request.num_tokens):
            return False  # in vain
        while lower:
            self._preempt(step, lower.pop())
            if self.kv_cache.allocate(*args):
                return True
        return False

    def preempt_all(self) -> None:
        """Takes slots and pages from all running requests, which wait to compute their tokens anew.

        No batch may be in flight.
        """
        step = _Step(0)
        while self._running:
            self._preempt(step, self._running[-1])

    def _preempt(self, step: _Step, request: Request) -> None:
        """Takes slot and pages from a running request; it will compute all its tokens anew."""
        self._stop_running(request)
        step.budget += step.plan.pop(request, 0)
        step.has_preempted = True
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.add(request)

    def _stop_running(self, request: Request) -> None:
        self.kv_cache.cache_full_pages(request, min(request.num_computed_tokens, request.num_tokens))
        self.kv_cache.free(request)
        self._running.discard(request)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _commit(self, step: _Step) -> ScheduledBatch:
        decodes: list[ScheduledSequence] = []
        prefills: list[ScheduledSequence] = []
        ahead = step.num_steps - 1
        for request, num_new in step.plan.items():
            start = request.num_computed_tokens
            end = start + num_new
            num_known, num_pending = len(request.all_token_ids), request.num_pending_tokens
            samples = end == num_known + num_pending
            sequence = ScheduledSequence(
                request,
                start,
                num_new,
                samples,
                request.slot,
                request in step.admitted,
                num_pending > 0,
                request.page_ids,
                len(request.output_token_ids) + num_pending,
            )
            (decodes if num_new == 1 else prefills).append(sequence)
            request.num_computed_tokens = end = end + ahead
            request.num_pending_tokens += samples + ahead
            # Only now that all of the step is planned: no request of this step may read what this step writes.
            self.kv_cache.cache_full_pages(request, min(end, num_known))
        return ScheduledBatch(decodes + prefills, sum(step.plan.values()), len(decodes), step.num_steps)

    def update(self, batch: ScheduledBatch, sampled: Sequence[list[int]]) -> list[TokenUpdate]:
        """Takes in a batch's tokens, and ends the requests that they finish. Batches come in the order of `schedule()`.

        Args:
            sampled: For each of `batch.sequences` its tokens, one or more; none where it does not sample.

        Returns:
            The requests that gained tokens. Rows of requests that have finished since are dropped, and so are tokens
            after the one that ends a request.

        Raises:
            ValueError: `sampled` does not match the batch.
        """
        if len(sampled) != len(batch.sequences):
            raise ValueError(f"sampled has {len(sampled)} rows: the batch has {len(batch.sequences)}")
        updates: list[TokenUpdate] = []
        for index, (sequence, token_ids) in enumerate(zip(batch.sequences, sampled, strict=True)):
            request = sequence.request
            if request.status.is_finished:
                continue
            if bool(token_ids) != sequence.samples:
                raise ValueError(f"sampled[{index}] has {len(token_ids)} tokens, but samples={sequence.samples}")
            if not token_ids:
                continue
            request.num_pending_tokens -= len(token_ids)
            output, known, num_taken = request.output_token_ids, request.all_token_ids, 0
            finished = False
            for token_id in token_ids:
                output.append(token_id)
                known.append(token_id)
                num_taken += 1
                if token_id in request.stop_token_ids or len(known) >= request.max_total_tokens:
                    finished = self._finish_if_done(request, token_id)
                    if finished:
                        break
            new = token_ids if num_taken == len(token_ids) else token_ids[:num_taken]
            updates.append(TokenUpdate(request, new, finished, index))
        return updates

    def _finish_if_done(self, request: Request, token_id: int) -> bool:
        """Ends the request if its newest token, `token_id`, is a stop token that counts already, or its last one."""
        params = request.sampling_params
        if token_id in request.stop_token_ids and len(request.output_token_ids) >= params.min_tokens:
            # Only a token that the user has named is a stop reason; EOS is not.
            stop_reason = token_id if token_id in (params.stop_token_ids or ()) else None
            self.finish_request(request.request_id, RequestStatus.FINISHED_STOPPED, stop_reason)
            return True
        if len(request.all_token_ids) >= request.max_total_tokens:
            self.finish_request(request.request_id, RequestStatus.FINISHED_LENGTH)
            return True
        return False
