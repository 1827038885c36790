"""The engine behind `LLM`: loads a model, takes requests, steps, and gives outputs. One thread."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.engine.calls import EngineStateError, SyncCalls
from jaxengine.engine.core import EngineCore
from jaxengine.engine.core_metrics import collect_metrics
from jaxengine.engine.front import EngineFront, load_tokenizer
from jaxengine.engine.inputs import ProcessedInput, PromptInput
from jaxengine.engine_args import EngineArgs
from jaxengine.loading.resolve import resolve_model
from jaxengine.metrics import Metric
from jaxengine.outputs import RequestOutput
from jaxengine.runner.weight_update import Weights
from jaxengine.sampling_params import SamplingParams


class LLMEngine(SyncCalls):
    """Continuous batching for one model.

    Attributes:
        config: What `EngineArgs` resolved to.
        checkpoint: Where the model came from.
        tokenizer: None with `skip_tokenizer_init`.
        input_processor: Makes requests of prompts.
        compilations: Counts XLA compilations since the engine was made.
    """

    def __init__(self, args: EngineArgs):
        """Loads the model and starts compiling; returns when a first step can run.

        Raises:
            ValueError: Any argument or file that is wrong.
        """
        # Heavy imports wait until the arguments have been looked at.
        from jaxengine.engine.build import build_core, make_controls
        from jaxengine.runner.compiler import CompilationCounter

        self.args = args
        if args.distributed_executor_backend is not None:
            from jaxengine.sharding.distributed import initialize

            initialize()
        self.compilations = CompilationCounter()
        self.checkpoint = resolve_model(args.model, revision=args.revision, load_format=args.load_format)
        with ThreadPoolExecutor(1) as pool:
            tokenizer = pool.submit(load_tokenizer, args, self.checkpoint)
            self.core: EngineCore = build_core(args, self.checkpoint, tokenizer.result)
            try:
                self.tokenizer = tokenizer.result()
            except BaseException:
                self.core.close()
                raise
        self.config: EngineConfig = self.core.runner.config
        self._controls = make_controls(self.core, args, self.checkpoint)
        self._front = EngineFront(self.core, args, self.checkpoint, self.tokenizer, self.config.limits)
        self.input_processor = self._front.input_processor
        self._num_requests = 0
        self._outputs: list[RequestOutput] = []  # what the next `step` gives out first
        self._closed = False

    def default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (`generation_config.json`), unless `generation_config` says otherwise."""
        return self._front.default_params.clone()

    def next_request_id(self) -> str:
        """Returns an id that has not been returned before."""
        self._num_requests += 1
        return str(self._num_requests - 1)

    def add_request(
        self,
        request_id: str,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        """Queues one prompt.

        Raises:
            ValueError: The prompt or its parameters are wrong; nothing has been queued then.
        """
        self.add_processed(
            self.input_processor.process_one(request_id, prompt, params, priority, arrival_time=time.time())
        )

    def add_processed(self, processed: ProcessedInput) -> None:
        """Queues what `input_processor` made."""
        if self._closed:
            raise RuntimeError("the engine has been shut down")
        self._check_processors(processed.params)
        self._front.add(processed)

    def _check_processors(self, params: SamplingParams) -> None:
        """Traces each logits processor by itself: one that fails must not take a step down with it."""
        if not params.logits_processors:
            return
        import jax
        import jax.numpy as jnp

        from jaxengine.sampling.sampler import LogitsState

        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        vocab = (self.config.model.vocab_size,)
        logits = jax.ShapeDtypeStruct(vocab, jnp.float32)
        state: Any = LogitsState(*(scalar, scalar, jax.ShapeDtypeStruct(vocab, jnp.int32)))  # pyright: ignore[reportArgumentType]
        for processor in params.logits_processors:
            try:
                result = jax.eval_shape(processor, logits, state)
            except Exception as error:  # whatever a user's function may raise
                raise ValueError(f"logits_processors: {processor!r} cannot be traced by JAX: {error}") from error
            if getattr(result, "shape", None) != vocab:
                raise ValueError(f"logits_processors: {processor!r} must return logits {vocab}, got {result}")

    def step(self) -> list[RequestOutput]:
        """Runs one step.

        Returns:
            The outputs with news, according to each request's `output_kind`.

        Raises:
            EngineStateError: The engine sleeps or is paused, and all requests wait for that to end.
        """
        outputs, self._outputs = self._outputs, []
        if not outputs and not self.core.has_work() and self.core.has_unfinished_requests():
            self.check_running()
        return outputs + self._step()

    def _step(self) -> list[RequestOutput]:
        outputs = self._front.take(self.core.step())
        if not self.core.has_unfinished_requests():
            self.core.drain()
        return outputs

    def abort_request(self, request_ids: str | Sequence[str]) -> list[RequestOutput]:
        """Ends requests at once and gives back what they had, with finish reason "abort". Unknown ids are ignored."""
        return self._front.abort([request_ids] if isinstance(request_ids, str) else list(request_ids))

    def has_unfinished_requests(self) -> bool:
        """Whether requests have not ended, or outputs have not been given out."""
        return bool(self._outputs) or self.core.has_unfinished_requests()

    @property
    def unfinished_request_ids(self) -> list[str]:
        """Ids of the callers' requests, oldest first."""
        return self._front.request_ids

    def wait_until_warm(self) -> None:
        """Waits until every step shape is compiled."""
        self.core.runner.programs.wait_until_warm()

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Makes a call of `SyncCalls`, and steps until it is done; outputs come with the next `step`."""
        if self._closed:
            raise RuntimeError("the engine has been shut down")
        running = self._controls.begin(method, args, kwargs or {})
        while True:
            try:
                next(running)
            except StopIteration as end:
                return [end.value]
            self._outputs += self._step()

    def check_running(self) -> None:
        """Raises EngineStateError if requests would only wait, RuntimeError if the engine has been shut down."""
        if self._closed:
            raise RuntimeError("the engine has been shut down")
        if self._controls.is_sleeping():
            raise EngineStateError("the engine sleeps: call wake_up() first")
        if self._controls.is_paused():
            raise EngineStateError("generation is paused: call resume_generation() first")

    def update_weights(self, weights: Weights) -> None:
        """Puts new weights in place of some or all; see `LLM.update_weights`."""
        self.core.update_weights(weights)

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges, by vLLM's names with our prefix."""
        return collect_metrics(self.core, self.compilations.count)

    def shutdown(self) -> None:
        """Ends all requests, the compiler threads, and frees the device. Can be called again."""
        if self._closed:
            return
        self._closed = True
        self._front.workers.close()
        try:
            self.abort_request(self.unfinished_request_ids)
            self.core.drain()
        finally:  # a step that has failed must not keep the device's memory and the threads
            self.core.close()
