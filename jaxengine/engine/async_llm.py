"""`AsyncLLM`: streaming generation for many callers at once, with the engine core in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from jaxengine.engine.calls import AsyncCalls
from jaxengine.engine.core_client import CoreClient, EngineDeadError
from jaxengine.engine.front import EngineFront, load_tokenizer
from jaxengine.engine.inputs import ProcessedInput, PromptInput
from jaxengine.engine.output_processor import SampledUpdate
from jaxengine.engine.weight_transfer import pieces
from jaxengine.engine_args import EngineArgs
from jaxengine.host_memory import release_free_memory
from jaxengine.loading.resolve import resolve_model
from jaxengine.metrics import Metric
from jaxengine.outputs import RequestOutput
from jaxengine.request import Request
from jaxengine.sampling_params import RequestOutputKind, SamplingParams

ASK_SECONDS = 1.0
RELEASE_EVERY = 5

__all__ = ["AsyncLLM", "EngineDeadError", "RequestStream"]


class RequestStream:
    """The outputs of some requests, as they come; what a slow reader has not read yet is merged.

    An asynchronous iterator. Whoever does not read to the end calls `close`.
    """

    def __init__(self, kinds: dict[str, RequestOutputKind], abort: Callable[[Sequence[str]], Any]):
        """Args: kinds: What outputs carry, by request id. abort: Ends requests."""
        self._kinds = kinds
        self._unfinished = set(kinds)
        self._pending: dict[str, RequestOutput] = {}
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._abort = abort

    def put(self, output: RequestOutput) -> None:
        """Adds an output."""
        waiting = self._pending.get(output.request_id)
        if waiting is None:
            self._pending[output.request_id] = output
        else:
            waiting.add(output, aggregate=self._kinds[output.request_id] is RequestOutputKind.DELTA)
        if output.finished:
            self._unfinished.discard(output.request_id)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error, once what has come before is read."""
        self._error = error
        self._news.set()

    def close(self) -> None:
        """Ends at once the requests that have not finished."""
        self._abort(list(self._unfinished))
        self._unfinished.clear()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._pending.pop(next(iter(self._pending)))


