"""Metrics of the engine, by vLLM's names with our prefix."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxengine.outputs import RequestMetrics
    from jaxengine.request import Request
    from jaxengine.sampling_params import SamplingParams


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the buckets of a step's tokens."""
_PHASE_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKEN_SECONDS = (
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class Metric(NamedTuple):
    """One value.

    Attributes:
        name: vLLM's, with our prefix.
        kind: "counter" (only grows), "gauge" or "histogram".
        value: Of a histogram the sum of its values.
        counts: Of a histogram its values by bucket, not cumulated; the buckets are `STEP_TOKENS`.
    """

    name: str
    kind: str
    value: float
    counts: tuple[int, ...] = ()


class Histogram:
    """Counts of values by size, as Prometheus has them.

    Attributes:
        bounds: Upper bounds of all buckets but the last, whose bound is infinity.
        counts: Values of each bucket, not cumulated.
        total: Sum of all values.
    """

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value, or so many of it."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class FinishedRequest(NamedTuple):
    """A request all of whose completions have ended."""

    request_id: str
    params: SamplingParams
    metrics: RequestMetrics
    finish_reasons: list[str]


class RequestStats:
    """Times and ends of requests, as their callers see them; seconds.

    Attributes:
        time_to_first_token: From arrival to the first token, of each request.
        inter_token_latency: Between tokens that follow each other in a completion.
        e2e_request_latency: From arrival to the end, of each request.
        num_finished: Completions by finish reason.
        on_finished: Called with every request that has ended.

    Of each completion that has ended and had at least a token:
        queue_time: From arrival to its first step.
        prefill_time: From its first step to its first token.
        decode_time: From its first token to its last.
        inference_time: From its first step to its last token.
        time_per_output_token: Mean between its tokens, if it has several.
        prompt_tokens: Tokens of its prompt.
        prefill_kv_computed_tokens: Those that were not in the prefix cache.
        generation_tokens: Tokens generated.
    """

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(
            (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
        )
        self.inter_token_latency = Histogram(_TOKEN_SECONDS)
        self.e2e_request_latency = Histogram(_PHASE_SECONDS)
        self.num_finished: Counter[str] = Counter()
        self.on_finished: Callable[[FinishedRequest], None] | None = None
        self.queue_time = Histogram(_PHASE_SECONDS)
        self.prefill_time = Histogram(_PHASE_SECONDS)
        self.decode_time = Histogram(_PHASE_SECONDS)
        self.inference_time = Histogram(_PHASE_SECONDS)
        self.time_per_output_token = Histogram(_TOKEN_SECONDS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.prefill_kv_computed_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)

    def add_request(self, finished: FinishedRequest) -> None:
        """Counts a request that has ended."""
        self.e2e_request_latency.observe(finished.metrics.finished_time - finished.metrics.arrival_time)
        if self.on_finished is not None:
            self.on_finished(finished)

    def add_completion(
        self, request: Request, num_tokens: int, first_token_time: float, last_token_time: float
    ) -> None:
        """Counts a completion that has ended.

        Args:
            request: The completion's request.
            num_tokens: Tokens generated, at least one.
            first_token_time: When the first of them arrived, on the clock of `request.arrival_time`.
            last_token_time: When the last one did.
        """
        self.queue_time.observe(request.scheduled_time - request.arrival_time)
        self.prefill_time.observe(first_token_time - request.scheduled_time)
        self.decode_time.observe(last_token_time - first_token_time)
        self.inference_time.observe(last_token_time - request.scheduled_time)
        if num_tokens > 1:
            self.time_per_output_token.observe((last_token_time - first_token_time) / (num_tokens - 1))
        self.prompt_tokens.observe(request.num_prompt_tokens)
        self.prefill_kv_computed_tokens.observe(request.num_prompt_tokens - request.num_cached_tokens)
        self.generation_tokens.observe(num_tokens)
