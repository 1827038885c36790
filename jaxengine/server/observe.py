"""What is told of requests while they run: lines of a log, and spans of a trace."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request

from jaxengine.engine.inputs import ProcessedInput
from jaxengine.messages import quote
from jaxengine.metrics import FinishedRequest, RequestStats
from jaxengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxengine.server.tracing import RequestTracer

logger = logging.getLogger("jaxengine.server.requests")


class Observer:
    """Learns when requests begin and end."""

    def __init__(self, stats: RequestStats, *, log: bool = False, tracer: RequestTracer | None = None):
        """Args: stats: Tells when requests end. log: Whether to write lines."""
        self._log, self._tracer = log, tracer
        if log:
            logger.setLevel(logging.INFO)
        if log or tracer is not None:
            stats.on_finished = self._end

    def begin(self, call: Request, processed: Sequence[ProcessedInput]) -> None:
        """Takes the requests of a call that have been submitted."""
        for item in processed:
            if self._log:
                logger.info(
                    "received request %s: %s, %d prompt tokens, %s",
                    item.request_id,
                    call.url.path,
                    len(item.prompt_token_ids),
                    _given(item.params),
                )
            if self._tracer is not None:
                self._tracer.begin(item.request_id, call.headers)

    def _end(self, finished: FinishedRequest) -> None:
        if self._log:
            metrics = finished.metrics
            logger.info(
                "finished request %s: %s, %d tokens, queued %.3f s, first token after %.3f s, %.3f s in all",
                finished.request_id,
                ", ".join(finished.finish_reasons),
                metrics.num_generation_tokens,
                metrics.queue_seconds,
                metrics.first_token_latency,
                metrics.finished_time - metrics.arrival_time,
            )
        if self._tracer is not None:
            self._tracer.end(finished)


def _given(params: SamplingParams) -> str:
    """Returns what differs from the defaults."""
    default = SamplingParams()
    names = [field.name for field in dataclasses.fields(params) if field.init and field.name != "output_kind"]
    changed = [
        f"{name}={quote(getattr(params, name))}" for name in names if getattr(params, name) != getattr(default, name)
    ]
    return ", ".join(changed) or "default parameters"
