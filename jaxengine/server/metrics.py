"""/metrics, in Prometheus's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxengine.metrics import STEP_TOKENS
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
    "jaxengine:iteration_tokens_total": "Tokens computed in a step.",
    "jaxengine_compilations_total": "Compilations since the engine started.",
}
FORMAT = "text/plain; version=0.0.4; charset=utf-8"


class ServerCollector(Collector):
    """Reads the engine's metrics whenever they are asked for."""

    def __init__(self, server: ServerState):
        self._server = server
        self._labels = {"model_name": server.settings.served_model_names[0]}

    def collect(self) -> Iterator[Metric]:
        """Yields the engine's metrics, and the server's own."""
        names, values = list(self._labels), list(self._labels.values())
        for metric in self._server.llm.get_metrics():
            if metric.kind == "histogram":
                yield _histogram(self._labels, metric.name, HELP[metric.name], STEP_TOKENS, metric.counts, metric.value)
                continue
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
            ("request_queue_time_seconds", "From arrival to the first step.", stats.queue_time),
            ("request_prefill_time_seconds", "From the first step to the first token.", stats.prefill_time),
            ("request_decode_time_seconds", "From the first token to the last.", stats.decode_time),
            ("request_inference_time_seconds", "From the first step to the last token.", stats.inference_time),
            (
                "request_time_per_output_token_seconds",
                "Mean between a completion's tokens.",
                stats.time_per_output_token,
            ),
            ("request_prompt_tokens", "Tokens of a prompt.", stats.prompt_tokens),
            (
                "request_prefill_kv_computed_tokens",
                "Tokens of a prompt that were not in the prefix cache.",
                stats.prefill_kv_computed_tokens,
            ),
            ("request_generation_tokens", "Tokens of a completion.", stats.generation_tokens),
        ):
            yield _histogram(
                self._labels, f"jaxengine:{name}", text, histogram.bounds, histogram.counts, histogram.total
            )


def _histogram(
    labels: dict[str, str], name: str, text: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> HistogramMetricFamily:
    """Args: counts: Of each bucket, not cumulated, one more than `bounds`."""
    edges = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    buckets = list(zip(edges, map(float, accumulate(counts)), strict=True))
    family = HistogramMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), buckets, total)
    return family


def make_registry(server: ServerState) -> CollectorRegistry:
    """Returns a registry of its own: nothing is shared between servers of a process."""
    registry = CollectorRegistry()
    registry.register(ServerCollector(server))
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """Returns all metrics as text."""
    return generate_latest(registry)
