"""/tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxengine.server.errors import APIError
from jaxengine.server.generation import json_response
from jaxengine.server.protocol import DetokenizeBody, TokenizeBody
from jaxengine.server.state import ServerState

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """The token ids of a prompt or of a conversation."""
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

    def encode() -> list[int]:
        text, add_special_tokens = (body.prompt or "", True) if chat is None else (chat.text(), False)
        if body.add_special_tokens is not None:
            add_special_tokens = body.add_special_tokens
        return server.llm.input_processor.tokenize(text, add_special_tokens=add_special_tokens)

    tokens = await server.llm.in_tokenizer_thread(encode)
    answer = {"count": len(tokens), "max_model_len": server.llm.limits.max_model_len, "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = tokenizer.convert_ids_to_tokens(tokens)
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """The text of token ids."""
    server = ServerState.of(request)
    server.model_name(body.model)
    tokenizer = server.tokenizer
    vocab_size = server.llm.limits.vocab_size
    wrong = [token for token in body.tokens if not 0 <= token < vocab_size]
    if wrong:
        raise APIError(400, f"tokens: token ids must be in [0, {vocab_size}), got {wrong[0]}", param="tokens")
    text = await server.llm.in_tokenizer_thread(lambda: tokenizer.decode(body.tokens))
    return json_response({"prompt": text})
