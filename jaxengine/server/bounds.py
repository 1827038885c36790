"""Bounds on bodies: what is looked at before a body is read, and what its fields may hold at most.

They are far from what is asked in earnest. A body beyond one is refused before there is work to do for it, so that no
body of the size that the server accepts holds up the event loop.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, override

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from jaxengine.bounded_json import check_shape
from jaxengine.messages import quote
from jaxengine.server.errors import APIError

SMALL_BODY = 2**16
"""Bytes of a body that is read at once; a larger one is read in another thread."""
MAX_FIELDS = 100
"""Fields of an object whose fields are known."""
MAX_ITEMS = 4096
"""Messages of a conversation, and parts of one."""
MAX_TOOLS = 512
MAX_PROMPTS = 16_384
MAX_STOPS = 1024
MAX_STOP_CHARACTERS = 16_384
"""Of a request's stop strings together."""
MAX_WORDS = 1024
MAX_STOP_TOKENS = 4096
MAX_BIASES = 16_384
MAX_TOKENS = 2**18
"""Token ids of `allowed_token_ids`: as many as the largest vocabularies have."""
MAX_PROMPT_LOGPROBS = 2**18
"""Log probabilities of prompts in a call's answer: a million would take seconds to write, and half a gigabyte."""
MAX_METADATA = 64
MAX_CHOICES = 16_384
MAX_SALT = 1024
"""Characters of `cache_salt`."""


def at_most(number: int) -> Any:
    """Returns a list of at most so many.

    Of a list that is wrong the first error is told, and the rest is not looked at.
    """
    return Field(max_length=number, fail_fast=True)


def first_wrong(types: tuple[type, ...]) -> Callable[[Any], Any]:
    """Makes a validator that leaves of a dict with values of other types only the first: one error is to be told."""

    def only_first(value: Any) -> Any:
        if not isinstance(value, dict) or set(map(type, value.values())) <= set(types):
            return value
        return dict([next(item for item in value.items() if type(item[1]) not in types)])

    return only_first


class Strict(BaseModel):
    """An object of a body: types are taken literally, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, data: Any) -> Any:
        """Each unknown field is an error of its own, of which only one will be told."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise APIError(
                400, f"an object with {len(data)} fields: {MAX_FIELDS} are accepted, as {quote(next(iter(data)))}"
            )
        return data


class BoundedRequest(Request):
    """A request whose body is checked against bounds before it is read, and read without holding up the event loop."""

    async def json(self) -> Any:
        """Returns the body's JSON; a large one is decoded in a thread. Raises APIError for what is out of bounds."""
        data = await self.body()
        return _decode(data) if len(data) <= SMALL_BODY else await asyncio.to_thread(_decode, data)


class BoundedRoute(APIRoute):
    """A route whose endpoint's body is read by `BoundedRequest`."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(BoundedRequest(request.scope, request.receive))

        return handle_bounded


_HALF_PAIR = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")
"""What JSON can say of a surrogate pair without its other half."""


def _decode(data: bytes) -> Any:
    """Reads JSON as RFC 8259 has it: UTF-8, and no NaN.

    Raises:
        APIError: It is none, or beyond a bound.
    """
    try:
        check_shape(data)
    except ValueError as error:
        raise APIError(400, f"the body: {error} are not accepted", code="body_too_large") from error
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        if _HALF_PAIR.search(data):
            raise APIError(400, "the body is not valid Unicode: it has half of a surrogate pair") from error
        raise APIError(400, f"the body is no JSON: {error}") from error
