"""Metrics of the engine, by vLLM's names with our prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxengine.engine.core import EngineCore


class Metric(NamedTuple):
    """One value. `kind` is "counter" (only grows) or "gauge"."""

    name: str
    kind: str
    value: float


def collect_metrics(core: EngineCore, num_compilations: int) -> list[Metric]:
    """The values of this moment."""
    scheduler, cache, stats = core.scheduler, core.scheduler.kv_cache, core.stats
    return [
        Metric("jaxengine:num_requests_running", "gauge", scheduler.num_running),
        Metric("jaxengine:num_requests_waiting", "gauge", scheduler.num_waiting),
        Metric("jaxengine:kv_cache_usage_perc", "gauge", cache.usage),
        Metric("jaxengine:prefix_cache_queries", "counter", cache.prefix_queries),
        Metric("jaxengine:prefix_cache_hits", "counter", cache.prefix_hits),
        Metric("jaxengine:num_preemptions", "counter", scheduler.num_preemptions),
        Metric("jaxengine:prompt_tokens", "counter", stats.num_prompt_tokens),
        Metric("jaxengine:generation_tokens", "counter", stats.num_generation_tokens),
        Metric("jaxengine:steps", "counter", stats.num_steps),
        Metric("jaxengine_compilations_total", "counter", num_compilations),
    ]
