"""OpenTelemetry spans of requests, with the names that vLLM gives them; needs the extra `otel`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxengine.metrics import FinishedRequest


class RequestTracer:
    """Makes a span of every request when it has ended, as a part of its caller's trace if the call names one."""

    def __init__(self, provider: TracerProvider, model: str):
        """Args: provider: Where spans go. model: The name that answers carry."""
        self._provider, self._model = provider, model
        self._tracer = provider.get_tracer("jaxengine.server")
        self._contexts: dict[str, Context] = {}

    @classmethod
    def to_collector(cls, endpoint: str, model: str) -> RequestTracer:
        """Returns one that sends spans, in batches and from a thread, to a collector: OTLP over HTTP."""
        name = os.environ.get("OTEL_SERVICE_NAME", "jaxengine")  # the standard's own variable
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider, model)

    def begin(self, request_id: str, headers: Mapping[str, str]) -> None:
        """Notes the trace (headers `traceparent` and `tracestate`) to which a request belongs."""
        self._contexts[request_id] = TraceContextTextMapPropagator().extract(headers)

    def end(self, finished: FinishedRequest) -> None:
        """Makes the span. Times are in seconds."""
        params, metrics = finished.params, finished.metrics
        span = self._tracer.start_span(
            "llm_request",
            context=self._contexts.pop(finished.request_id, None),
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(metrics.arrival_time),
        )
        optional = {"gen_ai.request.max_tokens": params.max_tokens}
        if metrics.first_token_time:
            optional |= {
                "gen_ai.latency.time_in_queue": metrics.queue_seconds,
                "gen_ai.latency.time_to_first_token": metrics.first_token_latency,
                "gen_ai.latency.time_in_model_prefill": metrics.first_token_time - metrics.scheduled_time,
                "gen_ai.latency.time_in_model_decode": metrics.last_token_time - metrics.first_token_time,
                "gen_ai.latency.time_in_model_inference": metrics.last_token_time - metrics.scheduled_time,
            }
        span.set_attributes({name: value for name, value in optional.items() if value is not None})
        span.set_attributes(
            {
                "gen_ai.response.model": self._model,
                "gen_ai.response.finish_reasons": finished.finish_reasons,
                "gen_ai.request.id": finished.request_id,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.n": params.n,
                "gen_ai.usage.prompt_tokens": metrics.num_prompt_tokens,
                "gen_ai.usage.completion_tokens": metrics.num_generation_tokens,
                "gen_ai.latency.e2e": metrics.finished_time - metrics.arrival_time,
            }
        )
        span.end(_nanoseconds(metrics.finished_time))

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
