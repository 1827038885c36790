"""The engine behind `LLM`: loads a model, takes requests, steps, and gives outputs. One thread."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.engine.core import EngineCore
from jaxengine.engine.inputs import InputProcessor, ProcessedInput, PromptInput
from jaxengine.engine.output_processor import OutputProcessor
from jaxengine.engine.request import RequestStatus
from jaxengine.engine_args import EngineArgs
from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.loading.resolve import resolve_model
from jaxengine.metrics import Metric, collect_metrics
from jaxengine.outputs import RequestOutput
from jaxengine.runner.compiler import CompilationCounter
from jaxengine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


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
        set_up_compilation_cache(args.compilation_cache_dir)
        # Heavy imports wait until the arguments have been looked at.
        from jaxengine.kv_cache.manager import KVCacheManager
        from jaxengine.models.registry import abstract_model
        from jaxengine.runner.model_runner import ModelRunner
        from jaxengine.scheduler.scheduler import Scheduler
        from jaxengine.sharding.mesh import make_mesh

        self.args = args
        self.compilations = CompilationCounter()
        self.checkpoint = resolve_model(args.model, revision=args.revision, load_format=args.load_format)
        with ThreadPoolExecutor(2) as pool:  # weights and tokenizer load while the first steps compile
            tokenizer = pool.submit(self._load_tokenizer)
            self.config: EngineConfig = args.resolve(self.checkpoint)
            config = self.config
            size = config.model.tensor_parallel_size
            self._mesh = make_mesh(model=size) if size > 1 else None
            model = pool.submit(self._load_model)
            runner = ModelRunner(abstract_model(config.model, config.dtype, config.weight_dtype), config, self._mesh)
            try:
                self.tokenizer = tokenizer.result()
                runner.load(model.result())
                self._wait(runner)
            except BaseException:
                runner.close()
                raise
        self.kv_cache = KVCacheManager(runner.num_pages, self.config.block_size, self.config.enable_prefix_caching)
        self.core = EngineCore(Scheduler(self.config.scheduler, self.kv_cache), runner)
        self.input_processor = InputProcessor(
            self.tokenizer,
            vocab_size=self.config.model.vocab_size,
            max_model_len=self.config.scheduler.max_model_len,
            max_logprobs=self.config.max_logprobs,
            eos_token_ids=eos_token_ids(self.checkpoint),
            default_params=self.default_sampling_params(),
        )
        self._outputs = OutputProcessor(self.tokenizer)
        self._num_requests = 0
        self._closed = False

    def _load_tokenizer(self) -> Any:
        if self.args.skip_tokenizer_init:
            return None
        return self.checkpoint.tokenizer() if self.args.tokenizer is None else load_tokenizer(self.args.tokenizer)

    def _load_model(self) -> Any:
        from jaxengine.loading.loader import init_dummy, load_model

        model, dtype, weight_dtype = self.config.model, self.config.dtype, self.config.weight_dtype
        if self.args.load_format == "dummy":
            return init_dummy(model, dtype, self._mesh, seed=self.args.seed, weight_dtype=weight_dtype)
        loaded = load_model(self.checkpoint, model, dtype, self._mesh, weight_dtype=weight_dtype)
        self.checkpoint.release()
        return loaded

    def _wait(self, runner) -> None:
        if self.config.warmup == "full":
            runner.wait_until_warm()
        elif self.config.warmup != "none":
            runner.wait_until_ready()

    def default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (`generation_config.json`), unless `generation_config` says otherwise."""
        if self.args.generation_config != "auto":
            return SamplingParams()
        given = self.checkpoint.generation_config
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return SamplingParams(**{name: given[name] for name in names if given.get(name) is not None})

    def next_request_id(self) -> str:
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
        self._outputs.add(
            processed.request_id,
            processed.prompt_text,
            processed.prompt_token_ids,
            processed.children,
            processed.params,
        )
        try:
            for child in processed.children:
                self.core.add_request(child)
        except ValueError:
            self.abort_request(processed.request_id)
            raise

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
        outputs, stopped = self._outputs.process(self.core.step())
        for child_id, stop_string in stopped:
            self.core.finish_request(child_id, RequestStatus.FINISHED_STOPPED, stop_string)
        if not self.has_unfinished_requests():
            self.core.drain()
        return outputs

    def abort_request(self, request_ids: str | Sequence[str]) -> list[RequestOutput]:
        """Ends requests at once and gives back what they had, with finish reason "abort". Unknown ids are ignored."""
        outputs = []
        for request_id in [request_ids] if isinstance(request_ids, str) else list(request_ids):
            for child_id in self._outputs.child_ids(request_id):
                self.core.finish_request(child_id, RequestStatus.FINISHED_ABORTED)
            output = self._outputs.abort(request_id)
            outputs += [] if output is None else [output]
        return outputs

    def has_unfinished_requests(self) -> bool:
        return self.core.has_unfinished_requests()

    @property
    def unfinished_request_ids(self) -> list[str]:
        """Ids of the callers' requests, oldest first."""
        return self._outputs.request_ids

    def wait_until_warm(self) -> None:
        """Waits until every step shape is compiled."""
        self.core.runner.wait_until_warm()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False (and no change) while requests hold pages."""
        return self.kv_cache.reset_prefix_cache()

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
        self.core.runner.wake_up(self._load_model)

    @property
    def is_sleeping(self) -> bool:
        return self.core.runner.is_sleeping

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges, by vLLM's names with our prefix."""
        return collect_metrics(self.core, self.compilations.count)

    def shutdown(self) -> None:
        """Ends all requests, the compiler threads, and frees the device. Can be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            self.abort_request(self.unfinished_request_ids)
            self.core.drain()
        finally:  # a step that has failed must not keep the device's memory and the threads
            self.core.runner.close()


def load_tokenizer(name: str) -> Any:
    """A tokenizer from elsewhere than the model: a GGUF file, a folder or a hub id.

    Raises:
        ValueError: There is none.
    """
    if name.endswith(".gguf"):
        return resolve_model(name).tokenizer()
    from jaxengine.loading.safetensors_checkpoint import auto_tokenizer

    try:
        return auto_tokenizer().from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer={name!r} cannot be loaded: {error}") from error


def eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """All tokens that end an output, from `generation_config.json` and `config.json`."""
    found: set[int] = set()
    for source in (checkpoint.generation_config, checkpoint.config):
        ids = source.get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found)


def set_up_compilation_cache(folder: str | None) -> None:
    """Turns JAX's persistent compilation cache on, in the user's cache folder unless told otherwise.

    A folder that JAX has been given already (its own setting, or `JAX_COMPILATION_CACHE_DIR`) is kept.
    """
    import jax

    if folder == "" or (folder is None and jax.config.jax_compilation_cache_dir):
        return
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(base) / "jaxengine" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
