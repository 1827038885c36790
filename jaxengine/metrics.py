"""Metrics of the engine, by vLLM's names with our prefix."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxengine.engine.core import EngineCore


class Metric(NamedTuple):
    """One value. `kind` is "counter" (only grows) or "gauge"."""

    name: str
    kind: str
    value: float


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

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class RequestStats:
    """Times and ends of requests, as their callers see them; seconds.

    Attributes:
        time_to_first_token: From arrival to the first token, of each request.
        inter_token_latency: Between tokens that follow each other in a completion.
        e2e_request_latency: From arrival to the end, of each request.
        num_finished: Completions by finish reason.
    """

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(
            (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
        )
        self.inter_token_latency = Histogram(
            (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
        )
        self.e2e_request_latency = Histogram(
            (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
        )
        self.num_finished: Counter[str] = Counter()


def collect_metrics(core: EngineCore, num_compilations: int) -> list[Metric]:
    """The values of this moment."""
    scheduler, stats = core.scheduler, core.stats
    return [
        Metric("jaxengine:num_requests_running", "gauge", scheduler.num_running),
        Metric("jaxengine:num_requests_waiting", "gauge", scheduler.num_waiting),
        Metric("jaxengine:kv_cache_usage_perc", "gauge", scheduler.cache_usage),
        Metric("jaxengine:prefix_cache_queries", "counter", scheduler.prefix_queries),
        Metric("jaxengine:prefix_cache_hits", "counter", scheduler.prefix_hits),
        Metric("jaxengine:num_preemptions", "counter", scheduler.num_preemptions),
        Metric("jaxengine:prompt_tokens", "counter", stats.num_prompt_tokens),
        Metric("jaxengine:generation_tokens", "counter", stats.num_generation_tokens),
        Metric("jaxengine:steps", "counter", stats.num_steps),
        Metric("jaxengine_compilations_total", "counter", num_compilations),
    ]
