"""Runs scheduled batches on the device: owns the weights, the KV cache, the sampling state and the compiled steps."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxengine.config import EngineConfig
from jaxengine.models.causal_lm import CausalLM
from jaxengine.pallas_kernels.ragged_paged_attention import KVCache, make_cache
from jaxengine.runner.buckets import Bucket, fitting, make_buckets, sampler_buckets, warmup_order
from jaxengine.runner.compiler import StepCompiler, release_free_memory
from jaxengine.runner.input_batch import PackedLayout, SlotTable, needs_full_sampler, order_rows, pack
from jaxengine.runner.memory import num_pages_that_fit
from jaxengine.runner.placement import Placement, abstract, bytes_on_a_device
from jaxengine.runner.step_handle import StepHandle, StepShape
from jaxengine.runner.steps import FlatModel, make_step
from jaxengine.sampling.sampler import USES_STATE, LogitsProcessor
from jaxengine.sampling.state import SamplingState, SlotValues, make_sampling_state, set_slot, slot_values
from jaxengine.scheduler.scheduler import ScheduledBatch, ScheduledSequence
from jaxengine.sharding.distributed import is_multiprocess, least_of_all_processes

logger = logging.getLogger(__name__)

MAX_LOGITS_PROCESSORS = 31
# A step may run in a larger bucket than it needs while its own is being compiled, but not in one much larger.
MAX_STRETCH = 4
# What "lazy" compiles ahead: the first small bucket, and the decode of one request.
LAZY_SHAPES = 2


class StepKey(NamedTuple):
    """One compiled step."""

    bucket: Bucket
    full: bool
    processors: tuple[LogitsProcessor, ...] = ()


class ModelRunner:
    """Turns scheduled batches into tokens.

    Attributes:
        num_pages: Pages of the KV cache of each data-parallel shard.
        mesh: The devices; None for the default device.
        buckets: Shapes of the steps, without (False) and with (True) the whole sampler.
    """

    def __init__(self, model: CausalLM, config: EngineConfig, mesh: Mesh | None = None):
        """Starts compiling for an abstract model; `load` brings the weights, and may come later.

        Args:
            model: The model without weights, as its class makes it without `rngs`.
            config: The engine's configuration.
            mesh: The devices; None for the default device.
        """
        self.config = config
        self.model_config = config.model
        scheduler = config.scheduler
        self.table_width = -(-scheduler.max_model_len // config.block_size)
        self.is_cpu = config.platform == "cpu"
        buckets = make_buckets(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, coarse=self.is_cpu)
        self.buckets = {False: buckets, True: sampler_buckets(buckets, coarse=self.is_cpu)}
        self._is_stacked = self.is_cpu and model.stack_layers()
        self._flat = FlatModel(model)
        self.mesh = mesh
        self._place = Placement(mesh)
        self._leaf_places = self._place.parameters(self._flat.state)
        self._leaves: list[jax.Array] | None = None
        self._offloaded: list[np.ndarray] | None = None
        self._processors: tuple[LogitsProcessor, ...] = config.logits_processors
        self.num_pages = config.num_pages or least_of_all_processes(
            num_pages_that_fit(config, self._step_temporary_bytes if not self.is_cpu else None)
        )
        self._slots = [
            SlotTable(scheduler.max_num_seqs, self.table_width, self.model_config.vocab_size)
            for _ in range(self._place.num_shards)
        ]
        self._caches: list = []
        self._state: Any = None
        num_threads = config.num_compile_threads or (2 if self.is_cpu else min(8, os.cpu_count() or 1))
        self._compiler = StepCompiler(self._compile, num_threads)
        if config.warmup != "none":
            self._compiler.add(self._warmup_keys()[: LAZY_SHAPES if config.warmup == "lazy" else None])

    def load(self, model: CausalLM) -> None:
        """Takes the weights of a model of the same structure, and allocates the cache."""
        if self._is_stacked:
            model.stack_layers()
        self._leaves = self._put(FlatModel(model).leaves)
        release_free_memory()
        self._allocate()

    # Compiling

    def _warmup_keys(self) -> list[Any]:
        greedy, full = (
            [StepKey(bucket, f, self._processors) for bucket in warmup_order(self.buckets[f])] for f in (False, True)
        )
        return [*greedy[:4], "set_slot", *full[:2], *greedy[4:], *full[2:]]

    def _abstract_args(self, layout: PackedLayout, num_pages: int) -> tuple:
        place = self._place
        caches = jax.eval_shape(lambda: self._make_caches(num_pages))
        return (
            list(map(abstract, self._flat.leaves, self._leaf_places)),
            jax.tree.map(lambda x: abstract(x, place.heads()), caches),
            self._abstract_state(),
            jax.ShapeDtypeStruct((place.num_shards * layout.size,), jnp.int32, sharding=place.shards()),
        )

    def _abstract_state(self) -> SamplingState:
        state = jax.eval_shape(self._make_state)
        return jax.tree.map(abstract, state, self._place.sampling_state(state, self._vocab_size))

    def _lower(self, key: StepKey, num_pages: int) -> jax.stages.Lowered:
        layout = PackedLayout(key.bucket, self.table_width, self.config.attention_backend)
        step = make_step(self._flat, layout, full=key.full, processors=key.processors, num_top=self.config.max_logprobs)
        args = self._abstract_args(layout, num_pages)
        places = {}
        if self._place.mesh is not None:  # what is donated must stay where it is
            carried = jax.tree.map(lambda x: x.sharding, args[1:3])
            places["out_shardings"] = (*carried, self._place.outputs())
        step = self._place.of_every_shard(step, is_shared=(True, False, False, False))
        with self._place.context():
            return jax.jit(step, donate_argnums=(1, 2), **places).lower(*args)

    def compile_step(self, key: StepKey) -> jax.stages.Compiled:
        """Compiles a step at once, and keeps nothing of it."""
        return self._lower(key, self.num_pages).compile(self._compiler_options())

    def weight_bytes(self) -> int:
        """Bytes of all weights on one device."""
        return sum(map(bytes_on_a_device, self._flat.leaves, self._leaf_places))

    def _compile(self, key: StepKey | str) -> Any:
        if isinstance(key, StepKey):
            return self.compile_step(key)
        state = self._abstract_state()
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
        values = SlotValues(*(getattr(row, name) for name in SlotValues._fields))
        values = jax.tree.map(lambda x: abstract(x, self._place.replicated()), values)
        slots = jax.ShapeDtypeStruct((self._place.num_shards,), jnp.int32, sharding=self._place.shards())
        places = {} if self._place.mesh is None else {"out_shardings": jax.tree.map(lambda x: x.sharding, state)}
        set_own_slot = self._place.of_every_shard(
            lambda state, slots, values: set_slot(state, slots[0], values), is_shared=(False, False, True)
        )
        with self._place.context():
            return jax.jit(set_own_slot, donate_argnums=0, **places).lower(state, slots, values).compile()

    def _compiler_options(self) -> dict[str, Any]:
        # On CPU, LLVM's level 1 compiles a 135M model's step in 2.5 s instead of 3.4 s, and the step is as fast: the
        # time is in library matmuls (measured on 2 cores, 2026-11-23).
        return {"xla_backend_optimization_level": 1} if self.is_cpu else {}

    def _step_temporary_bytes(self) -> int:
        """Memory that the largest step needs beside its arguments, and that the weights need."""
        memory = self._lower(StepKey(self.buckets[True][-1], True, self._processors), 16).compile().memory_analysis()
        if memory is None:
            raise RuntimeError("this backend does not tell a program's memory: give kv_cache_memory_bytes")
        return (
            self.weight_bytes() + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )

    def wait_until_warm(self) -> None:
        """Compiles whatever is left of the warm-up, and waits for it.

        Raises:
            Exception: The first error of a compilation.
        """
        keys = self._warmup_keys()
        self._compiler.add(keys)
        self._compiler.wait(keys)

    def compile_ahead(self, shapes: Iterable[StepShape]) -> list[StepKey]:
        """Queues the greedy steps that hold steps of these shapes, and returns their keys."""
        buckets = dict.fromkeys(self._fitting(shape, full=False)[0] for shape in shapes)
        keys = [StepKey(bucket, False, self._processors) for bucket in buckets]
        self._compiler.add(keys)
        return keys

    def wait_until_compiled(self, keys: Iterable[StepKey]) -> None:
        """Waits for steps that were queued.

        Raises:
            Exception: The first error of a compilation.
        """
        self._compiler.wait(keys)

    def compiled_programs(self) -> list[str]:
        """The text of every step compiled so far, as XLA made it."""
        return [self._compiler.get(key).as_text() for key in self._compiler.ready_keys()]

    def wait_until_ready(self) -> None:
        """Waits until a first step can run."""
        self._compiler.get(self._warmup_keys()[0])

    def max_ready_tokens(self, full: bool) -> int | None:
        """How many tokens the next step may have so that a compiled bucket holds it, however many sequences they are.

        While nothing is compiled yet, as many as the bucket that will be first. None for any number.
        """
        if self.config.warmup == "none":
            return None
        most = self.config.scheduler.max_num_seqs
        ready = [
            bucket.num_tokens
            for bucket in self.buckets[full]
            if bucket.num_seqs == min(bucket.num_tokens, most)
            and not bucket.decode_only
            and self._is_ready(bucket, full)
        ]
        return max(ready, default=warmup_order(self.buckets[full])[0].num_tokens)

    def _is_ready(self, bucket: Bucket, full: bool) -> bool:
        return self._compiler.is_ready(StepKey(bucket, full, self._processors))

    def _fitting(self, shape: StepShape, full: bool) -> list[Bucket]:
        return fitting(self.buckets[full], shape.num_tokens, shape.num_seqs, decode_only=shape.decode_only)

    def _pick(self, shape: StepShape, full: bool) -> Bucket:
        """The smallest compiled bucket that holds a step, or the smallest of all if those are far larger."""
        candidates = self._fitting(shape, full)
        if self.config.warmup == "none":
            return candidates[0]
        limit = MAX_STRETCH * max(candidates[0].num_tokens, 16)
        for bucket in candidates:
            if bucket.num_tokens <= limit and self._is_ready(bucket, full):
                return bucket
        return candidates[0]

    # Running

    def execute(self, batches: Sequence[ScheduledBatch]) -> StepHandle:
        """Dispatches a step, which has a batch for each shard, and returns at once."""
        if self._leaves is None:
            raise RuntimeError("the engine sleeps: call wake_up() first")
        for shard, batch in enumerate(batches):
            for sequence in batch.sequences:
                if sequence.new_in_slot:
                    self._take_slot(shard, sequence)
        full = any(needs_full_sampler(s.request.sampling_params) for batch in batches for s in batch.sequences)
        bucket = self._pick(StepShape.of(batches), full)
        step = self._compiler.get(StepKey(bucket, full, self._processors))
        orders = [order_rows(batch) for batch in batches]
        layout = PackedLayout(bucket, self.table_width, self.config.attention_backend)
        packed = self._place.put(pack(batches, orders, layout, self._slots), self._place.shards())
        self._caches, self._state, outputs = step(self._leaves, self._caches, self._state, packed)
        return StepHandle(outputs, orders, batches)

    def _take_slot(self, shard: int, sequence: ScheduledSequence) -> None:
        request = sequence.request
        params = request.sampling_params
        seed = params.seed
        if seed is None:  # the same for a request wherever and however often it runs
            seed = zlib.crc32(request.request_id.encode(), self.config.seed & 0xFFFFFFFF)
        processors = self._processor_bits(params.logits_processors or ())
        if self._slots[shard].take(sequence, seed, processors) & USES_STATE:
            set_slot_compiled = self._compiler.get("set_slot")
            place = self._place
            values = slot_values(request, self._vocab_size)
            values = jax.tree.map(lambda x: place.put(x, place.replicated()), values)
            slots = np.full(len(self._slots), self.config.scheduler.max_num_seqs, np.int32)  # out of range: none
            slots[shard] = sequence.slot
            self._state = set_slot_compiled(self._state, place.put(slots, place.shards()), values)

    def _processor_bits(self, processors) -> int:
        new = tuple(p for p in processors if p not in self._processors)
        if new:
            if len(self._processors) + len(new) > MAX_LOGITS_PROCESSORS:
                raise ValueError(
                    f"logits_processors: at most {MAX_LOGITS_PROCESSORS} different ones in an engine's life"
                )
            logger.warning("compiling again for a logits processor that was not given to LLM(logits_processors=[...])")
            self._processors += new
        return sum(1 << self._processors.index(p) for p in processors)

    # Memory

    @property
    def _vocab_size(self) -> int:
        return self.model_config.vocab_size

    def _make_caches(self, num_pages: int) -> list[KVCache]:
        config, place = self.config, self._place
        num_caches = 1 if self._is_stacked else config.model.num_layers
        num_pages = place.num_shards * num_pages * config.model.num_layers // num_caches
        where: dict[str, Any] = {"num_devices": place.size, "sharding": place.heads()}
        return [make_cache(config.attention, num_pages, config.attention_backend, **where) for _ in range(num_caches)]

    def _make_state(self) -> SamplingState:
        return make_sampling_state(self._place.num_shards * self.config.scheduler.max_num_seqs, self._vocab_size)

    def _put(self, leaves: Iterable[Any]) -> list[jax.Array]:
        """Puts weights where they belong; those that are there stay."""
        if self._place.mesh is None:
            return [jnp.asarray(leaf) for leaf in leaves]
        return list(map(jax.device_put, leaves, self._leaf_places))

    def _allocate(self) -> None:
        self._caches = self._make_caches(self.num_pages)
        if self._place.mesh is None:
            self._state = self._make_state()
            return
        places = jax.tree.map(lambda x: x.sharding, self._abstract_state())
        self._state = jax.jit(self._make_state, out_shardings=places)()

    def sleep(self, level: int) -> None:
        """Frees the KV cache, and the weights too: level 1 keeps them in host memory, level 2 drops them."""
        if self._leaves is None:
            return
        if level == 1 and is_multiprocess():
            raise ValueError("level=1: not over several processes; level=2 loads the weights anew")
        if level == 1:
            self._offloaded = jax.device_get(self._leaves)
        for array in jax.tree.leaves((self._leaves if not self.is_cpu else [], self._caches, self._state)):
            array.delete()
        self._leaves, self._caches, self._state = None, [], None

    @property
    def is_sleeping(self) -> bool:
        return self._leaves is None

    def wake_up(self, reload_model) -> None:
        """Takes the memory back. `reload_model()` gives the model anew after a sleep of level 2."""
        if self._leaves is not None:
            return
        if self._offloaded is not None:
            self._leaves = self._put(self._offloaded)
            self._offloaded = None
            self._allocate()
        else:
            self.load(reload_model())

    def close(self) -> None:
        """Ends the compiler threads and frees the device memory."""
        self._compiler.close()
        if self._leaves is not None:
            self.sleep(2)
