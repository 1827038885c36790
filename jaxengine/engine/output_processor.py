"""Sampled tokens to `RequestOutput`s: text, log probabilities, stop strings, and the completions of one request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxengine.engine.detokenizer import IncrementalDetokenizer
from jaxengine.engine.token_streams import TokenPieces
from jaxengine.metrics import FinishedRequest, RequestStats
from jaxengine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobDict, logprob_dict
from jaxengine.request import Request
from jaxengine.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TokenLogprobs(NamedTuple):
    """Log probabilities at `n` positions, of the chosen token (column 0) and of the `k` most likely, best first.

    A batch shares one `k`, the largest asked for: each request reads as many columns as it wants.

    Attributes:
        token_ids: i32[n, 1 + k].
        logprobs: f32[n, 1 + k], natural logarithms.
        ranks: i32[n], of the chosen token; 1 is the most likely.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray


class SampledUpdate(NamedTuple):
    """What one step gave one request.

    Attributes:
        request: The request.
        new_token_ids: Its new tokens; none after a chunk of the prompt that was not the last.
        finished: Whether they ended it; `request.status` and `request.stop_reason` say why.
        logprobs: One row per new token, if `logprobs` was set.
        prompt_logprobs: One row per prompt token that this chunk predicted (column 0 is that token), if
            `prompt_logprobs` was set. The chunks' rows together are those of all prompt tokens but the first.
    """

    request: Request
    new_token_ids: Sequence[int]
    finished: bool
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: TokenLogprobs | None = None


class StopFound(NamedTuple):
    """A request that a stop string ended, or, with None, an error here: the caller must finish it in the scheduler."""

    request_id: str
    stop_string: str | None


@dataclass(slots=True)
class _Completion:
    """One of a request's completions while it grows."""

    index: int
    request: Request
    detokenizer: IncrementalDetokenizer
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobDict] | None = None
    prompt_logprobs: list[TokenLogprobDict | None] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_delivered: int = 0  # tokens that DELTA outputs have carried
    num_preemptions: int = 0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    has_news: bool = False


@dataclass(slots=True)
class _Parent:
    """A request as its caller sees it, with its `n` completions."""

    request_id: str
    prompt_text: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    completions: list[_Completion]
    num_running: int  # completions that have not ended
    prompt_logprobs_delivered: bool = False


