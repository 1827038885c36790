"""The front's end of a core in another process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import zmq
import zmq.asyncio

from jaxengine.config import ModelLimits
from jaxengine.engine import wire
from jaxengine.engine.output_processor import SampledUpdate
from jaxengine.engine.socket_folder import SocketFolder
from jaxengine.engine_args import EngineArgs
from jaxengine.metrics import Metric
from jaxengine.request import Request, RequestSpec, RequestStatus

logger = logging.getLogger(__name__)

POLL_MS = 100
FEW_REQUESTS = 8
"""Below so many requests the front is faster than any core, and readers get each step's tokens by themselves."""
MAX_MERGED = 64
"""Messages of the core that are taken at once, beside the one that was waited for."""
SILENT_SECONDS = 5.0
SHUTDOWN_SECONDS = 10.0
"""What a core gets to end by itself."""


class EngineDeadError(RuntimeError):
    """The engine core has ended: nothing runs any more, and only a restart helps."""


class CoreClient:
    """Starts a core process, sends it requests, and gives what it sends back.

    All methods belong to one thread: that of the event loop once `receive` has been called.

    Attributes:
        metrics: The core's, as of its latest step.
    """

    def __init__(self, args: EngineArgs):
        """Starts the process, which loads the model: `wait_ready` waits for it."""
        self.metrics: list[Metric] = []
        self._requests: dict[int, Request] = {}
        self._keys: dict[str, int] = {}
        self._next_key = itertools.count()
        self._calls: dict[int, asyncio.Future] = {}
        self._next_call = itertools.count()
        self._is_ready = self._closed = False
        self._asked: float | None = None  # when a ping was sent that has no answer yet
        self._folder = SocketFolder()
        self._context = zmq.Context()
        self._outbox, self._inbox = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        addresses = {name: f"ipc://{self._folder.path / name}" for name in ("requests", "outputs")}
        try:
            for socket, address in zip((self._outbox, self._inbox), addresses.values(), strict=True):
                socket.set_hwm(0)
                socket.bind(address)
            self._process = _start_process(args, addresses)
        except BaseException:
            self._free()
            raise

    def wait_ready(self) -> ModelLimits:
        """Waits until the model is loaded.

        Raises:
            ValueError: An argument or file is wrong.
            EngineDeadError: The process has failed otherwise.
        """
        while not self._inbox.poll(POLL_MS):
            if self._process.poll() is not None and not self._inbox.poll(POLL_MS):
                raise self._dead_error()
        message = wire.decode_to_front(self._inbox.recv())
        if isinstance(message, wire.Failed):
            raise ValueError(message.message) if message.is_users else EngineDeadError(message.message)
        assert isinstance(message, wire.Ready)
        self._is_ready = True
        return message.limits

    def add_requests(self, spec: RequestSpec, requests: Sequence[Request]) -> None:
        """Sends a request to the core; see `Core.add_requests`."""
        keys = [next(self._next_key) for _ in requests]
        self._send(wire.Add.of(keys, spec))
        for key, request in zip(keys, requests, strict=True):
            self._requests[key] = request
            self._keys[request.request_id] = key

    def finish_request(
        self, request_id: str, status: RequestStatus, stop_reason: int | str | None = None
    ) -> Request | None:
        """Ends a request here and in the core; see `Core.finish_request`."""
        key = self._keys.pop(request_id, None)
        if key is None:
            return None
        request = self._requests.pop(key)
        request.status, request.stop_reason = status, stop_reason
        self._send(wire.Finish(key, status.name))
        return request

    def call(self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> asyncio.Future:
        """Sends a call; returns its result to come. `receive` must run.

        Raises:
            ValueError: An argument cannot be sent.
        """
        message = wire.Call(next(self._next_call), method, list(args), dict(kwargs or {}))
        frames = wire.encode_frames(message)
        result = self._calls[message.id] = asyncio.get_running_loop().create_future()
        if not self._closed:
            with contextlib.suppress(zmq.Again):  # as in `_send`
                self._outbox.send_multipart(frames, zmq.NOBLOCK, copy=False)
        return result

    def fail_calls(self, error: Exception) -> None:
        """Lets all calls fail that have no result yet."""
        calls, self._calls = self._calls, {}
        for result in calls.values():
            if not result.done():
                result.set_exception(error)

    def _finish_call(self, message: wire.Result) -> None:
        result = self._calls.pop(message.id, None)
        if result is None or result.done():  # whoever waited has gone
            return
        try:
            result.set_result(message.get())
        except Exception as error:
            result.set_exception(error)

    async def receive(
        self, take: Callable[[list[SampledUpdate]], None], refuse: Callable[[Request, str], None]
    ) -> EngineDeadError:
        """Hands on what the core sends, until it ends; returns why it has.

        With many requests, steps that have come while the front was busy are handed on together: a front slower than
        the core gives its readers several tokens at once, and does not fall behind.

        Args:
            take: Called with what one step or several gave.
            refuse: Called with a request that cannot run, and the reason.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        threading.Thread(target=self._watch, args=(loop, ended), daemon=True).start()
        socket = zmq.asyncio.Socket.from_socket(self._inbox)
        while True:
            frame = asyncio.ensure_future(socket.recv())
            await asyncio.wait((frame, ended), return_when=asyncio.FIRST_COMPLETED)
            # What a dead process has sent may say why it died: it is read before its end counts.
            if not frame.done() and not (await asyncio.wait((frame,), timeout=POLL_MS / 1000))[0]:
                frame.cancel()
                return self._dead_error()
            updates: list[SampledUpdate] = []
            for message in map(wire.decode_to_front, (frame.result(), *self._waiting_frames())):
                if isinstance(message, wire.Step):
                    is_busy = len(self._requests) >= FEW_REQUESTS
                    self.metrics = message.metrics
                    updates += self._updates(message, refuse)
                    if is_busy:
                        continue
                if isinstance(message, wire.Ping):
                    self._asked = None
                    continue
                take(updates)
                updates = []
                await asyncio.sleep(0)  # readers see what came of this message before the next is taken
                if isinstance(message, wire.Result):
                    self._finish_call(message)
                elif isinstance(message, wire.Refused):
                    request = self._forget(message.key)
                    if request is not None:
                        refuse(request, message.message)
                elif isinstance(message, wire.Failed):
                    return EngineDeadError(f"the engine core has failed: {message.message}")
            take(updates)

    def ask(self) -> float:
        """Asks the core whether it is alive, unless it has been asked; returns for how many seconds it has not said."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            self._send(wire.Ping())
        return now - self._asked

    def _waiting_frames(self) -> Iterator[bytes]:
        """The messages that have come already, up to a number that does not hold up the event loop for long."""
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_MERGED):
                yield self._inbox.recv(zmq.NOBLOCK)

    def kill(self) -> None:
        """Ends the process at once, and leaves nothing of it. May be called from any thread."""
        self._process.kill()
        self._folder.remove()

    def close(self) -> None:
        """Ends the process, by force if it takes too long. Can be called again."""
        if self._closed:
            return
        self._send(wire.Shutdown())
        self._closed = True
        if self._process.poll() is None:
            try:
                # One that still loads its model, or is stuck, would not look at messages for long.
                is_silent = self._asked is not None and time.monotonic() - self._asked > SILENT_SECONDS
                self._process.wait(SHUTDOWN_SECONDS if self._is_ready and not is_silent else 0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._free()

    def _send(self, message: wire.ToCore) -> None:
        if self._closed:
            return
        # Never waits: there is no limit to what may be on its way. It fails if the core is gone, as `receive` tells.
        with contextlib.suppress(zmq.Again):
            self._outbox.send(wire.encode(message), zmq.NOBLOCK)

    def _updates(self, step: wire.Step, refuse: Callable[[Request, str], None]) -> list[SampledUpdate]:
        """What is not of requests that have been ended here meanwhile; one that cannot be read ends its request."""
        updates = []
        for data in step.updates:
            try:
                update = wire.decode_update(data)
                request = self._requests.get(update.key)
                if request is not None:
                    updates.append(update.apply(request))
            except Exception as error:
                logger.exception("an update of the engine core cannot be read")
                key = wire.key_of(data, place=0)
                if key is not None and (failed := self._forget(key)) is not None:
                    self._send(wire.Finish(key, RequestStatus.FINISHED_ERROR.name))
                    refuse(failed, f"what the engine core has sent of this request cannot be read: {error!r}")
                continue
            if request is not None and update.status is not None:
                self._forget(update.key)
        return updates

    def _forget(self, key: int) -> Request | None:
        request = self._requests.pop(key, None)
        if request is not None:
            del self._keys[request.request_id]
        return request

    def _watch(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Future[None]) -> None:
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: ended.done() or ended.set_result(None))

    def _dead_error(self) -> EngineDeadError:
        code = self._process.poll()
        return EngineDeadError(f"the engine core process has ended unexpectedly (exit code {code})")

    def _free(self) -> None:
        self._context.destroy(linger=0)
        self._folder.remove()


def _start_process(args: EngineArgs, addresses: dict[str, str]) -> subprocess.Popen[str]:
    given: dict[str, Any] = {
        "engine_args": {field.name: getattr(args, field.name) for field in dataclasses.fields(args)},
        **addresses,
        "log_level": logging.getLogger("jaxengine").getEffectiveLevel(),
    }
    # The new interpreter must find what this one finds, however it came to.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "jaxengine.engine.core_process"], stdin=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(given) + "\n")
    process.stdin.flush()
    return process
