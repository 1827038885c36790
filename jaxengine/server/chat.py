"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxengine.engine.async_llm import RequestStream
from jaxengine.engine.chat import render_chat
from jaxengine.engine.inputs import ProcessedInput, Prompt
from jaxengine.outputs import CompletionOutput, Logprob, TokenLogprobDict
from jaxengine.server.generation import Usage, call_ids, finite, generate, prompt_logprobs_json
from jaxengine.server.protocol import ChatBody
from jaxengine.server.state import ServerState

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answers a conversation."""
    server = ServerState.of(request)
    llm = server.llm
    model = server.model_name(body.model)
    body.check()
    params = body.sampling_params(llm.default_sampling_params())
    call_id, request_id = call_ids(request, "chatcmpl")
    call = _Call(call_id, body, model)

    def process() -> list[ProcessedInput]:
        if llm.tokenizer is None:
            raise ValueError("messages: this server has no tokenizer")
        text = render_chat(llm.tokenizer, body.messages, **body.template_options())
        prompt = Prompt(text=text, cache_salt=body.cache_salt, add_special_tokens=False)
        process_one = llm.input_processor.process_one
        return [process_one(request_id, prompt, params, body.priority, arrival_time=time.time())]

    if body.stream:
        return await generate(request, params.n, process, events=call.events)
    return await generate(request, params.n, process, answer=call.answer)


class _Call:
    """One call of the endpoint, whose answer is made as outputs come."""

    def __init__(self, call_id: str, body: ChatBody, model: str):
        self._body = body
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = {"id": call_id, "object": kind, "created": int(time.time()), "model": model}
        self._usage = Usage()

    async def answer(self, processed: list[ProcessedInput], outputs: RequestStream) -> dict[str, Any]:
        """The whole answer."""
        (output,) = [output async for output in outputs]
        self._usage.add(output)
        choices = []
        for completion in output.outputs:
            message = {"role": "assistant", "content": completion.text}
            choices.append({"index": completion.index, "message": message} | self._rest(completion))
        body = self._head | {"choices": choices, "usage": self._usage.json()}
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs_json(output)
        return body

    async def events(self, processed: list[ProcessedInput], outputs: RequestStream) -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream: for each choice its role, then its text."""
        extra = {"usage": None} if self._body.include_usage else {}
        started = set()
        async for output in outputs:
            self._usage.add(output)
            for completion in output.outputs:
                delta: dict[str, Any] = {"content": completion.text}
                if completion.index not in started:
                    started.add(completion.index)
                    delta = {"role": "assistant", **delta}
                elif not completion.text:
                    delta = {}
                choice = {"index": completion.index, "delta": delta} | self._rest(completion)
                if delta or choice["logprobs"] or choice["finish_reason"]:
                    yield self._head | {"choices": [choice]} | extra
        if self._body.include_usage:
            yield self._head | {"choices": [], "usage": self._usage.json()}

    def _rest(self, completion: CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs and completion.token_ids:
            content = self._logprobs(completion.token_ids, completion.logprobs or [])
            logprobs = {"content": content, "refusal": None}
        return {
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
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
