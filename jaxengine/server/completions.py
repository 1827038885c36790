"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxengine.engine.async_llm import RequestStream
from jaxengine.engine.inputs import ProcessedInput
from jaxengine.outputs import CompletionOutput, RequestOutput, TokenLogprobDict
from jaxengine.server.bounds import BoundedRoute
from jaxengine.server.generation import Usage, call_ids, finite, generate, prompt_logprobs_json
from jaxengine.server.protocol import CompletionBody
from jaxengine.server.state import ServerState
from jaxengine.server.structured import form_from

router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continues one prompt or several."""
    server = ServerState.of(request)
    model = server.model_name(body.model)
    body.check()
    prompts = body.prompts(server.cache_salt(request, body.cache_salt))
    params = body.sampling_params(server.llm.default_sampling_params())
    call_id, request_id = call_ids(request, "cmpl")
    call = _Call(call_id, server, body, model)

    def process() -> list[ProcessedInput]:
        with form_from(body.form_field):
            return server.llm.input_processor.process_batch(
                prompts,
                params,
                request_ids=lambda place: f"{request_id}-{place}",
                priority=body.priority,
                arrival_time=time.time(),
            )

    num_completions = len(prompts) * params.n
    if body.stream:
        return await generate(request, num_completions, process, params, events=call.events)
    return await generate(request, num_completions, process, params, answer=call.answer)


class _Call:
    """One call of the endpoint, whose answer is made as outputs come."""

    def __init__(self, call_id: str, server: ServerState, body: CompletionBody, model: str):
        self._tokenizer = server.llm.tokenizer
        self._body = body
        self._tells_ids = body.return_token_ids or self._tokenizer is None  # else there would be nothing to tell
        self._head = {"id": call_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._usage = Usage()
        self._offsets: dict[int, int] = {}  # characters that a choice has told

    async def answer(self, processed: list[ProcessedInput], outputs: RequestStream) -> dict[str, Any]:
        """Returns the whole answer."""
        places = {item.request_id: place for place, item in enumerate(processed)}
        choices = []
        async for output in outputs:
            choices += self._choices(places[output.request_id], output)
        choices.sort(key=lambda choice: choice["index"])
        return self._head | {"choices": choices, "usage": self._usage_json()}

    async def events(self, processed: list[ProcessedInput], outputs: RequestStream) -> AsyncGenerator[dict[str, Any]]:
        """Yields the events of a stream."""
        places = {item.request_id: place for place, item in enumerate(processed)}
        extra = {"usage": None} if self._body.include_usage else {}
        async for output in outputs:
            for choice in self._choices(places[output.request_id], output):
                if choice["text"] or choice["logprobs"] or choice["finish_reason"] or choice.get("token_ids"):
                    yield self._head | {"choices": [choice]} | extra
        if self._body.include_usage:
            yield self._head | {"choices": [], "usage": self._usage_json()}

    def _choices(self, place: int, output: RequestOutput) -> list[dict[str, Any]]:
        self._usage.add(output)
        return [self._choice(place * self._body.n + c.index, output, c) for c in output.outputs]

    def _choice(self, index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        """Returns what an output adds to a choice; its prompt comes first if it is to be repeated."""
        texts, token_ids, logprobs = [], [], []  # of the prompt too, if that is repeated
        is_first = index not in self._offsets
        if self._body.echo and is_first:
            prompt_ids = output.prompt_token_ids or []
            texts.append(self._prompt_text(output))
            token_ids += prompt_ids
            logprobs += output.prompt_logprobs or []
        if not self._body.prompt_only:
            texts.append(completion.text)
            token_ids += completion.token_ids
            logprobs += completion.logprobs or []
        start = self._offsets.get(index, 0)
        text = "".join(texts)
        self._offsets[index] = start + len(text)
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if self._body.logprobs is not None and token_ids:
            choice["logprobs"], end = self._logprobs(token_ids, logprobs, start)
            self._offsets[index] = end
        choice["finish_reason"] = "length" if self._body.prompt_only else completion.finish_reason
        choice["stop_reason"] = completion.stop_reason
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(output)
        if self._tells_ids:
            choice["token_ids"] = [] if self._body.prompt_only else completion.token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None or self._tokenizer is None:
            return output.prompt or ""
        return self._tokenizer.decode(output.prompt_token_ids)

    def _logprobs(
        self, token_ids: Sequence[int], positions: Sequence[TokenLogprobDict | None], offset: int
    ) -> tuple[dict[str, Any], int]:
        """Returns the log probabilities in the form of completions, and the offset of the text that follows."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:  # nothing comes before the first token of a prompt
                token = "" if self._tokenizer is None else self._tokenizer.decode([token_id])
                values.append(None)
                tops.append(None)
            else:
                token = position[token_id].decoded_token or ""
                values.append(finite(position[token_id].logprob))
                tops.append({entry.decoded_token or "": finite(entry.logprob) for entry in position.values()})
            tokens.append(token)
            offsets.append(offset)
            offset += len(token)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset

    def _usage_json(self) -> dict[str, Any]:
        if self._body.prompt_only:
            self._usage.num_generated = 0
        return self._usage.json()
