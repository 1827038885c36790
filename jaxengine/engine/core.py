"""The loop: schedule, run, update. The host is one step ahead of the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxengine.engine.output_processor import SampledUpdate, TokenLogprobs
from jaxengine.engine.pacing import StepPacer
from jaxengine.metrics import STEP_TOKENS, Histogram
from jaxengine.request import Request, RequestStatus
from jaxengine.runner.model_runner import ModelRunner
from jaxengine.runner.step_handle import ForwardStep, ShardResult, StepHandle
from jaxengine.runner.weight_update import Weights
from jaxengine.sampling.logprobs import Logprobs
from jaxengine.scheduler.batch import ScheduledBatch, TokenUpdate
from jaxengine.scheduler.scheduler import Scheduler
from jaxengine.scheduler.shards import ShardedScheduler
from jaxengine.sharding.distributed import is_multiprocess
from jaxengine.structured.grammar import GrammarCompiler
from jaxengine.structured.matchers import Matchers

logger = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """Counts since the engine started.

    Attributes:
        num_steps: Steps dispatched.
        num_steps_done: Steps whose tokens have been taken in.
        num_prompt_tokens: Tokens computed in chunks of prompts (recomputed ones again).
        num_generation_tokens: Tokens sampled and kept.
        step_tokens: Tokens computed, of each step.
    """

    num_steps: int = 0
    num_steps_done: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))


class EngineCore:
    """Requests in, tokens out. Not thread-safe: one thread adds, steps and aborts.

    Attributes:
        grammars: Compiles what outputs must match; compiling before `add_request` keeps it out of the steps.
    """

    def __init__(self, scheduler: ShardedScheduler, runner: ModelRunner, grammars: GrammarCompiler):
        self.scheduler = scheduler
        self.runner = runner
        self.grammars = grammars
        self._matchers = Matchers(grammars)
        self._pacer = StepPacer(scheduler.config.num_scheduler_steps)
        self._last_decode = 0.0  # when the step collected last was done, if it was one of decodes
        self.stats = EngineStats()
        self._in_flight: tuple[list[ScheduledBatch], StepHandle] | None = None
        self._prompt_logprobs: dict[Request, TokenLogprobs] = {}

    def add_request(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: See `Scheduler.add_request`; or its grammar is wrong.
        """
        if is_multiprocess():
            request.arrival_time = 0.0  # clocks differ: the order of adding breaks ties
        self._matchers.begin(request)
        try:
            self.scheduler.add_request(request)
        except BaseException:
            self._matchers.forget(request)
            raise

    def add_requests(self, requests: Sequence[Request]) -> None:
        """Queues the completions of a request: see `add_request`."""
        for request in requests:
            self.add_request(request)

    def finish_request(
        self, request_id: str, status: RequestStatus, stop_reason: int | str | None = None
    ) -> Request | None:
        """Ends a request from outside the loop: aborted, or a stop string was found."""
        request = self.scheduler.finish_request(request_id, status, stop_reason)
        if request is not None:
            self._forget(request)
        return request

    def has_unfinished_requests(self) -> bool:
        """Returns whether any request waits or runs."""
        return self.scheduler.has_unfinished_requests()

    def step(self) -> list[SampledUpdate]:
        """Dispatches one step, or several decode steps at once, and takes in what was dispatched before.

        Where grammars are at work, the tokens of the one before come first, and then what is left of the new step: its
        masks, computed while the device runs the model, and its sampler.

        Returns:
            What requests gained; may be empty while prompts are computed.
        """
        updates: list[SampledUpdate] = []
        try:
            previous = self._in_flight or self._sample(self._dispatch(), updates)
            following = self._dispatch() if self.scheduler.config.async_scheduling else None
            updates += [] if previous is None else self._collect(*previous)
            self._in_flight = self._sample(following, updates)
        except Exception as error:  # a broken connection can look like anything
            if is_multiprocess():
                raise RuntimeError("a step over several processes has failed: another may have died") from error
            raise
        return updates

    def drain(self) -> None:
        """Waits for the step in flight, whose requests have all ended."""
        if self._in_flight is not None:
            self._collect(*self._in_flight)
            self._in_flight = None

    def update_weights(self, weights: Weights) -> None:
        """Puts new weights in place of some or all, and forgets all cached prefixes. See `LLM.update_weights`.

        Raises:
            RuntimeError: Requests are running; or see `ModelRunner.update_weights`.
            ValueError: A name, a shape or a dtype is wrong; then nothing has changed.
        """
        if self.has_unfinished_requests():
            raise RuntimeError("requests are running: finish or abort them before update_weights()")
        self.drain()
        try:
            self.runner.update_weights(weights)
        except ValueError:
            raise
        except BaseException:
            self.scheduler.reset_prefix_cache()
            raise
        self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        """Ends the compiler threads and frees the device. Requests must have ended."""
        self.runner.close()

    def _dispatch(self) -> tuple[list[ScheduledBatch], StepHandle | ForwardStep] | None:
        """Dispatches a step, or, if grammars say what may be sampled in it, the model's part of it."""
        if not self.scheduler.has_unfinished_requests():
            return None
        batches = self.scheduler.schedule(self.runner.programs.max_ready_tokens(), self._pacer.num_steps)
        if batches is None:
            return None
        num_steps = batches[0].num_steps
        self.stats.num_steps += num_steps
        self.stats.step_tokens.observe(sum(batch.num_tokens for batch in batches), num_steps)
        self.stats.num_prompt_tokens += sum(
            s.num_new_tokens
            for batch in batches
            for s in batch.sequences
            if not s.token_on_device and s.start < s.request.num_prompt_tokens
        )
        if any(s.request.grammar is not None and s.samples for batch in batches for s in batch.sequences):
            return batches, self.runner.forward(batches)
        return batches, self.runner.execute(batches)

    def _sample(
        self, step: tuple[list[ScheduledBatch], StepHandle | ForwardStep] | None, updates: list[SampledUpdate]
    ) -> tuple[list[ScheduledBatch], StepHandle] | None:
        """Dispatches what is left of a step, now that all tokens before it are known.

        Args:
            step: What `_dispatch` gave.
            updates: Gains the ends of requests whose grammars have failed.
        """
        if step is None:
            return None
        batches, forward = step
        if not isinstance(forward, ForwardStep):
            return batches, forward
        masks = []
        for batch in batches:
            own_masks, failed = self._matchers.masks(batch)
            masks.append(own_masks)
            for request, reason in failed.items():
                logger.warning("request %s: structured_outputs: %s", request.request_id, reason)
                self.finish_request(request.request_id, RequestStatus.FINISHED_ERROR)
                updates.append(SampledUpdate(request, [], True))
        return batches, self.runner.sample(forward, masks)

    def _collect(self, batches: list[ScheduledBatch], handle: StepHandle) -> list[SampledUpdate]:
        started = time.perf_counter()
        results = handle.results()
        done, num_steps = time.perf_counter(), batches[0].num_steps
        self.stats.num_steps_done += num_steps
        is_decode = all(batch.decode_only for batch in batches)
        if is_decode and self._last_decode:
            self._pacer.observe(num_steps, done - self._last_decode, done - started)
        self._last_decode = done if is_decode else 0.0
        parts = zip(self.scheduler.shards, batches, results, strict=True)
        return [update for part in parts for update in self._collect_shard(*part)]

    def _collect_shard(self, scheduler: Scheduler, batch: ScheduledBatch, result: ShardResult) -> list[SampledUpdate]:
        logprobs = result.logprobs
        if result.prompt_logprobs is not None:
            self._keep_prompt_logprobs(batch, result.row_starts, result.prompt_logprobs)
        updates, num_tokens = [], 0
        for update in scheduler.update(batch, result.sampled):
            request = update.request
            num_tokens += len(update.new_token_ids)
            if request.grammar is not None:
                if not self._matchers.advance(request, update.new_token_ids):
                    self._fail(update)
                elif not update.finished and self._matchers.has_ended(request, update.new_token_ids):
                    self._end(update)
            own = prompt = None
            if logprobs is not None and (num_logprobs := request.sampling_params.logprobs) is not None:
                own = _columns(logprobs, slice(update.index, update.index + 1), num_logprobs)
            if self._prompt_logprobs:
                prompt = self._prompt_logprobs.pop(request, None)
            updates.append(SampledUpdate(request, update.new_token_ids, update.finished, own, prompt))
            if update.finished:
                self._forget(request)
        self.stats.num_generation_tokens += num_tokens
        return updates

    def _end(self, update: TokenUpdate) -> None:
        """Ends a request whose grammar is over, though `min_tokens` or `ignore_eos` would have it go on."""
        request = update.request
        self.scheduler.finish_request(request.request_id, RequestStatus.FINISHED_STOPPED)
        request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, None
        update.finished = True

    def _fail(self, update: TokenUpdate) -> None:
        """Ends a request that has gained a token against its grammar: all that was allowed, something else forbade."""
        request = update.request
        logger.warning("request %s: other parameters leave no token that structured_outputs allows", request.request_id)
        self.scheduler.finish_request(request.request_id, RequestStatus.FINISHED_ERROR)
        request.status, request.stop_reason = RequestStatus.FINISHED_ERROR, None  # even if that token has ended it
        update.new_token_ids, update.finished = [], True

    def _keep_prompt_logprobs(self, batch: ScheduledBatch, starts: list[int], logprobs: Logprobs) -> None:
        """Collects a prompt's log probabilities chunk by chunk; they are given out with the first token."""
        for sequence, first_row in zip(batch.sequences, starts, strict=True):
            request = sequence.request
            num_top = request.sampling_params.prompt_logprobs
            if num_top is None or request.output_token_ids or request.status.is_finished:
                continue
            if request not in self._prompt_logprobs:
                shape = (request.num_prompt_tokens - 1, 1 + num_top)
                self._prompt_logprobs[request] = TokenLogprobs(
                    np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape[0], np.int32)
                )
            kept = self._prompt_logprobs[request]
            count = min(sequence.num_new_tokens, request.num_prompt_tokens - 1 - sequence.start)
            rows = _columns(logprobs, slice(first_row, first_row + count), num_top)
            for into, part in zip(
                (kept.token_ids, kept.logprobs, kept.ranks), (rows.token_ids, rows.logprobs, rows.ranks), strict=True
            ):
                into[sequence.start : sequence.start + count] = part

    def _forget(self, request: Request) -> None:
        self._prompt_logprobs.pop(request, None)
        self._matchers.forget(request)


def _columns(logprobs: Logprobs, rows: slice, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(
        np.asarray(logprobs.token_ids[rows, : 1 + num_top]),
        np.asarray(logprobs.logprobs[rows, : 1 + num_top]),
        np.asarray(logprobs.ranks[rows]),
    )
