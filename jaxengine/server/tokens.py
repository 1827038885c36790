"""/tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxengine.engine.inputs import MAX_TRUNCATION
from jaxengine.server.bounds import BoundedRoute
from jaxengine.server.errors import APIError
from jaxengine.server.generation import json_response
from jaxengine.server.protocol import DetokenizeBody, TokenizeBody
from jaxengine.server.state import ServerState

router = APIRouter(route_class=BoundedRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Returns the token ids of a prompt or of a conversation."""
    server = ServerState.of(request)
    server.model_name(body.model)
    tokenizer = server.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise APIError(400, "prompt: either prompt or messages must be given", param="prompt")

    messages, chat = body.messages, None
    if messages is not None:
        tools = [tool.shown() for tool in body.tools]
        chat = server.chat_text(lambda: messages, tools=tools, **body.template_options())
        await chat.prepare()

    def encode() -> Response:
        text, add_special_tokens = (body.prompt or "", True) if chat is None else (chat.text(), False)
        if body.add_special_tokens is not None:
            add_special_tokens = body.add_special_tokens
        server.llm.input_processor.check_length(text, times=MAX_TRUNCATION)
        tokens = server.llm.input_processor.tokenize(text, add_special_tokens=add_special_tokens)
        answer = {"count": len(tokens), "max_model_len": server.llm.limits.max_model_len, "tokens": tokens}
        if body.return_token_strs:
            answer["token_strs"] = tokenizer.convert_ids_to_tokens(tokens)
        return json_response(answer)

    return await server.llm.in_tokenizer_thread(encode)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Returns the text of token ids."""
    server = ServerState.of(request)
    server.model_name(body.model)
    tokenizer = server.tokenizer
    vocab_size = server.llm.limits.vocab_size
    lowest, highest = min(body.tokens, default=0), max(body.tokens, default=0)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise APIError(400, f"tokens: token ids must be in [0, {vocab_size}), got {wrong}", param="tokens")
    text = await server.llm.in_tokenizer_thread(lambda: tokenizer.decode(body.tokens))
    return json_response({"prompt": text})
