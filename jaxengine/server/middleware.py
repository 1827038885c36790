"""What every request passes before its endpoint: its id, the key, and the size of its body."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxengine.server.errors import APIError

OPEN_PATHS = ("/", "/health", "/ping", "/metrics")
"""The page, which asks its reader for the key, and what probes ask for, which have none."""


class NameRequests:
    """Gives every call an id, its own (header `X-Request-Id`) if it brings one, and tells it in the answer's header.

    Endpoints find it in `request.state.request_id`.
    """

    _ACCEPTED = re.compile(r"[!-~]{1,200}")  # printable ASCII: it is written to logs

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Names a request, and answers with the name (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if self._ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class RequireKey:
    """Answers 401 to whoever brings no valid key (`Authorization: Bearer KEY`).

    With several keys, what one has made is its own: `request.state.owner` names the key, differently in every process.
    """

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]):
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]
        secret = secrets.token_bytes(32)
        self._owners = {digest: hmac.digest(secret, digest, "sha256").hex() for digest in self._digests}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request with a key pass; answers others 401 (ASGI)."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        digest = self._valid_digest(Headers(scope=scope))
        if digest is not None:
            if len(self._owners) > 1:
                scope.setdefault("state", {})["owner"] = self._owners[digest]
            await self._app(scope, receive, send)
            return
        error = APIError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _valid_digest(self, headers: Headers) -> bytes | None:
        """That of the key that the headers bring; None if they bring none that is valid."""
        kind, _, key = headers.get("authorization", "").partition(" ")
        # Digests are of one length, and all are compared: the time says nothing about a key.
        given = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given if kind.lower() == "bearer" and any(matches) else None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class LimitBody:
    """Answers 413 to a body that is too large, before it is all in memory."""

    def __init__(self, app: ASGIApp, max_body_size: int):
        self._app, self._limit = app, max_body_size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass whose body is not too large; answers others 413 (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            await self._error().response()(scope, receive, send)
            return
        num_received = 0

        async def receive_limited() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._limit:
                raise self._error()
            return message

        await self._app(scope, receive_limited, send)

    def _error(self) -> APIError:
        # What is still to come of the body is not read: the connection cannot be used again.
        message = f"the body is larger than {self._limit} bytes"
        return APIError(413, message, code="body_too_large", headers={"Connection": "close"})
