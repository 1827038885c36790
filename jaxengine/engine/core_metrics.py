"""The core's counters and gauges, by vLLM's names with our prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxengine.metrics import Metric

if TYPE_CHECKING:
    from jaxengine.engine.core import EngineCore


def collect_metrics(core: EngineCore, num_compilations: int) -> list[Metric]:
    """Returns the values of this moment."""
    scheduler, stats = core.scheduler, core.stats
    return [
        Metric("jaxengine:num_requests_running", "gauge", scheduler.num_running),
        Metric("jaxengine:num_requests_waiting", "gauge", core.num_waiting),
        Metric("jaxengine:kv_cache_usage_perc", "gauge", scheduler.cache_usage),
        Metric("jaxengine:prefix_cache_queries", "counter", scheduler.prefix_queries),
        Metric("jaxengine:prefix_cache_hits", "counter", scheduler.prefix_hits),
        Metric("jaxengine:num_preemptions", "counter", scheduler.num_preemptions),
        Metric("jaxengine:prompt_tokens", "counter", stats.num_prompt_tokens),
        Metric("jaxengine:generation_tokens", "counter", stats.num_generation_tokens),
        Metric("jaxengine:steps", "counter", stats.num_steps),
        Metric(
            "jaxengine:iteration_tokens_total", "histogram", stats.step_tokens.total, tuple(stats.step_tokens.counts)
        ),
        Metric("jaxengine_compilations_total", "counter", num_compilations),
    ]
