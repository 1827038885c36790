"""OpenAI's batch format: a file with a call a line in, a file with an answer a line out.

Calls go through the server's own application, without a socket: what it would refuse is refused here.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx
from starlette.types import ASGIApp

from jaxengine.bounded_json import check_shape
from jaxengine.messages import quote, shorten

URLS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class BatchLine:
    """One line of the input.

    Attributes:
        number: Counted from 1.
        custom_id: The caller's name for it; None if it has none.
        url: The endpoint.
        body: What the endpoint is sent.
        error: Why the line is no call; None if it is.
    """

    number: int
    custom_id: str | None = None
    url: str = ""
    body: Any = None
    error: str | None = None

    @property
    def key(self) -> str | int:
        """What tells in an output that the line has been answered."""
        return self.number if self.custom_id is None else self.custom_id


def read_batch(path: Path) -> Iterator[BatchLine]:
    """Yields the lines of an input that are not blank, whatever is wrong with them."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                yield _parse(number, data)


def _parse(number: int, data: bytes) -> BatchLine:
    try:
        check_shape(data)
        call = json.loads(data)
    except ValueError as error:  # of JSON, or of UTF-8
        return BatchLine(number, error=f"no JSON: {shorten(str(error))}")
    if not isinstance(call, dict):
        return BatchLine(number, error="expected a JSON object")
    custom_id = call.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BatchLine(number, error="custom_id: expected a string that is not empty")
    error = None
    if call.get("method") != "POST":
        error = f"method={quote(call.get('method'))}: expected POST"
    elif call.get("url") not in URLS:
        error = f"url={quote(call.get('url'))}: expected {' or '.join(URLS)}"
    elif not isinstance(call.get("body"), dict):
        error = "body: expected a JSON object"
    elif call["body"].get("stream"):
        error = "body: stream: answers of a batch are not streamed"
    return BatchLine(number, custom_id, call.get("url", ""), call.get("body"), error)


def check_batch(path: Path) -> list[str | int]:
    """Reads the whole input once; returns its lines' keys.

    Raises:
        ValueError: A custom_id comes twice, or there is no line.
    """
    places: dict[str | int, int] = {}
    for line in read_batch(path):
        if line.key in places:
            raise ValueError(
                f"{path}: custom_id {quote(line.key)} is on line {places[line.key]} and on line {line.number}"
            )
        places[line.key] = line.number
    if not places:
        raise ValueError(f"{path} has no line")
    return list(places)


def answered(path: Path) -> set[str | int]:
    """Returns the keys of the lines that an output, if there is one, has answers of.

    A last line without its end was being written when a run was cut off: it is removed from the file.

    Raises:
        ValueError: The file is something else.
    """
    if not path.exists():
        return set()
    keys: set[str | int] = set()
    whole = 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                break
            whole += len(data)
            try:
                check_shape(data)
                result = json.loads(data)
                keys.add(result["error"]["line"] if result["custom_id"] is None else result["custom_id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no answer of a batch: give another output") from error
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return keys


async def run_batch(
    app: ASGIApp,
    lines: Iterator[BatchLine],
    output: TextIO,
    *,
    num_at_once: int,
    on_done: Callable[[bool], None],
    is_dead: Callable[[], bool],
) -> None:
    """Answers lines, in the order in which the answers are ready; returns early if the engine dies.

    Args:
        app: The server's application, without keys.
        output: Gains a line for each.
        num_at_once: Lines that are worked on together.
        on_done: Called with whether a line has been answered without an error.
        is_dead: Whether the engine has ended: what was asked meanwhile has no answer, another run may give it.
    """
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:

        async def work() -> None:
            for line in lines:  # shared: each worker takes the next one
                result = await _answer(client, line)
                if is_dead():
                    return
                output.write(json.dumps(result, ensure_ascii=False) + "\n")
                output.flush()
                on_done(result["error"] is None and result["response"]["status_code"] == 200)

        async with asyncio.TaskGroup() as workers:
            for _ in range(num_at_once):
                workers.create_task(work())


async def _answer(client: httpx.AsyncClient, line: BatchLine) -> dict[str, Any]:
    result: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    if line.error is not None:
        error = {"code": "invalid_line", "message": f"line {line.number}: {line.error}", "line": line.number}
        return result | {"response": None, "error": error}
    # ASCII: a body may quote text that is no valid Unicode.
    answer = await client.post(line.url, content=json.dumps(line.body), headers={"Content-Type": "application/json"})
    response = {
        "status_code": answer.status_code,
        "request_id": answer.headers["x-request-id"],
        "body": answer.json(),
    }
    return result | {"response": response, "error": None}
