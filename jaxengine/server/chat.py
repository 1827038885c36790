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
from jaxengine.server.bounds import BoundedRoute
from jaxengine.server.generation import Usage, call_ids, finite, generate, prompt_logprobs_json
from jaxengine.server.parsing.answer import AnswerParser, Part, Reasoning
from jaxengine.server.parsing.call import Arguments, ToolCall
from jaxengine.server.protocol import ChatBody
from jaxengine.server.state import ServerState
from jaxengine.server.structured import form_from
from jaxengine.server.tools import ToolUse, tool_use

router = APIRouter(route_class=BoundedRoute)


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
    salt = server.cache_salt(request, body.cache_salt)
    call_id, request_id = call_ids(request, "chatcmpl")
    call = _Call(call_id, body, model, server, use)

    shown = [tool.shown() for tool in use.tools]
    chat = server.chat_text(lambda: body.messages, tools=shown, **body.template_options())

    def process() -> list[ProcessedInput]:
        prompt = Prompt(text=chat.text(), cache_salt=salt, add_special_tokens=False)
        with form_from("tools" if use.form else body.form_field):
            process_one = llm.input_processor.process_one
            return [process_one(request_id, prompt, params, body.priority, arrival_time=time.time())]

    if body.stream:
        return await generate(request, params.n, process, params, chat, events=call.events)
    return await generate(request, params.n, process, params, chat, answer=call.answer)


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
        """Returns the whole answer."""
        (output,) = [output async for output in outputs]
        self._usage.add(output)
        choices = []
        for completion in output.outputs:
            parser = self._parser(processed)
            told: dict[str, Any] = {}
            for part in parser.feed(completion.text, final=True):
                _tell(told, part)
            message = {"role": "assistant", "content": None if told else ""} | told
            choices.append({"index": completion.index, "message": message} | self._rest(completion, parser))
        body = self._head | {"choices": choices, "usage": self._usage.json()}
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_json(output)
        if self._body.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
        return body

    async def events(self, processed: list[ProcessedInput], outputs: RequestStream) -> AsyncGenerator[dict[str, Any]]:
        """Yields the events of a stream: for each choice its role, then its reasoning, content and calls."""
        extra = {"usage": None} if self._body.include_usage else {}
        parsers: dict[int, AnswerParser] = {}
        prompt: dict[str, Any] = {}
        async for output in outputs:
            if not parsers and self._body.return_token_ids:
                prompt = {"prompt_token_ids": output.prompt_token_ids}
            self._usage.add(output)
            for completion in output.outputs:
                deltas: list[dict[str, Any]] = []
                if completion.index not in parsers:
                    parsers[completion.index] = self._parser(processed)
                    deltas.append({"role": "assistant", "content": ""})
                parser = parsers[completion.index]
                deltas += _deltas(parser, completion)
                rest = self._rest(completion, parser)
                if not deltas and (rest["logprobs"] or rest["finish_reason"] or rest.get("token_ids")):
                    deltas.append({})
                for i, delta in enumerate(deltas):
                    end = rest if i == len(deltas) - 1 else dict.fromkeys(rest)
                    choice = {"index": completion.index, "delta": delta} | end
                    yield self._head | {"choices": [choice]} | extra | prompt
                    prompt = {}
        if self._body.include_usage:
            yield self._head | {"choices": [], "usage": self._usage.json()}

    def _rest(self, completion: CompletionOutput, parser: AnswerParser) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs and completion.token_ids:
            content = self._logprobs(completion.token_ids, completion.logprobs or [])
            logprobs = {"content": content, "refusal": None}
        called = parser.num_calls and completion.finish_reason == "stop"
        rest = {
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if called else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        return rest | ({"token_ids": completion.token_ids} if self._body.return_token_ids else {})

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


def _tell(told: dict[str, Any], part: Part) -> None:
    """Adds a part to the fields of a message."""
    if isinstance(part, ToolCall):
        call = {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
        told.setdefault("tool_calls", []).append(call)
    elif isinstance(part, Arguments):
        told["tool_calls"][-1]["function"]["arguments"] += part.text
    else:
        # vLLM calls reasoning so since 0.12, and had the longer name before.
        names = ("reasoning", "reasoning_content") if isinstance(part, Reasoning) else ("content",)
        text = part.text if isinstance(part, Reasoning) else part
        told |= {name: told.get(name, "") + text for name in names}


def _deltas(parser: AnswerParser, completion: CompletionOutput) -> list[dict[str, Any]]:
    """Returns what a piece of a completion adds to its message.

    There is one delta for the text, and one for each piece of a call.
    """
    deltas: list[dict[str, Any]] = []
    index = parser.num_calls - 1
    for part in parser.feed(completion.text, final=completion.finish_reason is not None):
        if isinstance(part, Arguments):
            deltas.append({"tool_calls": [{"index": index, "function": {"arguments": part.text}}]})
            continue
        if isinstance(part, ToolCall) or not deltas or "tool_calls" in deltas[-1]:
            deltas.append({})
        _tell(deltas[-1], part)
        if isinstance(part, ToolCall):
            index += 1
            deltas[-1]["tool_calls"][0] |= {"index": index}
    return deltas
