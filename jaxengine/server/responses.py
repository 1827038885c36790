"""/v1/responses: conversations as items, with the model's part of them told in typed events.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxengine.engine.async_llm import RequestStream
from jaxengine.engine.inputs import ProcessedInput, Prompt
from jaxengine.messages import quote
from jaxengine.sampling_params import SamplingParams
from jaxengine.server.bounds import BoundedRoute
from jaxengine.server.errors import APIError
from jaxengine.server.generation import Usage, generate, json_response
from jaxengine.server.parsing.answer import Part, Reasoning
from jaxengine.server.parsing.call import Arguments, ToolCall
from jaxengine.server.responses_protocol import ITEMS, ResponsesBody, chat_messages
from jaxengine.server.state import ServerState
from jaxengine.server.structured import form_from
from jaxengine.server.tools import ToolUse, tool_use

router = APIRouter(route_class=BoundedRoute)

Event = dict[str, Any]
_ECHOED = {
    *("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "previous_response_id", "store"),
    *("text", "tool_choice", "tools"),
}
"""Fields of a request that its answer repeats."""


@router.post("/v1/responses")
async def create_response(body: ResponsesBody, request: Request) -> Response:
    """Answers a conversation, which may go on from an earlier answer."""
    server = ServerState.of(request)
    llm = server.llm
    model = server.model_name(body.model)
    earlier: list[Any] = []
    if body.previous_response_id is not None:
        earlier = _stored(request, body.previous_response_id, 400, "previous_response_id")["items"]
    tools = [tool.as_tool() for tool in body.tools]
    parallel, auto = body.parallel_tool_calls, server.settings.enable_auto_tool_choice
    use = tool_use(tools, body.chat_tool_choice(), parallel=parallel, auto=auto)
    params = body.make_params(
        llm.default_sampling_params(), max_tokens=body.max_output_tokens, **server.text_options(use)
    )
    salt = server.cache_salt(request, body.cache_salt)
    call = _Call(body, model, server, params, earlier, use, server.owner(request))

    chat = server.chat_text(
        lambda: chat_messages(body.instructions, [*ITEMS.validate_python(earlier), *body.input]),
        tools=[tool.shown() for tool in use.tools],
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
    )

    def process() -> list[ProcessedInput]:
        prompt = Prompt(text=chat.text(), cache_salt=salt, add_special_tokens=False)
        with form_from("tools" if use.form else body.form_field):
            process_one = llm.input_processor.process_one
            return [process_one(call.id, prompt, params, body.priority, arrival_time=time.time())]

    if body.stream:
        return await generate(request, 1, process, params, chat, events=call.events)
    return await generate(request, 1, process, params, chat, answer=call.answer)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(response_id: str, request: Request) -> Response:
    """Returns an answer that was stored."""
    if request.query_params.get("stream", "false").lower() not in ("false", "0"):
        raise APIError(400, "stream: an answer that was stored is only told whole", param="stream")
    return json_response(_stored(request, response_id, 404, "response_id")["response"])


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> Response:
    """Forgets an answer."""
    _stored(request, response_id, 404, "response_id")
    server = ServerState.of(request)
    server.responses.delete(response_id, owner=server.owner(request))
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> Response:
    """Refuses: only responses in the background could be cancelled, and there are none."""
    _stored(request, response_id, 404, "response_id")
    raise APIError(400, f"response {quote(response_id)} has ended; a running one ends when its client leaves")


def _stored(request: Request, response_id: str, status: int, param: str) -> dict[str, Any]:
    """Returns an answer that the request's key has made; raises APIError of this status if there is none."""
    server = ServerState.of(request)
    found = server.responses.get(response_id, owner=server.owner(request))
    if found is None:
        message = (
            f"{param}: no response {quote(response_id)} is stored here; this server keeps only its latest, in memory"
        )
        code = "previous_response_not_found" if status == 400 else "response_not_found"
        raise APIError(status, message, param=param, code=code)
    return found


