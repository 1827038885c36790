"""The programs of an engine's steps: for which shapes, lowered where, compiled when."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from jaxengine.config import EngineConfig
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.registry import abstract_model
from jaxengine.runner.arrays import StepArrays
from jaxengine.runner.buckets import (
    MAX_REPEATED_SEQS,
    NUM_REPEATS,
    Bucket,
    fitting,
    make_buckets,
    warmup_order,
)
from jaxengine.runner.compiler import StepCompiler, freeze_heap
from jaxengine.runner.input_batch import PackedLayout
from jaxengine.runner.lowering import lower
from jaxengine.runner.lowering_pool import LoweringPool, start_pool
from jaxengine.runner.memory import num_pages_that_fit
from jaxengine.runner.placement import Placement, bytes_on_a_device
from jaxengine.runner.platform import compiler_options
from jaxengine.runner.program_store import open_store
from jaxengine.runner.programs import (
    MaskKey,
    ProgramKey,
    PromptLogprobsKey,
    RepeatKey,
    SamplerKey,
    SetSlotKey,
    temporary_bytes,
)
from jaxengine.runner.step_handle import StepShape
from jaxengine.runner.steps import FlatModel
from jaxengine.sampling.sampler import EVERY_FEATURE, FEATURE_SETS, FILTER, WIDE, LogitsProcessor
from jaxengine.sharding.distributed import least_of_all_processes

# A step may run in a larger bucket than it needs while its own is being compiled, but not in one much larger.
MAX_STRETCH = 4
# What "lazy" compiles ahead: the first small bucket, and the decode of one request.
LAZY_SHAPES = 2


class StepPrograms:
    """Lowers and compiles programs, most needed first, in the background.

    Attributes:
        buckets: Shapes of the steps.
        layouts: Of their inputs.
        num_pages: Pages of the KV cache of each data-parallel shard.
        table_width: Pages of a sequence at most, and one more.
        flat: The model; its leaves are abstract.
        is_stacked: Whether its layers run in a loop.
        place: Where everything is.
        leaf_places: Where the model's leaves are.
        arrays: What a step needs beside the weights.
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
        self.config = config
        scheduler, is_cpu = config.scheduler, config.platform == "cpu"
        # One page more than a request can fill: a step that is run several times goes on beyond its end.
        self.table_width = -(-scheduler.max_model_len // config.block_size) + 1
        self.buckets = make_buckets(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, coarse=is_cpu)
        self.layouts = {
            bucket: PackedLayout(bucket, self.table_width, config.attention_backend) for bucket in self.buckets
        }
        self.is_stacked = is_cpu and model.stack_layers()
        self.flat = FlatModel(model)
        self.place = Placement(mesh)
        self.arrays = StepArrays(config, self.place, is_stacked=self.is_stacked)
        self.leaf_places = self.place.parameters(self.flat.state)
        self.processors: tuple[LogitsProcessor, ...] = config.logits_processors
        # Devices that share the vocabulary would exchange logits to find the largest few.
        is_shared = config.model.tensor_parallel_size > 1
        self.always_wanted = WIDE if is_shared else 0
        self._features = [features for features in FEATURE_SETS if features & WIDE or not is_shared]
        self._repeated_features = [0, *(f for f in self._features if f & FILTER and f != EVERY_FEATURE)]
        self._repeated_buckets = self._buckets_of_loops()
        self._lowering_pool: LoweringPool | None = None
        try:
            self.num_pages = config.num_pages or least_of_all_processes(
                num_pages_that_fit(config, None if is_cpu else self.bytes_beside_cache, bytes_in_use)
            )
        except BaseException:
            self._close_lowering_pool()
            raise
        self._store = open_store(config, self.num_pages) if mesh is None else None
        num_threads = config.num_compile_threads or (2 if is_cpu else min(8, os.cpu_count() or 1))
        self._compiler = StepCompiler(self.compile_program, num_threads, self._end_warmup)
        keys = self._keys_at_start()
        self._start_lowering(keys)
        self._compiler.add(keys[:LAZY_SHAPES], priority=-1)
        self._compiler.add(keys)

    def get(self, key: ProgramKey) -> Callable:
        """A compiled program; waits for it, ahead of all others, if need be.

        Raises:
            Exception: Whatever its compilation raised.
        """
        return self._compiler.get(key)

    def compile_program(self, key: ProgramKey) -> jax.stages.Compiled:
        """Compiles a part of a step at once, and keeps nothing of it."""
        pool = self._lowering_pool
        with pool.turn(key) if pool and self.lacks(key) else contextlib.nullcontext():
            lowered = self.lower(key)
        num_tokens = key.num_tokens if isinstance(key, Bucket) else 0
        return lowered.compile(compiler_options(self.config.platform, num_tokens))

    def lacks(self, key: ProgramKey) -> bool:
        """Whether a program is to be lowered, and could be kept."""
        return self._store is not None and self._store.lacks(key)

    def lower(self, key: ProgramKey) -> jax.stages.Lowered:
        """Lowers a part of a step, or finds it in the store."""
        return lower(key, self.flat, self.leaf_places, self.layouts, self.arrays, self.num_pages, self._store)

    def weight_bytes(self) -> int:
        """Bytes of all weights on one device."""
        return sum(map(bytes_on_a_device, self.flat.leaves, self.leaf_places))

    def bytes_beside_cache(self) -> int:
        """Memory of one device that the weights need, and the largest step and its sampler.

        A model of two layers tells: each layer's temporaries take the place of the one's before it.
        """
        model = self.config.model.first_layers(2)
        config = dataclasses.replace(self.config, model=model, num_pages=16, warmup="none")
        small = StepPrograms(abstract_model(model, config.dtype, config.weight_dtype), config, self.place.mesh)
        sampler = SamplerKey(self.buckets[-1].num_seqs, EVERY_FEATURE, self.processors)
        if small.lacks(self.buckets[-1]):  # then those of this engine are not there either
            self._lowering_pool = start_pool(self.config, self._keys_at_start())
        with ThreadPoolExecutor() as pool:
            used = list(map(temporary_bytes, pool.map(small.compile_program, (self.buckets[-1], sampler))))
        small.close()
        held = [x for bucket in self.buckets for x in jax.tree.leaves(self.arrays.abstract_held(bucket))]
        return self.weight_bytes() + sum(used) + sum(bytes_on_a_device(x, x.sharding) for x in held)

    def wait_until_warm(self) -> None:
        """Compiles whatever is left of the warm-up, and waits for it.

        Raises:
            Exception: The first error of a compilation.
        """
        keys = self._warmup_keys()
        self._queue(keys)
        self._compiler.wait(keys)

    def compile_ahead(self, shapes: Iterable[StepShape]) -> list[ProgramKey]:
        """Queues what greedy steps of these shapes need, and returns the keys."""
        keys: list[ProgramKey] = []
        for shape in shapes:
            bucket = self._fitting(shape)[0]
            keys += [bucket, *(self._repeats([bucket], 0) if shape.decode_only else ())]
        keys = list(dict.fromkeys(keys))
        self._queue(keys)
        return keys

    def wait_until_compiled(self, keys: Iterable[ProgramKey]) -> None:
        """Waits for programs that were queued.

        Raises:
            Exception: The first error of a compilation.
        """
        self._compiler.wait(keys)

    def compiled_programs(self) -> list[str]:
        """The text of every program compiled so far, as XLA made it."""
        return [self._compiler.get(key).as_text() for key in self._compiler.ready_keys()]

    def wait_until_ready(self) -> None:
        """Waits until a first step can run."""
        self._compiler.get(self._warmup_keys()[0])

    def max_ready_tokens(self) -> int | None:
        """How many tokens the next step may have so that a compiled bucket holds it, however many sequences they are.

        While nothing is compiled yet, as many as the bucket that will be first. None for any number.
        """
        if self.config.warmup == "none":
            return None
        most = self.config.scheduler.max_num_seqs
        ready = [
            bucket.num_tokens
            for bucket in self.buckets
            if bucket.num_seqs == min(bucket.num_tokens, most)
            and not bucket.decode_only
            and self._compiler.is_ready(bucket)
        ]
        return max(ready, default=warmup_order(self.buckets)[0].num_tokens)

    def _fitting(self, shape: StepShape) -> list[Bucket]:
        return fitting(self.buckets, shape.num_tokens, shape.num_seqs, decode_only=shape.decode_only)

    def pick(self, shape: StepShape) -> Bucket:
        """The smallest compiled bucket that holds a step, or the smallest of all if those are far larger."""
        candidates = self._fitting(shape)
        if self.config.warmup == "none":
            return candidates[0]
        limit = MAX_STRETCH * max(candidates[0].num_tokens, 16)
        for bucket in candidates:
            if bucket.num_tokens <= limit and self._compiler.is_ready(bucket):
                return bucket
        return candidates[0]

    def repeated(self, bucket: Bucket, wanted: int) -> Callable | None:
        """The program that runs decode steps of a shape `NUM_REPEATS` times; None where there is none, or none yet.

        No step waits for it, and with `warmup="none"` only `compile_ahead` has it compiled.

        Args:
            bucket: The shape.
            wanted: Features of the rows.
        """
        features = next((f for f in self._repeated_features if not wanted & ~f), None)
        if features is None or bucket not in self._repeated_buckets:
            return None
        key = RepeatKey(bucket, features)
        if self.config.warmup == "lazy":
            self._queue([key])
        return self.get(key) if self._compiler.is_ready(key) else None

    def _repeats(self, buckets: Iterable[Bucket], features: int) -> list[RepeatKey]:
        return [RepeatKey(bucket, features) for bucket in buckets if bucket in self._repeated_buckets]

    def _buckets_of_loops(self) -> frozenset[Bucket]:
        """Shapes of few decodes, if ever so many steps of them are planned at once that a loop can run them."""
        planned = self.config.scheduler.num_scheduler_steps
        if planned is not None and planned < NUM_REPEATS:
            return frozenset()
        sizes = {bucket.num_seqs for bucket in self.buckets if bucket.num_seqs <= MAX_REPEATED_SEQS}
        return frozenset(self._fitting(StepShape(size, size, True))[0] for size in sizes)

    def close(self) -> None:
        """Ends threads and processes, after the compilations under way."""
        self._compiler.close()
        self._close_lowering_pool()
        gc.unfreeze()

    def _warmup_keys(self) -> list[ProgramKey]:
        order = warmup_order(self.buckets)
        keys: list[ProgramKey] = [*order[:LAZY_SHAPES], SetSlotKey()]
        for bucket in order:
            keys += [bucket, *(SamplerKey(bucket.num_seqs, features, self.processors) for features in self._features)]
        for features in self._repeated_features:
            keys += self._repeats(order, features)
        keys += [PromptLogprobsKey(bucket.num_tokens) for bucket in order]
        keys += [MaskKey(bucket.num_seqs) for bucket in order]
        return list(dict.fromkeys(keys))

    def _keys_at_start(self) -> list[ProgramKey]:
        return self._warmup_keys()[: {"none": 0, "lazy": LAZY_SHAPES}.get(self.config.warmup)]

    def _queue(self, keys: Sequence[ProgramKey]) -> None:
        self._start_lowering(keys)
        self._compiler.add(keys)

    def _start_lowering(self, keys: Sequence[ProgramKey]) -> None:
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
