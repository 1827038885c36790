"""Runs the application on a socket until a signal, or the death of the engine, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn

from jaxengine.engine.async_llm import AsyncLLM, EngineDeadError
from jaxengine.server.app import make_app
from jaxengine.server.http import bounded_protocol, max_connections
from jaxengine.server.state import ServerSettings

logger = logging.getLogger(__name__)

DEATH_NOTICE_SECONDS = 2.0
"""How long the server tells everybody that its engine is dead before it ends."""
CUT_SECONDS = 1.0
"""How long, of the time to end in, answers that were cut get to reach their readers."""
LATE_SECONDS = 0.5
"""After the time to end in the process is ended by force."""


def bind(host: str, port: int) -> socket.socket:
    """Takes an address, without listening yet: it is found out early that it is not free.

    Raises:
        OSError: It is not, or there is no such address.
        ValueError: There is no such port.
    """
    if not 0 <= port < 2**16:  # else another one would be taken without a word
        raise ValueError(f"port={port}: must be from 0 (a free one) to {2**16 - 1}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"host={host!r}: {error.strerror}") from error
    family, _, _, _, address = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise OSError(f"host={host!r}, port={port}: {error.strerror}") from error
    return sock


def run_server(
    llm: AsyncLLM,
    settings: ServerSettings,
    sock: socket.socket,
    *,
    uvicorn_log_level: str = "error",
    ends_process: bool = False,
) -> int:
    """Serves until it is told to end.

    SIGTERM and SIGINT close the socket; requests in flight may finish until `settings.shutdown_timeout`, and then end
    with what they have and finish reason "abort". A second signal does not wait.

    Args:
        uvicorn_log_level: Of the HTTP server; from "info" on it logs every call.
        ends_process: End the whole process if something that cannot be interrupted outlasts the shutdown.

    Returns:
        The exit code: 0, or 1 if the engine has died.
    """
    tracer = None
    if settings.otlp_traces_endpoint is not None:
        from jaxengine.server.tracing import RequestTracer

        tracer = RequestTracer.to_collector(settings.otlp_traces_endpoint, settings.served_model_names[0])
    config = uvicorn.Config(
        make_app(llm, settings, tracer),
        log_config=None,
        log_level=uvicorn_log_level,
        lifespan="off",
        http=bounded_protocol(settings.max_body_size, max_connections()),
        ws="none",
        timeout_graceful_shutdown=max(round(settings.shutdown_timeout), 1),
    )
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            return runner.run(_serve(_Server(config), llm, settings, sock, ends_process))
    finally:
        if tracer is not None:
            tracer.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `_serve` has its own


async def _serve(
    server: _Server, llm: AsyncLLM, settings: ServerSettings, sock: socket.socket, ends_process: bool
) -> int:
    loop = asyncio.get_running_loop()

    def cut() -> None:
        llm.stop_workers()
        llm.abort_all()

    def end() -> None:
        if server.should_exit:
            server.force_exit = True
            cut()
        if ends_process and not server.should_exit:
            seconds = settings.shutdown_timeout + LATE_SECONDS
            threading.Thread(target=_end_process, args=(llm, seconds), daemon=True).start()
        server.should_exit = True
        loop.call_later(max(settings.shutdown_timeout - CUT_SECONDS, 0.0), cut)

    def die(error: EngineDeadError) -> None:
        logger.error("%s; the server ends", error)
        loop.call_later(DEATH_NOTICE_SECONDS, end)

    def ask_to_end(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the end is under way
            loop.call_soon_threadsafe(end)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_end)
    llm.on_death = die
    llm.start()
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(settings.served_model_names)
    await _listen(server, sock, f"serving {names} on http://{shown}:{port}")
    return 0 if llm.dead_error is None else 1


def _end_process(llm: AsyncLLM, seconds: float) -> None:
    """Ends the process after so many seconds, if it has not ended by itself."""
    code = 0 if llm.dead_error is None else 1
    time.sleep(seconds)
    logger.error("ended by force: something has outlasted the shutdown")
    llm.kill()
    os._exit(code)


async def _listen(server: _Server, sock: socket.socket, message: str) -> None:
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        print(message, file=sys.stderr, flush=True)
    await serving