class _Call:
    """One call of the endpoint: the response object, as it grows, and the events that tell of it."""

    def __init__(
        self,
        body: ResponsesBody,
        model: str,
        server: ServerState,
        params: SamplingParams,
        earlier: list[Any],
        use: ToolUse,
        owner: str,
    ):
        """Args: earlier: Items of the conversation before those of the body. owner: Whose answer it will be."""
        self.id = f"resp_{uuid.uuid4().hex}"
        self._body, self._server, self._use, self._owner = body, server, use, owner
        self._items = [*earlier, *(item.model_dump(exclude_none=True) for item in body.input)]
        self._num_events = 0
        self._output: list[dict[str, Any]] = []
        self._is_open = False  # the last item of the output may still grow
        self._response: dict[str, Any] = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "output": self._output,
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "temperature": params.temperature,
            "top_p": params.top_p,
            **body.model_dump(include=_ECHOED, by_alias=True),
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
            "background": False,
        }

    async def answer(self, processed: list[ProcessedInput], outputs: RequestStream) -> dict[str, Any]:
        """Returns the whole answer: the response that the last event carries."""
        async for _ in self.events(processed, outputs):
            pass
        return self._response

    async def events(self, processed: list[ProcessedInput], outputs: RequestStream) -> AsyncGenerator[Event]:
        """Yields the events of a stream. Objects in them grow on after the next one is asked for."""
        max_calls = None if self._body.parallel_tool_calls else 1
        parser = self._server.answer_parser(processed[0], self._use, max_calls=max_calls)
        usage, finish_reason = Usage(), None
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)
        async for output in outputs:
            usage.add(output)
            (completion,) = output.outputs
            finish_reason = completion.finish_reason
            for part in parser.feed(completion.text, final=finish_reason is not None):
                for event in self._tell(part):
                    yield event
        if not self._output:
            for event in self._open("message"):
                yield event
        for event in self._close("completed" if finish_reason == "stop" else "incomplete"):
            yield event
        await self._finish(finish_reason, usage)
        yield self._event(f"response.{self._response['status']}", response=self._response)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _tell(self, part: Part) -> Iterator[Event]:
        """Adds a part to the output, in its last item if that goes on or in a new one."""
        if isinstance(part, ToolCall):
            yield from self._close()
            yield from self._open_call(part)
            return
        if isinstance(part, Arguments):
            item = self._output[-1]
            item["arguments"] += part.text
            yield self._item_event("response.function_call_arguments.delta", item_id=item["id"], delta=part.text)
            if part.is_last:
                yield from self._close_call("completed")
            return
        kind, text = ("reasoning", part.text) if isinstance(part, Reasoning) else ("message", part)
        if not self._is_open or self._output[-1]["type"] != kind:
            yield from self._close()
            yield from self._open(kind)
        self._output[-1]["content"][0]["text"] += text
        yield self._text_event("delta", delta=text)

    def _open(self, kind: str) -> Iterator[Event]:
        """Begins an item of text."""
        item: dict[str, Any] = {"type": kind, "id": _new_id(kind), "status": "in_progress", "content": []}
        if kind == "message":
            item["role"] = "assistant"
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item["summary"] = []
            part = {"type": "reasoning_text", "text": ""}
        self._output.append(item)
        self._is_open = True
        yield self._item_event("response.output_item.added", item=item)
        item["content"].append(part)
        yield self._item_event("response.content_part.added", item_id=item["id"], content_index=0, part=part)

    def _open_call(self, call: ToolCall) -> Iterator[Event]:
        """Begins an item of a call."""
        item = {"type": "function_call", "id": _new_id("function_call"), "call_id": call.id, "name": call.name}
        item |= {"arguments": "", "status": "in_progress"}
        self._output.append(item)
        self._is_open = True
        yield self._item_event("response.output_item.added", item=item)

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """Ends the last item if it is open."""
        if not self._is_open:
            return
        item = self._output[-1]
        if item["type"] == "function_call":
            yield from self._close_call("incomplete")  # one that is complete has been closed
            return
        self._is_open = False
        part = item["content"][0]
        yield self._text_event("done", text=part["text"])
        yield self._item_event("response.content_part.done", item_id=item["id"], content_index=0, part=part)
        item["status"] = status
        yield self._item_event("response.output_item.done", item=item)

    def _close_call(self, status: str) -> Iterator[Event]:
        self._is_open = False
        item = self._output[-1]
        done = {"item_id": item["id"], "name": item["name"], "arguments": item["arguments"]}
        yield self._item_event("response.function_call_arguments.done", **done)
        item["status"] = status
        yield self._item_event("response.output_item.done", item=item)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self._output) - 1, **fields)

    def _text_event(self, kind: str, **fields: Any) -> Event:
        """Returns an event about the text of the open item."""
        item = self._output[-1]
        name = item["content"][0]["type"]
        extra = {"logprobs": []} if name == "output_text" else {}
        return self._item_event(f"response.{name}.{kind}", item_id=item["id"], content_index=0, **fields, **extra)

    async def _finish(self, finish_reason: str | None, usage: Usage) -> None:
        """Fills in how the response has ended, and stores it if it is to be."""
        end: dict[str, Any] = {"status": "completed", "completed_at": int(time.time())}
        if finish_reason == "length":
            end = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        elif finish_reason != "stop":
            error = {"code": "server_error", "message": "the server has ended this request"}
            end = {"status": "failed", "error": error}
        thoughts = "".join(item["content"][0]["text"] for item in self._output if item["type"] == "reasoning")
        llm = self._server.llm
        # Which tokens these were is not known; as many as the text has come close.
        tokens = await llm.in_tokenizer_thread(lambda: thoughts and llm.input_processor.tokenize(thoughts))
        end["usage"] = {
            "input_tokens": usage.num_prompt,
            "input_tokens_details": {"cached_tokens": usage.num_cached},
            "output_tokens": usage.num_generated,
            "output_tokens_details": {"reasoning_tokens": len(tokens)},
            "total_tokens": usage.num_prompt + usage.num_generated,
        }
        self._response |= end
        if self._body.store:
            entry = {"response": self._response, "items": [*self._items, *self._output]}
            self._server.responses.put(self.id, entry, owner=self._owner)


def _new_id(kind: str) -> str:
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
    return f"{prefix}_{uuid.uuid4().hex}"
