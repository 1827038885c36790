"""What the endpoints share: the model, the server's settings, and who may come in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from jaxengine.engine.async_llm import AsyncLLM
from jaxengine.server.errors import APIError
from jaxengine.server.observe import Observer


@dataclass(frozen=True)
class ServerSettings:
    """How the server behaves.

    Attributes:
        served_model_names: Names that requests may give; the first is told in answers.
        api_keys: Any of these opens the server; none: it is open.
        max_queue: Completions that may wait for a place among those that run.
        request_timeout: Seconds a request may take; None: as long as it takes.
        max_body_size: Bytes of a request's body at most.
        shutdown_timeout: Seconds that requests in flight get to finish once the server is told to end.
        log_requests: Whether a line of the log tells of every request that begins or ends.
        otlp_traces_endpoint: URL to which OpenTelemetry spans of requests are sent; None: nowhere.

    Raises:
        ValueError: A value is out of range.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_queue: int = 1024
    request_timeout: float | None = None
    max_body_size: int = 16 * 2**20
    shutdown_timeout: float = 30.0
    log_requests: bool = False
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise ValueError("api_key='': a key must not be empty")
        if self.max_queue < 0:
            raise ValueError(f"max_queue={self.max_queue}: must be at least 0")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ValueError(f"request_timeout={self.request_timeout}: must be above 0")
        if self.max_body_size < 1:
            raise ValueError(f"max_body_size={self.max_body_size}: must be at least 1")
        if not self.shutdown_timeout >= 0:
            raise ValueError(f"shutdown_timeout={self.shutdown_timeout}: must be at least 0")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            accepted = "an http:// or https:// URL, as http://localhost:4318/v1/traces"
            raise ValueError(f"otlp_traces_endpoint={endpoint!r}: expected {accepted} (OTLP over HTTP)")


class ServerState:
    """The model behind the endpoints, and the count of what it is busy with."""

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, observer: Observer):
        self.llm = llm
        self.settings = settings
        self.observer = observer
        self._num_admitted = 0

    @classmethod
    def of(cls, request: Request) -> ServerState:
        """The state of the application that a request came to."""
        return request.app.state.server

    @contextmanager
    def admit(self, num_completions: int) -> Iterator[None]:
        """Lets completions in, for as long as they run or wait.

        Raises:
            APIError: The queue is full (429), or could never hold as many (400).
        """
        room = self.llm.limits.max_num_seqs + self.settings.max_queue
        if num_completions > room:
            raise APIError(400, f"{num_completions} completions in one request: at most {room} are accepted", param="n")
        if self._num_admitted + num_completions > room:
            message = f"the queue is full ({self.settings.max_queue} completions may wait); try again later"
            raise APIError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._num_admitted += num_completions
        try:
            yield
        finally:
            self._num_admitted -= num_completions

    def model_name(self, asked: str | None) -> str:
        """The name to answer with.

        Raises:
            APIError: Another model is asked for (404).
        """
        names = self.settings.served_model_names
        if asked is not None and asked not in names:
            message = f"model {asked!r} does not exist; this server has {', '.join(names)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return asked or names[0]
