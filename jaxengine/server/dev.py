"""Endpoints that rule the engine itself, as vLLM has them in its development mode: there with `--enable-dev-endpoints`.

Parameters come in the query, as in `/sleep?level=1`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxengine.messages import quote
from jaxengine.server.errors import APIError
from jaxengine.server.generation import json_response
from jaxengine.server.state import ServerState

router = APIRouter()

MAX_BODY = 2**10
FLAGS = {"true": True, "1": True, "false": False, "0": False}


def flag(name: str, values: list[str]) -> bool:
    """Reads true or false."""
    text = single(name, values)
    if text.lower() not in FLAGS:
        raise APIError(400, f"{name}={quote(text)}: expected true or false", param=name)
    return FLAGS[text.lower()]


def number(name: str, values: list[str]) -> int:
    """Reads a whole number, which the engine checks."""
    text = single(name, values)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise APIError(400, f"{name}={quote(text)}: expected a whole number", param=name)
    return int(text)


def single(name: str, values: list[str]) -> str:
    """Reads what may be given once."""
    if len(values) > 1:
        raise APIError(400, f"{name}={quote(values)}: given {len(values)} times, expected once", param=name)
    return values[0]


def several(name: str, values: list[str]) -> list[str]:
    """Reads what may be given several times."""
    return values


async def parameters(request: Request, **readers: Callable[[str, list[str]], Any]) -> dict[str, Any]:
    """Reads a request's parameters.

    Args:
        request: The call.
        readers: How each parameter is read that is accepted.

    Returns:
        Those that are given.

    Raises:
        APIError: There are others, a value is wrong, or there is a body (400).
    """
    accepted = f"expected {', '.join(readers)}" if readers else "none is accepted"
    found = {}
    for name in request.query_params:
        if name not in readers:
            raise APIError(400, f"{quote(name)}: there is no such parameter; {accepted}", param=name)
        found[name] = readers[name](name, request.query_params.getlist(name))
    body = (await request.body()).strip()
    if body not in (b"", b"{}"):
        given = quote(body[:MAX_BODY].decode(errors="replace"))
        raise APIError(400, f"body={given}: expected none; parameters are given in the query", param="body")
    return found


@router.post("/sleep")
async def sleep(request: Request) -> Response:
    """Frees the device's memory; `level` 0, 1 or 2, `mode` abort, wait or keep."""
    given = await parameters(request, level=number, mode=single)
    await ServerState.of(request).llm.sleep(**given)
    return Response()


@router.post("/wake_up")
async def wake_up(request: Request) -> Response:
    """Takes it back; `tags` weights, kv_cache, or both, which is what none means."""
    given = await parameters(request, tags=several)
    await ServerState.of(request).llm.wake_up(**given)
    return Response()


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> Response:
    """Whether anything is to be woken."""
    await parameters(request)
    return json_response({"is_sleeping": await ServerState.of(request).llm.is_sleeping()})


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forgets all cached prefixes. 409 while requests hold pages, unless `reset_running_requests` says to take them."""
    given = await parameters(request, reset_running_requests=flag, reset_external=flag)
    if given.pop("reset_external", False):
        raise APIError(400, "reset_external=true: there is no external cache, expected false", param="reset_external")
    if not await ServerState.of(request).llm.reset_prefix_cache(**given):
        message = "requests hold pages: wait for them, or give reset_running_requests=true to have them computed anew"
        raise APIError(409, message, code="wrong_state")
    return Response()


@router.post("/pause")
async def pause(request: Request) -> Response:
    """Stops requests; see `SyncCalls.pause_generation`."""
    given = await parameters(request, mode=single, wait_for_inflight_requests=flag, clear_cache=flag)
    await ServerState.of(request).llm.pause_generation(**given)
    return json_response({"status": "paused"})


@router.post("/resume")
async def resume(request: Request) -> Response:
    """Runs requests again."""
    await parameters(request)
    await ServerState.of(request).llm.resume_generation()
    return json_response({"status": "resumed"})


@router.get("/is_paused")
async def is_paused(request: Request) -> Response:
    """Whether generation is paused."""
    await parameters(request)
    return json_response({"is_paused": await ServerState.of(request).llm.is_paused()})


@router.post("/start_profile")
async def start_profile(request: Request) -> Response:
    """Starts JAX's profiler; its trace goes to `--profiler-dir`."""
    await parameters(request)
    await ServerState.of(request).llm.start_profile()
    return Response()


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    """Stops it, and writes the trace."""
    await parameters(request)
    await ServerState.of(request).llm.stop_profile()
    return Response()
