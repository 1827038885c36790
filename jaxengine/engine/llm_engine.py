"""The engine behind `LLM`: loads a model, takes requests, steps, and gives outputs. One thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxengine.config import EngineConfig
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


class LLMEngine:
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
        from jaxengine.engine.build import build_core
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
        self._front = EngineFront(self.core, args, self.checkpoint, self.tokenizer, self.config.limits)
        self.input_processor = self._front.input_processor
        self._num_requests = 0
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
        """
        outputs = self._front.take(self.core.step())
        if not self.has_unfinished_requests():
            self.core.drain()
        return outputs

    def abort_request(self, request_ids: str | Sequence[str]) -> list[RequestOutput]:
        """Ends requests at once and gives back what they had, with finish reason "abort". Unknown ids are ignored."""
        return self._front.abort([request_ids] if isinstance(request_ids, str) else list(request_ids))

    def has_unfinished_requests(self) -> bool:
        """Returns whether any request waits or runs."""
        return self.core.has_unfinished_requests()

    @property
    def unfinished_request_ids(self) -> list[str]:
        """Ids of the callers' requests, oldest first."""
        return self._front.request_ids

    def wait_until_warm(self) -> None:
        """Waits until every step shape is compiled."""
        self.core.runner.programs.wait_until_warm()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False (and no change) while requests hold pages."""
        return self.core.scheduler.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Frees device memory: level 1 keeps the weights on the host, level 2 drops them. The prefix cache is lost.

        Raises:
            RuntimeError: Requests are running.
            ValueError: Another level.
        """
        if level not in (1, 2):
            raise ValueError(f"level={level}: expected 1 or 2")
        if self.has_unfinished_requests():
            raise RuntimeError("requests are running: finish or abort them before sleep()")
        self.core.drain()
        self.reset_prefix_cache()
        self.core.runner.sleep(level)

    def wake_up(self) -> None:
        """Takes the device memory back; after a sleep of level 2 the weights are loaded anew."""
        from jaxengine.engine.build import load_weights

        mesh = self.core.runner.programs.context.place.mesh
        self.core.runner.wake_up(lambda: load_weights(self.args, self.checkpoint, self.config, mesh))

    def update_weights(self, weights: Weights) -> None:
        """Puts new weights in place of some or all; see `LLM.update_weights`."""
        self.core.update_weights(weights)

    @property
    def is_sleeping(self) -> bool:
        """Whether the device memory has been given back."""
        return self.core.runner.is_sleeping

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
