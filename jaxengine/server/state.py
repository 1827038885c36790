"""What the endpoints share: the model, the server's settings, and who may come in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from jaxengine.engine.async_llm import AsyncLLM
from jaxengine.engine.chat import render_chat, template_job
from jaxengine.engine.inputs import ProcessedInput
from jaxengine.messages import quote
from jaxengine.server.errors import APIError
from jaxengine.server.observe import Observer
from jaxengine.server.parsing.answer import AnswerParser
from jaxengine.server.parsing.reasoning import REASONING_STYLES, ReasoningParser
from jaxengine.server.parsing.tool_calls import TOOL_PARSERS, JSONParser
from jaxengine.server.response_store import ResponseStore
from jaxengine.server.tools import ToolUse


@dataclass(frozen=True)
class ServerSettings:
    """How the server behaves.

    Attributes:
        served_model_names: Names that requests may give; the first is told in answers.
        api_keys: Any of these opens the server; none: it is open.
        allowed_origins: Origins of web pages whose scripts may call the server, as "https://example.com"; "*": all.
        max_queue: Completions that may wait for a place among those that run.
        request_timeout: Seconds a request may take; None: as long as it takes.
        max_body_size: Bytes of a request's body at most.
        health_timeout: Seconds that the engine may be silent before `/health` says that it is not well.
        shutdown_timeout: Seconds that requests in flight get to finish once the server is told to end.
        enable_auto_tool_choice: Let the model call tools; needs `tool_call_parser`.
        tool_call_parser: How the model writes calls: a name of `TOOL_PARSERS`.
        reasoning_parser: How the model writes what it thinks: a name of `REASONING_STYLES`; None: it is content.
        chat_template: Jinja, instead of the model's own.
        trust_request_chat_template: Let requests bring templates, which are programs.
        response_store_size: Bytes of answers of /v1/responses to keep for later requests; the oldest go first.
        log_requests: Whether a line of the log tells of every request that begins or ends.
        otlp_traces_endpoint: URL to which OpenTelemetry spans of requests are sent; None: nowhere.
        enable_dev_endpoints: Whether whoever may call the server may pause it, too, and send it to sleep.

    Raises:
        ValueError: A value is out of range.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = 1024
    request_timeout: float | None = None
    max_body_size: int = 16 * 2**20
    health_timeout: float = 60.0
    shutdown_timeout: float = 30.0
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    response_store_size: int = 64 * 2**20
    log_requests: bool = False
    otlp_traces_endpoint: str | None = None
    enable_dev_endpoints: bool = False

    def __post_init__(self) -> None:
        if not all(self.api_keys):
            raise ValueError("api_key='': a key must not be empty")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                accepted = "'*', or scheme and host as browsers tell them: https://example.com"
                raise ValueError(f"allowed_origins: {origin!r}: expected {accepted}")
        if self.max_queue < 0:
            raise ValueError(f"max_queue={self.max_queue}: must be at least 0")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ValueError(f"request_timeout={self.request_timeout}: must be above 0")
        if self.max_body_size < 1:
            raise ValueError(f"max_body_size={self.max_body_size}: must be at least 1")
        if not self.health_timeout > 0:
            raise ValueError(f"health_timeout={self.health_timeout}: must be above 0")
        if not self.shutdown_timeout >= 0:
            raise ValueError(f"shutdown_timeout={self.shutdown_timeout}: must be at least 0")
        if self.response_store_size < 0:
            raise ValueError(f"response_store_size={self.response_store_size}: must be at least 0")
        for name, known in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_STYLES)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ValueError("enable_auto_tool_choice=True: needs tool_call_parser")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            accepted = "an http:// or https:// URL, as http://localhost:4318/v1/traces"
            raise ValueError(f"otlp_traces_endpoint={endpoint!r}: expected {accepted} (OTLP over HTTP)")