class OutputProcessor:
    """Collects what the steps sample for every request, and makes outputs of it.

    Args:
        tokenizer: None gives text "".
        clock: Seconds; the clock that `Request.arrival_time` was read from.
        stats: Gains the times and ends of requests.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        clock: Callable[[], float] = time.time,
        stats: RequestStats | None = None,
    ) -> None:
        self._pieces = None if tokenizer is None else TokenPieces(tokenizer)
        self._clock = clock
        self._stats = RequestStats() if stats is None else stats
        self._parents: dict[str, _Parent] = {}
        self._by_child: dict[str, tuple[_Parent, _Completion]] = {}

    @property
    def request_ids(self) -> list[str]:
        """Ids of the unfinished requests, oldest first."""
        return list(self._parents)

    def child_ids(self, request_id: str) -> list[str]:
        """Returns the ids of a request's unfinished completions in the scheduler; [] if it is unknown or finished."""
        parent = self._parents.get(request_id)
        if parent is None:
            return []
        return [child.request.request_id for child in parent.completions if child.finish_reason is None]

    def parent_id(self, child_id: str) -> str | None:
        """Returns the id that the caller knows of an unfinished completion's request."""
        entry = self._by_child.get(child_id)
        return None if entry is None else entry[0].request_id

    def add(
        self,
        parent_request_id: str,
        prompt_text: str | None,
        prompt_token_ids: list[int],
        children: Sequence[Request],
        params: SamplingParams,
    ) -> None:
        """Registers a request: before its children are given to the scheduler.

        Args:
            parent_request_id: The id that outputs carry.
            prompt_text: The prompt's text, if it was given one.
            prompt_token_ids: The prompt's token ids.
            children: One request for each completion, in order.
            params: The parameters of the whole request.

        Raises:
            ValueError: An id is in use by an unfinished request.
        """
        for request_id in (parent_request_id, *(child.request_id for child in children)):
            if request_id in self._parents or request_id in self._by_child:
                raise ValueError(f"request_id={request_id!r} is in use by an unfinished request; ids must be unique")
        completions = []
        for index, request in enumerate(children):
            completion = _Completion(
                index, request, IncrementalDetokenizer(self._pieces, request.sampling_params, prompt_token_ids)
            )
            if params.logprobs is not None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
            if params.prompt_logprobs is not None and index == 0:
                completion.prompt_logprobs = [None]
            completions.append(completion)
        metrics = RequestMetrics(
            arrival_time=children[0].arrival_time if children else 0.0, num_prompt_tokens=len(prompt_token_ids)
        )
        parent = _Parent(
            parent_request_id, prompt_text, prompt_token_ids, params, metrics, completions, len(completions)
        )
        self._parents[parent_request_id] = parent
        for completion in completions:
            self._by_child[completion.request.request_id] = parent, completion

    def process(self, updates: Iterable[SampledUpdate]) -> tuple[list[RequestOutput], list[StopFound]]:
        """Takes what a step gave.

        Updates of requests that have ended here (aborted, or by a stop string) are ignored: the engine runs a step
        ahead.

        Args:
            updates: One for each request of the step, or fewer.

        Returns:
            The outputs that are due, at most one per request, in the order of the updates; and the requests that a stop
            string ended and that the scheduler still runs, by their ids there.
        """
        now = self._clock()
        touched: dict[str, _Parent] = {}
        stopped: list[StopFound] = []
        failed: list[RequestOutput] = []
        for update in updates:
            entry = self._by_child.get(update.request.request_id)
            if entry is None or entry[1].request is not update.request:
                continue
            parent, completion = entry
            try:
                stop_string = self._take(parent, completion, update, now)
            except Exception:  # whatever it is, it is this request's alone
                touched.pop(parent.request_id, None)
                failed.append(self._fail(parent, now, stopped))
                continue
            if stop_string is not None and not update.finished:
                stopped.append(StopFound(update.request.request_id, stop_string))
            is_due = parent.num_running == 0 or parent.params.output_kind is not RequestOutputKind.FINAL_ONLY
            if is_due and completion.has_news:
                touched[parent.request_id] = parent
        outputs = []
        for parent in touched.values():
            try:
                output = self._output(parent, now)
            except Exception:
                output = self._fail(parent, now, stopped)
            outputs += [] if output is None else [output]
        return outputs + failed, stopped

    def abort(self, request_id: str, *, reason: str = "abort") -> RequestOutput | None:
        """Ends a request, whose children the caller takes from the scheduler (see `child_ids`, to be read before).

        Args:
            request_id: The id its caller knows.
            reason: The finish reason of what is unfinished of it: "abort" or "error".

        Returns:
            Its last output, with everything generated so far (DELTA: everything not yet delivered); None if it is
            unknown or finished.
        """
        parent = self._parents.get(request_id)
        if parent is None:
            return None
        for completion in parent.completions:
            if completion.finish_reason is None:
                completion.detokenizer.finish()
                self._finish(parent, completion, reason, None)
        return self._output(parent, self._clock())

    def _fail(self, parent: _Parent, now: float, stopped: list[StopFound]) -> RequestOutput:
        """Ends a request because of the exception at hand: its last output has the tokens, and no more."""
        logger.exception("request %s: its output cannot be made", parent.request_id)
        stopped += [
            StopFound(child.request.request_id, None) for child in parent.completions if child.finish_reason is None
        ]
        for completion in parent.completions:
            if completion.finish_reason is None:
                self._finish(parent, completion, "error", None)
        self._parents.pop(parent.request_id, None)
        parent.metrics.finished_time = now
        outputs = [
            CompletionOutput(c.index, "", list(c.token_ids), finish_reason=c.finish_reason, stop_reason=c.stop_reason)
            for c in parent.completions
        ]
        ids = parent.prompt_token_ids
        return RequestOutput(parent.request_id, parent.prompt_text, ids, None, outputs, True, parent.metrics)

    def _take(self, parent: _Parent, completion: _Completion, update: SampledUpdate, now: float) -> str | None:
        """Adds an update to a completion; returns the stop string that ended it, if one did."""
        if update.prompt_logprobs is not None and completion.prompt_logprobs is not None:
            completion.prompt_logprobs += self._logprob_dicts(
                update.prompt_logprobs, parent.params.prompt_logprobs, parent.params
            )
        if not update.new_token_ids and not update.finished:
            return None
        request = update.request
        stopped = update.finished and request.status.finish_reason == "stop"
        before = completion.detokenizer.num_tokens
        stop_string = completion.detokenizer.update(update.new_token_ids, update.finished, stop_token=stopped)
        # Tokens after the one that completed a stop string are dropped.
        num_new = completion.detokenizer.num_tokens - before
        completion.token_ids += update.new_token_ids[:num_new]
        if update.logprobs is not None and completion.logprobs is not None:
            completion.logprobs += self._logprob_dicts(update.logprobs, parent.params.logprobs, parent.params)[:num_new]
            assert completion.cumulative_logprob is not None
            completion.cumulative_logprob += float(np.sum(update.logprobs.logprobs[:num_new, 0], dtype=np.float64))
        self._count(parent.metrics, completion, num_new, now)
        completion.has_news = True
        if stop_string is not None:
            self._finish(parent, completion, "stop", stop_string)
        elif update.finished:
            self._finish(parent, completion, request.status.finish_reason or "abort", request.stop_reason)
        return stop_string

    def _count(self, metrics: RequestMetrics, completion: _Completion, num_new: int, now: float) -> None:
        if num_new:
            if completion.last_token_time:
                self._stats.inter_token_latency.observe((now - completion.last_token_time) / num_new, num_new)
            elif not metrics.first_token_time:
                self._stats.time_to_first_token.observe(now - metrics.arrival_time)
            completion.first_token_time = completion.first_token_time or now
            completion.last_token_time = now
            metrics.scheduled_time = metrics.scheduled_time or completion.request.scheduled_time
            metrics.num_generation_tokens += num_new
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
        metrics.num_preemptions += completion.request.num_preemptions - completion.num_preemptions
        completion.num_preemptions = completion.request.num_preemptions

    def _finish(self, parent: _Parent, completion: _Completion, reason: str, stop_reason: int | str | None) -> None:
        parent.num_running -= 1
        self._stats.num_finished[reason] += 1
        if completion.token_ids and completion.request.scheduled_time:
            self._stats.add_completion(
                completion.request, len(completion.token_ids), completion.first_token_time, completion.last_token_time
            )
        completion.finish_reason, completion.stop_reason = reason, stop_reason
        completion.has_news = True
        del self._by_child[completion.request.request_id]

    def _logprob_dicts(
        self, values: TokenLogprobs, num_top: int | None, params: SamplingParams
    ) -> list[TokenLogprobDict]:
        """Makes one dict a row; `num_top` columns after the chosen token's are read, all for -1."""
        num_columns = values.token_ids.shape[1]
        if num_top is not None and num_top >= 0:
            num_columns = min(num_columns, 1 + num_top)
        rows = zip(
            values.token_ids[:, :num_columns].tolist(),
            values.logprobs[:, :num_columns].tolist(),
            values.ranks.tolist(),
            strict=True,
        )
        decoded = self._pieces if params.detokenize else None
        return [logprob_dict(token_ids, logprobs, rank, decoded) for token_ids, logprobs, rank in rows]

    def _output(self, parent: _Parent, now: float) -> RequestOutput | None:
        """Makes the output that is due; None if it is not (FINAL_ONLY). A finished request is forgotten."""
        finished = parent.num_running == 0
        if finished:
            parent.metrics.finished_time = now
            reasons = [completion.finish_reason or "" for completion in parent.completions]
            self._stats.add_request(FinishedRequest(parent.request_id, parent.params, parent.metrics, reasons))
            del self._parents[parent.request_id]
        kind = parent.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        is_delta = kind is RequestOutputKind.DELTA
        completions = [c for c in parent.completions if c.has_news or not is_delta]
        outputs = [self._completion_output(completion, is_delta) for completion in completions]
        prompt_logprobs = parent.completions[0].prompt_logprobs
        if is_delta and prompt_logprobs is not None:
            is_whole = finished or len(prompt_logprobs) >= len(parent.prompt_token_ids)
            if parent.prompt_logprobs_delivered or not is_whole:
                prompt_logprobs = None
            parent.prompt_logprobs_delivered |= is_whole
        return RequestOutput(
            request_id=parent.request_id,
            prompt=parent.prompt_text,
            prompt_token_ids=parent.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=finished,
            metrics=RequestMetrics(**vars(parent.metrics)),
            num_cached_tokens=parent.completions[0].request.num_cached_tokens,
        )

    @staticmethod
    def _completion_output(completion: _Completion, is_delta: bool) -> CompletionOutput:
        """Copies what is to be delivered: an output that a caller keeps does not change any more."""
        start = completion.num_delivered if is_delta else 0
        completion.num_delivered = len(completion.token_ids)
        completion.has_news = False
        return CompletionOutput(
            index=completion.index,
            text=completion.detokenizer.next_delta() if is_delta else completion.detokenizer.text,
            token_ids=completion.token_ids[start:],
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=None if completion.logprobs is None else completion.logprobs[start:],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
