"""From a checked body to an answer, whole or as a stream of events, that ends when its reader leaves."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jaxengine.engine.async_llm import EngineDeadError, RequestStream
from jaxengine.engine.inputs import ProcessedInput
from jaxengine.outputs import Logprob, RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.server.bounds import MAX_PROMPT_LOGPROBS
from jaxengine.server.errors import APIError, ClientDisconnected, as_api_error
from jaxengine.server.state import ChatText, ServerState

MIN_LOGPROB = -9999.0
"""What JSON, which has no infinity, is told of a token that is impossible."""

Answer = Callable[[list[ProcessedInput], RequestStream], Coroutine[Any, Any, dict[str, Any]]]
Events = Callable[[list[ProcessedInput], RequestStream], AsyncGenerator[dict[str, Any]]]


async def generate(
    request: Request,
    num_completions: int,
    process: Callable[[], list[ProcessedInput]],
    params: SamplingParams,
    chat: ChatText | None = None,
    answer: Answer | None = None,
    events: Events | None = None,
) -> Response:
    """Runs the requests of a call and makes its response.

    Args:
        request: The call. If its client leaves, its requests end at once.
        num_completions: Completions that it asks for.
        process: Tokenises and checks its prompts.
        params: What they are sampled with.
        chat: The text of a conversation, for `process`.
        answer: Makes the whole answer of the outputs; or
        events: makes the events of a stream of them.

    Raises:
        APIError: The queue is full.
        ValueError: `process` raises it.
        ClientDisconnected: Nobody waits for the answer any more.
        EngineDeadError, TimeoutError: What their names say.
    """
    server = ServerState.of(request)
    seconds = server.settings.request_timeout
    deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
    with ExitStack() as resources:
        resources.enter_context(server.admit(num_completions))
        async with asyncio.timeout_at(deadline):
            if chat is not None:
                await chat.prepare()
            await server.llm.look_at_form(params)
            processed = await server.llm.in_tokenizer_thread(process)
            _check_prompt_logprobs(processed)
            outputs = server.llm.submit(processed)
            resources.callback(outputs.close)
            server.observer.begin(request, processed)
            if events is not None:
                return EventStream(events(processed, outputs), resources.pop_all(), deadline)
            assert answer is not None
            body = await _unless_disconnected(request.receive, answer(processed, outputs))
    return json_response(body)


def _check_prompt_logprobs(processed: list[ProcessedInput]) -> None:
    """Raises APIError if an answer would have more log probabilities of prompts than are accepted."""
    num_logprobs = sum(
        len(item.prompt_token_ids) * (1 + item.params.prompt_logprobs) * item.params.n  # each choice repeats them
        for item in processed
        if item.params.prompt_logprobs is not None
    )
    if num_logprobs > MAX_PROMPT_LOGPROBS:
        message = f"{num_logprobs} log probabilities of prompts in one call: at most {MAX_PROMPT_LOGPROBS} are accepted"
        raise APIError(400, message, param="prompt_logprobs")


def call_ids(request: Request, kind: str) -> tuple[str, str]:
    """Returns two ids of a call.

    The first is the one with which it is answered, made of that of its header. The second is for the engine, and no
    other call has it.

    A client that tries again brings the same id while the first try still runs.
    """
    name = f"{kind}-{request.state.request_id}"
    return name, f"{name}-{secrets.token_hex(4)}"


def json_response(body: Any) -> Response:
    """Returns an answer with a JSON body."""
    return Response(msgspec.json.encode(body), media_type="application/json")


class EventStream(Response):
    """Server-sent events, named by their "type" if they have one.

    Headers wait for the first event, so that an error before it has its own status.
    """

    def __init__(self, events: AsyncGenerator[dict[str, Any]], resources: ExitStack, deadline: float | None):
        """Args: resources: Released when the stream ends, however it does. deadline: On the event loop's clock."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._resources, self._deadline = events, resources, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the reader leaves (ASGI)."""
        with self._resources, contextlib.suppress(ClientDisconnected):
            await _unless_disconnected(receive, self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_event(data: bytes, name: str | None = None) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            head = b"" if name is None else f"event: {name}\n".encode()
            await send({"type": "http.response.body", "body": head + b"data: " + data + b"\n\n", "more_body": True})

        try:
            async with asyncio.timeout_at(self._deadline), contextlib.aclosing(self._events):
                async for event in self._events:
                    await send_event(msgspec.json.encode(event), event.get("type"))
        except (APIError, EngineDeadError, TimeoutError, ValueError) as error:
            failure = as_api_error(error)
            if not started:
                await failure.response()(scope, receive, send)
                return
            await send_event(msgspec.json.encode(failure.body()))
        await send_event(b"[DONE]")
        await send({"type": "http.response.body", "body": b""})


async def _unless_disconnected[T](receive: Callable[[], Awaitable[Message]], work: Coroutine[Any, Any, T]) -> T:
    """Waits for work, and cancels it as soon as the client leaves.

    Raises:
        ClientDisconnected: It has.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


@dataclass
class Usage:
    """Tokens of a call's requests."""

    num_prompt: int = 0
    num_cached: int = 0
    num_generated: int = 0
    _seen: set[str] = field(default_factory=set)

    def add(self, output: RequestOutput) -> None:
        """Counts what an output carries: what is new since the last one, or everything at the end."""
        if output.request_id not in self._seen:
            self._seen.add(output.request_id)
            self.num_prompt += len(output.prompt_token_ids or ())
            self.num_cached += output.num_cached_tokens or 0
        self.num_generated += sum(len(completion.token_ids) for completion in output.outputs)

    def json(self) -> dict[str, Any]:
        """Returns the counts as OpenAI tells them."""
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_generated,
            "total_tokens": self.num_prompt + self.num_generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }


def finite(logprob: float) -> float:
    """Returns a log probability as JSON can tell it."""
    return max(logprob, MIN_LOGPROB)


def prompt_logprobs_json(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """Returns what vLLM adds to answers: of every token of the prompt an object by token id, null for the first."""
    if output.prompt_logprobs is None:
        return None

    def entry(value: Logprob) -> dict[str, Any]:
        return {"logprob": finite(value.logprob), "rank": value.rank, "decoded_token": value.decoded_token}

    return [
        None if position is None else {str(token): entry(value) for token, value in position.items()}
        for position in output.prompt_logprobs
    ]