class ChatText:
    """The text of a conversation, which is there after `prepare`, or made when it is asked for."""

    def __init__(
        self,
        llm: AsyncLLM,
        render: Callable[[], str] | None = None,
        make_job: Callable[[], dict[str, Any]] | None = None,
    ):
        """Takes one of two ways to make the text.

        Args:
            llm: Has a thread and worker processes for it.
            render: Renders a template that is trusted.
            make_job: Gives the job of a worker that renders one that is not.
        """
        self._llm, self._render, self._make_job = llm, render, make_job
        self._text = ""

    async def prepare(self) -> None:
        """Has a worker render the text, if the template is not trusted.

        Raises:
            ValueError: The messages or the template are wrong.
        """
        if self._make_job is None:
            return
        job = await self._llm.in_tokenizer_thread(self._make_job)
        try:
            self._text = await self._llm.run_job(**job)
        except ValueError as error:
            raise ValueError(f"chat_template: {error}") from error

    def text(self) -> str:
        """Gives the text, to be called in the tokenizer's thread.

        Raises:
            ValueError: The messages or the template are wrong.
        """
        return self._text if self._render is None else self._render()


class ServerState:
    """The model behind the endpoints, and the count of what it is busy with."""

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, observer: Observer):
        self.llm = llm
        self.settings = settings
        self.responses = ResponseStore(settings.response_store_size)
        self.observer = observer
        self._num_admitted = 0

    @classmethod
    def of(cls, request: Request) -> ServerState:
        """Returns the state of the application that a request came to."""
        return request.app.state.server

    @staticmethod
    def owner(request: Request) -> str:
        """Returns whose request it is, if there are several keys; "" if all is everybody's."""
        return getattr(request.state, "owner", "")

    def cache_salt(self, request: Request, given: str | None) -> str | None:
        """Returns the salt of a request's cached pages: its own, if it brings one, among those of its key.

        Whether a prefix is cached, which answers tell, says then nothing about what others have asked.
        """
        owner = self.owner(request)  # of one length: no two pairs make the same salt
        return f"{owner}{given or ''}" if owner else given

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
        """Returns the name to answer with.

        Raises:
            APIError: Another model is asked for (404).
        """
        names = self.settings.served_model_names
        if asked is not None and asked not in names:
            message = f"model {quote(asked)} does not exist; this server has {', '.join(names)}"
            raise APIError(404, message, param="model", code="model_not_found")
        return asked or names[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            APIError: There is none (400).
        """
        if self.llm.tokenizer is None:
            raise APIError(400, "this server has no tokenizer (skip_tokenizer_init)")
        return self.llm.tokenizer

    def chat_text(
        self,
        get_messages: Callable[[], Sequence[Mapping[str, Any]]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template: str | None = None,
        **options: Any,
    ) -> ChatText:
        """Returns the text of a conversation, with the request's template, the server's or the model's.

        Args:
            get_messages: Gives the messages, in the tokenizer's thread.
            tools, chat_template, options: See `render_chat`.

        Raises:
            APIError: The request brings a template and the server does not trust it.
        """
        if chat_template is not None and not self.settings.trust_request_chat_template:
            message = "chat_template: this server was started without --trust-request-chat-template"
            raise APIError(400, message, param="chat_template", code="unsupported_field")
        tokenizer = self.tokenizer
        if chat_template is None:
            own = self.settings.chat_template
            return ChatText(
                self.llm, lambda: render_chat(tokenizer, get_messages(), tools=tools, chat_template=own, **options)
            )
        limit = self.llm.input_processor.max_characters
        options |= {"tools": tools, "chat_template": chat_template, "max_characters": limit}
        return ChatText(self.llm, make_job=lambda: template_job(tokenizer, get_messages(), **options))

    def text_options(self, use: ToolUse) -> dict[str, Any]:
        """Returns sampling parameters for text that is parsed.

        They keep special tokens: in many models what marks calls and reasoning is special.
        """
        if use.form is not None:
            return {"structured_outputs": use.form}
        return {"skip_special_tokens": False} if use.tools or self.settings.reasoning_parser else {}

    def answer_parser(self, processed: ProcessedInput, use: ToolUse, *, max_calls: int | None) -> AnswerParser:
        """Returns a parser of one completion of a prompt."""
        if use.form is not None:
            return AnswerParser(None, JSONParser(), max_calls)
        style, calls = self.settings.reasoning_parser, self.settings.tool_call_parser
        # A text that must have a form has it from its first token on: nothing is thought before it.
        if style is None or processed.params.structured_outputs is not None:
            reasoning = None
        else:
            reasoning = ReasoningParser(REASONING_STYLES[style], processed.prompt_text or "")
        names = [tool.function.name for tool in use.tools]
        return AnswerParser(reasoning, TOOL_PARSERS[calls](names) if names and calls else None, max_calls)
