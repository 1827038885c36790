"""/metrics, in Prometheus's format."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxengine.metrics import Histogram
from jaxengine.server.state import ServerState

HELP = {
    "jaxengine:num_requests_running": "Completions that are being computed.",
    "jaxengine:num_requests_waiting": "Completions that wait for a place.",
    "jaxengine:kv_cache_usage_perc": "Share of the KV cache's pages in use; 1 is all of them.",
    "jaxengine:prefix_cache_queries": "Tokens whose prefix was looked for in the cache.",
    "jaxengine:prefix_cache_hits": "Tokens found there.",
    "jaxengine:num_preemptions": "Completions that gave their pages back and were computed anew.",
    "jaxengine:prompt_tokens": "Tokens of prompts computed.",
    "jaxengine:generation_tokens": "Tokens generated.",
    "jaxengine:steps": "Steps of the engine.",
    "jaxengine_compilations_total": "Compilations since the engine started.",
}
FORMAT = "text/plain; version=0.0.4; charset=utf-8"


class ServerCollector(Collector):
    """Reads the engine's metrics whenever they are asked for."""

    def __init__(self, server: ServerState):
        self._server = server
        self._labels = {"model_name": server.settings.served_model_names[0]}

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        for metric in self._server.llm.get_metrics():
            kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
            family = kind(metric.name, HELP[metric.name], labels=names)
            family.add_metric(values, metric.value)
            yield family
        stats = self._server.llm.stats
        finished = CounterMetricFamily(
            "jaxengine:request_success", "Completions that have ended, by reason.", labels=[*names, "finished_reason"]
        )
        for reason in sorted({"stop", "length", "abort", *stats.num_finished}):
            finished.add_metric([*values, reason], stats.num_finished[reason])
        yield finished
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", stats.time_to_first_token),
            ("inter_token_latency_seconds", "Between tokens of a completion.", stats.inter_token_latency),
            # The name that the one above had before, for dashboards that know only that.
            ("time_per_output_token_seconds", "Between tokens of a completion.", stats.inter_token_latency),
            ("e2e_request_latency_seconds", "From arrival to the end.", stats.e2e_request_latency),
        ):
            family = HistogramMetricFamily(f"jaxengine:{name}", text, labels=names)
            family.add_metric(values, _cumulated(histogram), histogram.total)
            yield family


def _cumulated(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


def make_registry(server: ServerState) -> CollectorRegistry:
    """A registry of its own: nothing is shared between servers of a process."""
    registry = CollectorRegistry()
    registry.register(ServerCollector(server))
    return registry


def render(registry: CollectorRegistry) -> bytes:
    return generate_latest(registry)
