"""The programs of an engine's steps: for which shapes, lowered where, compiled when."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Sequence

import jax
from jax.sharding import Mesh

from jaxengine.config import EngineConfig
from jaxengine.models.causal_lm import CausalLM
from jaxengine.runner.buckets import Bucket, fitting
from jaxengine.runner.compiler import StepCompiler, freeze_heap
from jaxengine.runner.lowering import bytes_beside_cache, compile_lowered, lower
from jaxengine.runner.lowering_pool import LoweringPool, start_pool
from jaxengine.runner.memory import num_pages_that_fit
from jaxengine.runner.program_store import open_store
from jaxengine.runner.programs import (
    LAZY_SHAPES,
    ModelStep,
    Program,
    ProgramContext,
    RepeatedStep,
    repeated_buckets,
    repeated_features,
    warmup_programs,
)
from jaxengine.runner.step_handle import StepShape
from jaxengine.sampling.sampler import Feature, LogitsProcessor
from jaxengine.sharding.distributed import least_of_all_processes

# A step may run in a larger bucket than it needs while its own is being compiled, but not in one much larger.
MAX_STRETCH = 4


class StepPrograms:
    """Lowers and compiles programs, most needed first, in the background.

    Attributes:
        context: What they are lowered for.
        buckets: Shapes of the steps.
        processors: Users' functions that samplers have in them; more may come.
        always_wanted: Features of every sampler.
    """

    def __init__(self, model: CausalLM, config: EngineConfig, mesh: Mesh | None = None, bytes_in_use: int = 0):
        """Measures how many pages fit if the configuration does not say, and starts compiling.

        Args:
            model: The model without weights, as its class makes it without `rngs`.
            config: The engine's configuration.
            mesh: The devices; None for the default device.
            bytes_in_use: Of a device, by others than this model.
        """
        self.config, is_cpu = config, config.platform == "cpu"
        self.context = ProgramContext.make(model, config, mesh)
        self.buckets = self.context.buckets
        self.processors: tuple[LogitsProcessor, ...] = config.logits_processors
        self.always_wanted: int = Feature.WIDE.value if config.model.tensor_parallel_size > 1 else 0
        self._steps = {bucket: ModelStep(bucket) for bucket in self.buckets}
        most = config.scheduler.max_num_seqs
        self._full_steps = [
            step
            for bucket, step in self._steps.items()
            if bucket.num_seqs == min(bucket.num_tokens, most) and not bucket.decode_only
        ]
        self._repeated_features = [(x, ~x.value) for x in repeated_features(self.context)]
        self._repeated_buckets = repeated_buckets(self.context)
        self._lowering_pool: LoweringPool | None = None
        if not config.num_pages:
            try:
                step_bytes = None if is_cpu else self.bytes_beside_cache
                num_pages = least_of_all_processes(num_pages_that_fit(config, step_bytes, bytes_in_use))
            except BaseException:
                self._close_lowering_pool()
                raise
            self.context = dataclasses.replace(self.context, num_pages=num_pages)
        self._store = open_store(config, self.num_pages) if mesh is None else None
        num_threads = config.num_compile_threads or (2 if is_cpu else min(8, os.cpu_count() or 1))
        self._compiler = StepCompiler(self.compile_program, num_threads, self._end_warmup)
        keys = self._keys_at_start()
        self._start_lowering(keys)
        self._compiler.add(keys[:LAZY_SHAPES], priority=-1)
        self._compiler.add(keys)

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache of each data-parallel shard."""
        return self.context.num_pages

    def step(self, bucket: Bucket) -> Callable:
        """Returns the model's part of steps of a shape, as `get` gives it."""
        return self._compiler.get(self._steps[bucket])

    def get(self, key: Program) -> Callable:
        """Returns a compiled program; waits for it, ahead of all others, if need be.

        Raises:
            Exception: Whatever its compilation raised.
        """
        return self._compiler.get(key)

    def compile_program(self, key: Program) -> jax.stages.Compiled:
        """Compiles a part of a step at once, and keeps nothing of it."""
        pool = self._lowering_pool
        with pool.turn(key) if pool and self.lacks(key) else contextlib.nullcontext():
            lowered = self.lower(key)
        return compile_lowered(key, self.context, lowered)

    def lacks(self, key: Program) -> bool:
        """Returns whether a program is to be lowered, and could be kept."""
        return self._store is not None and self._store.lacks(key)

    def lower(self, key: Program) -> jax.stages.Lowered:
        """Lowers a part of a step, or finds it in the store."""
        return lower(key, self.context, self._store)

    def bytes_beside_cache(self) -> int:
        """Returns memory of one device that the weights need, and the largest step and its sampler.

        Processes that lower start meanwhile if nothing is stored.
        """

        def start() -> None:
            self._lowering_pool = start_pool(self.config, self._keys_at_start())

        return bytes_beside_cache(self.context, self.processors, start)

    def wait_until_warm(self) -> None:
        """Compiles whatever is left of the warm-up, and waits for it.

        Raises:
            Exception: The first error of a compilation.
        """
        keys = self._warmup_keys()
        self._queue(keys)
        self._compiler.wait(keys)

    def compile_ahead(self, shapes: Iterable[StepShape]) -> list[Program]:
        """Queues what greedy steps of these shapes need, and returns the keys."""
        keys: list[Program] = []
        for shape in shapes:
            bucket = self._fitting(shape)[0]
            keys.append(ModelStep(bucket))
            if shape.decode_only and bucket in self._repeated_buckets:
                keys.append(RepeatedStep(bucket))
        keys = list(dict.fromkeys(keys))
        self._queue(keys)
        return keys

    def wait_until_compiled(self, keys: Iterable[Program]) -> None:
        """Waits for programs that were queued.

        Raises:
            Exception: The first error of a compilation.
        """
        self._compiler.wait(keys)

    def compiled_programs(self) -> list[str]:
        """Returns the text of every program compiled so far, as XLA made it."""
        return [self._compiler.get(key).as_text() for key in self._compiler.ready_keys()]

    def wait_until_ready(self) -> None:
        """Waits until a first step can run."""
        self._compiler.get(self._warmup_keys()[0])

    def max_ready_tokens(self) -> int | None:
        """Returns how many tokens the next step may have so that a compiled bucket holds it, in however many sequences.

        While nothing is compiled yet, as many as the bucket that will be first. None for any number.
        """
        if self.config.warmup == "none":
            return None
        ready = [step.bucket.num_tokens for step in self._full_steps if self._compiler.is_ready(step)]
        return max(ready, default=self.context.warmup_order[0].num_tokens)

    def _fitting(self, shape: StepShape) -> list[Bucket]:
        return fitting(self.buckets, shape.num_tokens, shape.num_seqs, decode_only=shape.decode_only)

    def pick(self, shape: StepShape) -> Bucket:
        """Returns the smallest compiled bucket that holds a step, or the smallest of all if those are far larger."""
        candidates = self._fitting(shape)
        if self.config.warmup == "none":
            return candidates[0]
        limit = MAX_STRETCH * max(candidates[0].num_tokens, 16)
        for bucket in candidates:
            if bucket.num_tokens <= limit and self._compiler.is_ready(self._steps[bucket]):
                return bucket
        return candidates[0]

    def repeated(self, bucket: Bucket, wanted: int) -> Callable | None:
        """Returns the program that runs decode steps of a shape `NUM_REPEATS` times.

        None where there is none, or none yet. No step waits for it, and with `warmup="none"` only `compile_ahead` has
        it compiled.

        Args:
            bucket: The shape.
            wanted: Features of the rows.
        """
        features = next((x for x, others in self._repeated_features if not wanted & others), None)
        if features is None or bucket not in self._repeated_buckets:
            return None
        key = RepeatedStep(bucket, features)
        if self.config.warmup == "lazy":
            self._queue([key])
        return self.get(key) if self._compiler.is_ready(key) else None

    def close(self) -> None:
        """Ends threads and processes, after the compilations under way."""
        self._compiler.close()
        self._close_lowering_pool()
        gc.unfreeze()

    def _warmup_keys(self) -> list[Program]:
        return warmup_programs(self.context, self.processors)

    def _keys_at_start(self) -> list[Program]:
        return self._warmup_keys()[: {"none": 0, "lazy": LAZY_SHAPES}.get(self.config.warmup)]

    def _queue(self, keys: Sequence[Program]) -> None:
        self._start_lowering(keys)
        self._compiler.add(keys)

    def _start_lowering(self, keys: Sequence[Program]) -> None:
        """Starts processes that lower programs, if that is worth some and none are there."""
        if self._lowering_pool is None:
            self._lowering_pool = start_pool(self.config, filter(self.lacks, keys))
        if self._lowering_pool is not None:
            self._lowering_pool.begin(self.config, self.num_pages)

    def _end_warmup(self) -> None:
        """Ends what only starting needs, once all that was queued is compiled."""
        self._close_lowering_pool()
        if self.config.platform != "cpu":  # whose steps take so long that the collector's time is lost among them
            freeze_heap()

    def _close_lowering_pool(self) -> None:
        pool, self._lowering_pool = self._lowering_pool, None
        if pool is not None:
            pool.close()
