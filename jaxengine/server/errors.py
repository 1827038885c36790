"""Errors as OpenAI's API tells them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from jaxengine.engine.async_llm import EngineDeadError
from jaxengine.engine.calls import EngineStateError
from jaxengine.messages import MAX_QUOTED, shorten
from jaxengine.workers.pool import WorkerError

logger = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
CLIENT_CLOSED = 499
"""Status of a response that nobody reads any more."""


class APIError(HTTPException):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """Args: status: Of HTTP. param: The field that is wrong. code: A name that programs can look at."""
        super().__init__(status, shorten(message), dict(headers or {}))
        self.param, self.code = None if param is None else shorten(param, MAX_QUOTED), code

    def body(self) -> dict[str, Any]:
        """Returns the JSON object that OpenAI's clients read."""
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Returns the answer that tells the error."""
        # ASCII: a message may quote text that is no valid Unicode.
        return Response(json.dumps(self.body()), self.status_code, self.headers, "application/json")


class ClientDisconnected(Exception):
    """The client has left: nobody reads the answer."""


def as_api_error(error: Exception) -> APIError:
    """Returns what to tell a client of an error; those that are not the client's fault and not expected are logged."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, EngineDeadError):
        return APIError(503, str(error), code="engine_dead")
    if isinstance(error, EngineStateError):
        return APIError(409, str(error), code="wrong_state")
    if isinstance(error, WorkerError):
        return APIError(503, str(error), code="overloaded", headers={"Retry-After": "1"})
    if isinstance(error, TimeoutError):
        return APIError(504, "the request has taken longer than the server allows", code="timeout")
    if isinstance(error, ValueError):
        # Messages about a field begin with its name, after the place of the prompt where there are several.
        found = re.match(r"(?:prompts?(?:\[\d+\])?: )?([a-z][a-z_]*)", str(error))
        return APIError(400, str(error), param=None if found is None else found[1])
    logger.error("an unexpected error", exc_info=error)
    return APIError(500, "an unexpected error; the server's log tells more", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error of an application one of OpenAI's form."""

    def handle(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    def handle_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error).response()

    def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        message = f"{request.method} {shorten(request.url.path, MAX_QUOTED)}: {error.detail}"
        return APIError(error.status_code, message, headers=error.headers).response()

    def handle_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    for kind in (APIError, EngineDeadError, EngineStateError, WorkerError, TimeoutError, ValueError, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(RequestValidationError, handle_validation)
    app.add_exception_handler(StarletteHTTPException, handle_http)
    app.add_exception_handler(ClientDisconnected, handle_disconnect)


def _validation_error(error: RequestValidationError) -> APIError:
    errors = error.errors()
    # Of a field that may be one thing or a list, too long a list says more than that it is not the one thing.
    first = next((found for found in errors if found["type"] == "too_long"), errors[0])
    if first["loc"] == ("body",):
        return APIError(400, "the body must be a JSON object, with the header Content-Type: application/json")
    names = [shorten(str(part), MAX_QUOTED) for part in first["loc"] if part != "body"]
    if first["type"] == "extra_forbidden":
        return APIError(400, f"{names[-1]}: there is no such field", param=names[0], code="unknown_field")
    where = ".".join(names)
    return APIError(400, f"{where}: {first['msg']}", param=names[0] if names else None)
