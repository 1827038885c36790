"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxengine.engine.async_llm import RequestStream
from jaxengine.engine.inputs import ProcessedInput, Prompt
from jaxengine.outputs import CompletionOutput, Logprob, TokenLogprobDict
from jaxengine.server.generation import Usage, call_ids, finite, generate, prompt_logprobs_json
from jaxengine.server.parsing.answer import AnswerParser, Part, Reasoning
from jaxengine.server.parsing.tool_calls import ToolCall
from jaxengine.server.protocol import ChatBody, ToolUse, tool_use
from jaxengine.server.state import ServerState
from jaxengine.server.structured import form_from

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answers a conversation."""
    server = ServerState.of(request)
    llm = server.llm
    model = server.model_name(body.model)
    body.check()
    parallel, auto = body.parallel_tool_calls, server.settings.enable_auto_tool_choice
    use = tool_use(body.tools, body.tool_choice, parallel=parallel, auto=auto)
    params = body.sampling_params(llm.default_sampling_params(), **server.text_options(use))
    call_id, request_id = call_ids(request, "chatcmpl")
    call = _Call(call_id, body, model, server, use)

    def process() -> list[ProcessedInput]:
        shown = [tool.shown() for tool in use.tools]
        text = server.render_chat(body.messages, tools=shown, **body.template_options())
        prompt = Prompt(text=text, cache_salt=body.cache_salt, add_special_tokens=False)
        with form_from("tools" if use.form else body.form_field):
            process_one = llm.input_processor.process_one
            return [process_one(request_id, prompt, params, body.priority, arrival_time=time.time())]

    if body.stream:
        return await generate(request, params.n, process, events=call.events)
    return await generate(request, params.n, process, answer=call.answer)


class _Call:
    """One call of the endpoint, whose answer is made as outputs come."""

    def __init__(self, call_id: str, body: ChatBody, model: str, server: ServerState, use: ToolUse):
        self._body, self._server, self._use = body, server, use
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {"id": call_id, "object": kind, "created": int(time.time()), "model": model}
        self._usage = Usage()

    def _parser(self, processed: list[ProcessedInput]) -> AnswerParser:
        max_calls = None if self._body.parallel_tool_calls else 1
        return self._server.answer_parser(processed[0], self._use, max_calls=max_calls)

    async def answer(self, processed: list[ProcessedInput], outputs: RequestStream) -> dict[str, Any]:
        """The whole answer."""
        (output,) = [output async for output in outputs]
        self._usage.add(output)
        choices = []
        for completion in output.outputs:
            parser = self._parser(processed)
            told = _told(parser.feed(completion.text, final=True))
            message = {"role": "assistant", "content": None if told else ""} | told
            choices.append({"index": completion.index, "message": message} | self._rest(completion, parser))
        body = self._head | {"choices": choices, "usage": self._usage.json()}
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_json(output)
        return body

    async def events(self, processed: list[ProcessedInput], outputs: RequestStream) -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream: for each choice its role, then its reasoning, content and calls."""
        extra = {"usage": None} if self._body.include_usage else {}
        parsers: dict[int, AnswerParser] = {}
        async for output in outputs:
            self._usage.add(output)
            for completion in output.outputs:
                delta = {}
                if completion.index not in parsers:
                    parsers[completion.index] = self._parser(processed)
                    delta = {"role": "assistant", "content": ""}
                parser = parsers[completion.index]
                num_calls = parser.num_calls
                parts = parser.feed(completion.text, final=completion.finish_reason is not None)
                delta |= _told(parts, num_calls)
                choice = {"index": completion.index, "delta": delta} | self._rest(completion, parser)
                if delta or choice["logprobs"] or choice["finish_reason"]:
                    yield self._head | {"choices": [choice]} | extra
        if self._body.include_usage:
            yield self._head | {"choices": [], "usage": self._usage.json()}

    def _rest(self, completion: CompletionOutput, parser: AnswerParser) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs and completion.token_ids:
            content = self._logprobs(completion.token_ids, completion.logprobs or [])
            logprobs = {"content": content, "refusal": None}
        called = parser.num_calls and completion.finish_reason == "stop"
        return {
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if called else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def _logprobs(self, token_ids: Sequence[int], positions: Sequence[TokenLogprobDict]) -> list[dict[str, Any]]:
        num_top = self._body.top_logprobs or 0
        content = []
        for token_id, position in zip(token_ids, positions, strict=True):
            # The chosen token comes first in an engine's output; here they are in order.
            best = sorted(position.values(), key=lambda entry: entry.rank or 0)[:num_top]
            content.append(_entry(position[token_id]) | {"top_logprobs": [_entry(entry) for entry in best]})
        return content


def _entry(value: Logprob) -> dict[str, Any]:
    token = value.decoded_token or ""
    return {"token": token, "logprob": finite(value.logprob), "bytes": list(token.encode("utf-8", "replace"))}


def _told(parts: Sequence[Part], first_index: int | None = None) -> dict[str, Any]:
    """Fields of a message or, with the number of the first call, of a delta that tell what there is of these parts."""
    told: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, ToolCall):
            calls = told.setdefault("tool_calls", [])
            index = {} if first_index is None else {"index": first_index + len(calls)}
            function = {"name": part.name, "arguments": part.arguments}
            calls.append(index | {"id": part.id, "type": "function", "function": function})
        else:
            # vLLM calls reasoning so since 0.12, and had the longer name before.
            names = ("reasoning", "reasoning_content") if isinstance(part, Reasoning) else ("content",)
            text = part.text if isinstance(part, Reasoning) else part
            told |= {name: told.get(name, "") + text for name in names}
    return told
