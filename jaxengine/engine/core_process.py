"""The process in which an engine core runs: started by `CoreClient`, ended by it or with it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import zmq

from jaxengine.engine import wire
from jaxengine.engine.calls import EngineStateError, PauseMode
from jaxengine.engine.core_metrics import collect_metrics
from jaxengine.engine.front import load_tokenizer
from jaxengine.engine.output_processor import SampledUpdate
from jaxengine.engine.weight_transfer import ReceivedWeights
from jaxengine.engine_args import EngineArgs
from jaxengine.loading.resolve import resolve_model
from jaxengine.metrics import Metric
from jaxengine.request import Request, RequestStatus

logger = logging.getLogger(__name__)

NUM_COMPILERS = 2
"""Threads that compile grammars: what one does may take seconds."""
TAKE_SECONDS = 0.05
"""How long requests that come are taken one after the other before those that run have their next step."""
COMPILE_POLL_MS = 1
"""How often an idle core looks whether a grammar is compiled."""


class CoreProcess:
    """Runs steps as long as there are requests, and waits for messages when there are none."""

    def __init__(self, args: EngineArgs, requests: zmq.Socket, outputs: zmq.Socket):
        """Loads the model.

        Args:
            args: Which model, and how.
            requests: Messages of the front come from here.
            outputs: Messages to the front go there.

        Raises:
            ValueError: Any argument or file that is wrong.
        """
        from jaxengine.engine.build import build_core, make_controls
        from jaxengine.runner.compiler import CompilationCounter

        self._compilations = CompilationCounter()
        checkpoint = resolve_model(args.model, revision=args.revision, load_format=args.load_format)
        self._core = build_core(args, checkpoint, lambda: load_tokenizer(args, checkpoint))
        # The first grammar loads the tokenizer, and some take long themselves: steps go on meanwhile.
        self._compiler = ThreadPoolExecutor(NUM_COMPILERS, "jaxengine-grammar")
        self._compiling: dict[int, tuple[Request, Future[Any]]] = {}
        self._controls = make_controls(self._core, args, checkpoint)
        weights = ReceivedWeights()
        self._controls.table |= {
            "receive_weights": weights.receive,
            "discard_weights": weights.discard,
            "update_weights": lambda: self._core.update_weights(weights.take()),
        }
        self._calls: dict[int, tuple[str, Generator[None, None, Any]]] = {}  # those that are under way
        self._inbox, self._outbox = requests, outputs
        self._requests: dict[int, Request] = {}
        self._keys: dict[Request, int] = {}
        self._metrics: list[Metric] = []
        self.limits = self._core.runner.config.limits

    def run(self) -> None:
        """Takes messages and steps, until it is told to end."""
        self._report([])
        try:
            while self._take_messages():
                updates = self._encode(self._core.step()) if self._core.has_work() else []
                if not self._core.has_unfinished_requests():
                    self._core.drain()
                self._report(updates)
                self._advance_calls()
        finally:
            self._compiler.shutdown(cancel_futures=True)
            self._core.close()

    def _report(self, updates: list[msgspec.Raw]) -> None:
        """Tells the front what is new."""
        metrics = collect_metrics(self._core, self._compilations.count)
        if updates or metrics != self._metrics:
            self._metrics = metrics
            self._send(wire.Step(updates, metrics))

    def _encode(self, given: list[SampledUpdate]) -> list[msgspec.Raw]:
        updates = []
        for update in given:
            key = self._keys.get(update.request)
            if key is None:  # ended here, while the step ran
                continue
            try:
                updates.append(msgspec.Raw(wire.encode(wire.Update.of(key, update))))
            except Exception as error:  # whatever it is, it is this request's alone
                self._fail(key, f"an update cannot be sent: {error!r}")
                continue
            if update.finished:
                self._forget(key)
        return updates

    def _fail(self, key: int, message: str) -> None:
        """Ends one request that something is wrong with, and tells the front."""
        logger.error("request %s: %s", self._requests[key].request_id, message)
        self._core.finish_request(self._requests[key].request_id, RequestStatus.FINISHED_ERROR)
        self._forget(key)
        self._send(wire.Refused(key, message))

    def _take_messages(self) -> bool:
        """Takes the messages that are there, for a while, and waits for one if there is nothing else to do.

        Returns:
            False at the end.
        """
        if not self._core.has_work():
            self._inbox.poll(COMPILE_POLL_MS if self._compiling else None)
        end = time.monotonic() + TAKE_SECONDS
        while True:
            try:
                frame = None if time.monotonic() > end else self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                frame = None
            if frame is None:
                self._add_compiled()
                return True
            try:
                message = wire.decode_to_core(frame, self._more_frames())
            except (msgspec.DecodeError, ValueError, TypeError, LookupError) as error:
                self._refuse_unread(frame, error)
                continue
            if isinstance(message, wire.Shutdown):
                return False
            if isinstance(message, wire.Ping):
                self._send(message)
            elif isinstance(message, wire.Add):
                self._add(message)
            elif isinstance(message, wire.Call):
                self._call(message)
            elif self._compiling.pop(message.key, None) is not None:
                continue
            elif (request := self._requests.get(message.key)) is not None:
                self._core.finish_request(request.request_id, RequestStatus[message.status])
                self._forget(message.key)

    def _more_frames(self) -> list[Any]:
        """The rest of a message whose first frame has been taken."""
        frames = []
        while self._inbox.rcvmore:
            frames.append(self._inbox.recv(copy=False).buffer)
        return frames

    def _call(self, message: wire.Call) -> None:
        """Begins a call: most are done with that."""
        try:
            running = self._controls.begin(message.method, message.args, message.kwargs)
        except ValueError as error:
            self._send(wire.Result.of_error(message.id, message.method, error))
            return
        self._calls[message.id] = message.method, running
        was_paused = self._core.pause_mode
        self._advance_calls()
        if self._core.pause_mode is PauseMode.ABORT and was_paused is not PauseMode.ABORT:
            self._abort_compiling()

    def _advance_calls(self) -> None:
        """Goes on with all calls; results follow what they have given to requests."""
        results = []
        for call_id, (method, running) in list(self._calls.items()):
            try:
                next(running)
                continue  # it waits for a step
            except StopIteration as end:
                results.append(wire.Result(call_id, end.value))
            except Exception as error:  # whatever it is, it is this call's alone
                if not isinstance(error, ValueError | EngineStateError):
                    logger.exception("%s has failed", method)
                results.append(wire.Result.of_error(call_id, method, error))
            del self._calls[call_id]
        if results:
            self._report(self._encode(self._core.take_settled()))
        for result in results:
            self._send(result)

    def _abort_compiling(self) -> None:
        """Ends the requests whose grammars are not compiled yet: they have come before the pause."""
        updates = []
        for key, (request, _) in self._compiling.items():
            request.status = RequestStatus.FINISHED_ABORTED
            updates.append(msgspec.Raw(wire.encode(wire.Update.of(key, SampledUpdate(request, [], True)))))
        self._report(updates)
        self._compiling.clear()

    def _refuse_unread(self, frame: bytes, error: Exception) -> None:
        """Refuses the request or call that a message is about which cannot be read."""
        logger.error("a message cannot be read: %s", error)
        call_id = wire.call_id_of(frame)
        if call_id is not None:
            self._send(wire.Result(call_id, error=("value", f"the call cannot be read by the engine core: {error}")))
            return
        key = wire.key_of(frame, place=1)  # after the message's tag
        if key is not None:
            self._send(wire.Refused(key, f"the request cannot be read by the engine core: {error}"))

    def _add(self, message: wire.Add) -> None:
        try:
            requests = message.requests()
        except (ValueError, TypeError, OverflowError) as error:
            self._send(wire.Refused(message.keys[0], str(error)))  # of one completion, which is of all of them
            return
        for key, request in zip(message.keys, requests, strict=True):
            if request.grammar is None:
                self._queue(key, request)
            else:
                compiling = self._compiler.submit(self._core.grammars.compile, request.grammar)
                self._compiling[key] = request, compiling

    def _add_compiled(self) -> None:
        """Queues the requests whose grammars have been compiled."""
        for key, (request, compiling) in list(self._compiling.items()):
            if compiling.done():
                del self._compiling[key]
                error = compiling.exception()
                if error is None:
                    self._queue(key, request)
                else:  # the front has compiled it, so this is no wrong grammar
                    self._send(wire.Refused(key, f"structured_outputs: {error}"))

    def _queue(self, key: int, request: Request) -> None:
        try:
            self._core.add_request(request)
        except (ValueError, TypeError, OverflowError) as error:
            self._send(wire.Refused(key, str(error)))
        else:
            self._requests[key] = request
            self._keys[request] = key

    def _forget(self, key: int) -> None:
        del self._keys[self._requests.pop(key)]

    def _send(self, message: Any) -> None:
        self._outbox.send(wire.encode(message))


def main() -> int:
    """Runs the process; its arguments are one line of JSON on stdin, which stays open as long as its parent lives."""
    # Whoever ends the server by a signal to all of its processes means the parent, which lets requests finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    given = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("jaxengine").setLevel(given["log_level"])
    context = zmq.Context()
    requests, outputs = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, address in ((requests, given["requests"]), (outputs, given["outputs"])):
        socket.set_hwm(0)  # a step never waits for a slow front
        socket.connect(address)
    failure = None
    try:
        process = CoreProcess(EngineArgs(**given["engine_args"]), requests, outputs)
        outputs.send(wire.encode(wire.Ready(process.limits)))
        process.run()
    except Exception as error:
        is_users = isinstance(error, ValueError | OSError)
        if not is_users or given["log_level"] <= logging.DEBUG:
            logger.exception("the engine core has failed")
        failure = wire.Failed(str(error) if is_users else f"{type(error).__name__}: {error}", is_users)
        outputs.send(wire.encode(failure))
    context.destroy(linger=1000)
    return 0 if failure is None else 1


def _end_with_parent() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