class AsyncLLM(AsyncCalls):
    """A model, ready to generate for callers of one event loop.

    Usable as a context manager; `shutdown()` ends the core's process.

    Attributes:
        limits: What bounds requests.
        tokenizer: None with `skip_tokenizer_init`.
        input_processor: Checks and tokenises prompts, for callers that want to do so before they `submit`.
        stats: Times and ends of requests.
        dead_error: Why nothing runs any more; None while the engine lives.
        on_death: Called once with `dead_error`.
    """

    def __init__(self, args: EngineArgs):
        """Starts the core's process and loads the model; returns when a first step can run.

        Raises:
            ValueError: Any argument or file that is wrong.
            EngineDeadError: The process has failed for another reason.
        """
        if args.distributed_executor_backend is not None:
            raise ValueError("distributed_executor_backend: requests arrive in one process only; use LLM")
        if args.logits_processors:
            raise ValueError("logits_processors: functions cannot be sent to another process; use LLM")
        checkpoint = resolve_model(args.model, revision=args.revision, load_format=args.load_format)
        self._client = CoreClient(args)
        try:
            self.tokenizer = load_tokenizer(args, checkpoint)
            self.limits = self._client.wait_ready()
        except BaseException:
            self._client.close()
            raise
        self.dead_error: EngineDeadError | None = None
        self.on_death: Callable[[EngineDeadError], None] | None = None
        self._front = EngineFront(self._client, args, checkpoint, self.tokenizer, self.limits)
        self.input_processor = self._front.input_processor
        self.stats = self._front.stats
        self._streams: dict[str, RequestStream] = {}
        self._receiver: asyncio.Task[None] | None = None
        self._asker: asyncio.Task[None] | None = None
        self._silence = 0.0
        self._updating_weights = asyncio.Lock()
        # One thread: prompts are tokenised in turn, while outputs go on.
        self._tokenizing = ThreadPoolExecutor(1, "jaxengine-tokenize")
        self._forms = ThreadPoolExecutor(1, "jaxengine-forms")

    def default_sampling_params(self) -> SamplingParams:
        """What requests without parameters use: the model's own defaults."""
        return self._front.default_params.clone()

    def start(self) -> None:
        """Begins to listen to the core, in the running event loop, so that its death is noticed; `submit` does so too.

        Can be called again.
        """
        if self._receiver is None:
            loop = asyncio.get_running_loop()
            self._receiver = loop.create_task(self._receive())
            self._asker = loop.create_task(self._ask())
            if self.tokenizer is not None:
                self._front.workers.start()

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Continues a prompt. Leaving the iterator, or cancelling the task that reads it, ends the request at once.

        Args:
            prompt: A text, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}`.
            sampling_params: `output_kind` says what the outputs carry; None takes the model's defaults.
            request_id: Unique among unfinished requests.
            priority: Lower runs first under the "priority" policy.

        Yields:
            Outputs, the last of them with `finished`; outputs that a slow reader has missed are merged into one.

        Raises:
            ValueError: The prompt or its parameters are wrong.
            EngineDeadError: The engine core has ended.
        """
        await self.look_at_form(sampling_params)
        process = self.input_processor.process_one
        processed = await self.in_tokenizer_thread(
            lambda: process(request_id, prompt, sampling_params, priority, arrival_time=time.time())
        )
        stream = self.submit([processed])
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def look_at_form(self, params: SamplingParams | None) -> None:
        """Waits until a worker has looked at the form that outputs must have, which then holds up nobody else.

        What is wrong with it is told by `input_processor`.

        Raises:
            WorkerError: No worker can look at it.
        """
        if params is None or params.structured_outputs is None or self.tokenizer is None:
            return
        begin, form = self._front.grammars.begin, params.structured_outputs
        try:
            looking = await asyncio.get_running_loop().run_in_executor(self._forms, begin, form)
        except ValueError:
            return
        if looking is not None:
            await asyncio.wait([asyncio.wrap_future(looking)])

    async def run_job(self, **job: Any) -> Any:
        """Has a worker process do a job, see `WorkerPool`.

        Raises:
            ValueError: What is wrong with it.
            WorkerError: No worker can do it.
        """
        return await asyncio.wrap_future(self._front.workers.submit(**job))

    async def in_tokenizer_thread[R](self, function: Callable[[], R]) -> R:
        """Calls a function that may take long and uses the tokenizer, without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)

    def submit(self, processed: Sequence[ProcessedInput]) -> RequestStream:
        """Queues requests that `input_processor` made: all of them or, if one is refused, none.

        Raises:
            ValueError: An id is in use.
            EngineDeadError: The engine core has ended.
        """
        self.check_health()
        self.start()
        for item in processed:
            if item.params.logits_processors:
                raise ValueError("logits_processors: functions cannot be sent to another process; use LLM")
        added: list[str] = []
        try:
            for item in processed:
                self._front.add(item)
                added.append(item.request_id)
        except BaseException:
            self._front.abort(added)
            raise
        stream = RequestStream({item.request_id: item.params.output_kind for item in processed}, self._drop)
        self._streams |= dict.fromkeys(added, stream)
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request at once; its stream ends with what it had and finish reason "abort". May be unknown."""
        self._deliver(self._front.abort([request_id]))

    def abort_all(self) -> None:
        """Ends all requests as `abort` does."""
        self._deliver(self._front.abort(self._front.request_ids))

    async def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Makes a call of `SyncCalls` by its name; returns a list with its result. See there."""
        self.check_health()
        self.start()
        return [await self._client.call(method, args, kwargs)]

    async def update_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Puts new weights in place of some or all, and forgets all cached prefixes; see `LLM.update_weights`.

        They are sent in pieces, and the core puts them in place when all have come. No request may run: pause first.
        Requests that a pause keeps go on with the new weights.

        Args:
            weights: Names as in the checkpoint, and NumPy or JAX arrays. Taken from it as they are sent, in a thread.

        Raises:
            ValueError: Names or shapes are not the model's; nothing has been changed.
            EngineStateError: The weights sleep, or requests run.
            EngineDeadError: The engine core has ended.
        """
        async with self._updating_weights:
            parts = pieces(weights)
            try:
                while (piece := await asyncio.to_thread(next, parts, None)) is not None:
                    names, arrays = zip(*piece, strict=True)
                    await self.collective_rpc("receive_weights", (names, arrays))
                await self.collective_rpc("update_weights")
            except BaseException:
                if self.dead_error is None:
                    self._client.call("discard_weights").add_done_callback(lambda done: done.exception())
                raise

    @property
    def num_unfinished_requests(self) -> int:
        """Requests whose streams have not ended."""
        return len(self._streams)

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine core has ended."""
        if self.dead_error is not None:
            raise EngineDeadError(str(self.dead_error)) from self.dead_error

    def check_alive(self, max_silence: float) -> None:
        """Checks that the core answers and that workers can be started, as of the last second.

        Args:
            max_silence: Seconds that the core may take to answer: a long step, or one that is compiled first.

        Raises:
            EngineDeadError: The engine core has ended, or does not answer.
            WorkerError: There are no workers.
        """
        self.check_health()
        self._front.workers.check()
        if self._silence > max_silence:
            raise EngineDeadError(f"the engine core has not answered for {self._silence:.0f} s")

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges of the core, as of its latest step."""
        return self._client.metrics

    def shutdown(self) -> None:
        """Ends everything; streams that are still read fail. Can be called again."""
        self._fail(EngineDeadError("the engine has been shut down"))
        for task in (self._receiver, self._asker):
            if task is not None:
                task.cancel()
        self._front.workers.close()
        self._client.close()
        for pool in (self._tokenizing, self._forms):
            pool.shutdown(wait=False, cancel_futures=True)

    def stop_workers(self) -> None:
        """Fails what worker processes look at, and all that they would be asked."""
        self._front.workers.close()

    def kill(self) -> None:
        """Ends the other processes at once, from any thread; this engine is of no use any more."""
        self._front.workers.close()
        self._client.kill()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _drop(self, request_ids: Sequence[str]) -> None:
        """Ends requests whose outputs nobody reads any more."""
        self._front.abort(request_ids)
        for request_id in request_ids:
            self._streams.pop(request_id, None)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                stream.put(output)
                if output.finished:
                    del self._streams[output.request_id]

    async def _ask(self) -> None:
        """Asks the core every second whether it is alive; gives memory back that large requests have freed."""
        for number in itertools.count(1):
            self._silence = self._client.ask()
            await asyncio.sleep(ASK_SECONDS)
            if number % RELEASE_EVERY == 0:
                await asyncio.get_running_loop().run_in_executor(self._forms, release_free_memory)

    async def _receive(self) -> None:
        try:
            error = await self._client.receive(self._take, self._refuse)
        except Exception as failure:  # nothing would be delivered any more
            error = EngineDeadError(f"receiving from the engine core has failed: {failure!r}")
        self._fail(error)
        if self.on_death is not None:
            self.on_death(error)

    def _take(self, updates: list[SampledUpdate]) -> None:
        self._deliver(self._front.take(updates))

    def _refuse(self, request: Request, message: str) -> None:
        """Fails the whole request of whose completions one cannot run."""
        request_id = self._front.parent_id(request.request_id)
        stream = self._streams.get(request_id or "")
        if request_id is not None and stream is not None:
            stream.fail(ValueError(message))
            self._drop([request_id])

    def _fail(self, error: EngineDeadError) -> None:
        if self.dead_error is None:
            self.dead_error = error
            self._client.fail_calls(error)
            for stream in set(self._streams.values()):
                stream.fail(error)
            self._streams.clear()
