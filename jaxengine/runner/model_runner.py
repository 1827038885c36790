"""Runs scheduled batches on the device: owns the weights, the KV cache, the sampling state and the compiled steps."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxengine.config import EngineConfig
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.registry import abstract_model
from jaxengine.runner.arrays import StepArrays
from jaxengine.runner.buckets import Bucket, fitting, make_buckets, warmup_order
from jaxengine.runner.compiler import StepCompiler, freeze_heap, release_free_memory
from jaxengine.runner.input_batch import PackedLayout, SlotTable, advance, order_rows, pack, prompt_targets
from jaxengine.runner.lowering import lower
from jaxengine.runner.lowering_pool import LoweringPool, start_pool
from jaxengine.runner.memory import keep_small_places, num_pages_that_fit
from jaxengine.runner.placement import Placement, bytes_on_a_device
from jaxengine.runner.platform import compiler_options
from jaxengine.runner.program_store import open_store
from jaxengine.runner.programs import (
    MaskKey,
    ProgramKey,
    PromptLogprobsKey,
    SamplerKey,
    SetSlotKey,
    temporary_bytes,
)
from jaxengine.runner.step_handle import ForwardStep, StepHandle, StepOutputs, StepShape
from jaxengine.runner.steps import FlatModel, ForwardOutputs
from jaxengine.sampling.logprobs import Logprobs
from jaxengine.sampling.sampler import (
    EVERY_FEATURE,
    FEATURE_SETS,
    LOGPROBS,
    MIN_TOKENS,
    RANDOM,
    USES_STATE,
    WIDE,
    LogitsProcessor,
    feature_set,
)
from jaxengine.sampling.state import slot_values
from jaxengine.scheduler.batch import ScheduledBatch, ScheduledSequence
from jaxengine.sharding.distributed import is_multiprocess, least_of_all_processes

if TYPE_CHECKING:
    from jaxengine.structured.matchers import TokenMasks

logger = logging.getLogger(__name__)

MAX_LOGITS_PROCESSORS = 31
# A step may run in a larger bucket than it needs while its own is being compiled, but not in one much larger.
MAX_STRETCH = 4
# What "lazy" compiles ahead: the first small bucket, and the decode of one request.
LAZY_SHAPES = 2


class ModelRunner:
    """Turns scheduled batches into tokens.

    Attributes:
        num_pages: Pages of the KV cache of each data-parallel shard.
        mesh: The devices; None for the default device.
        buckets: Shapes of the steps.
    """

    def __init__(self, model: CausalLM, config: EngineConfig, mesh: Mesh | None = None, bytes_in_use: int = 0):
        """Starts compiling for an abstract model; `load` brings the weights, and may come later.

        Args:
            model: The model without weights, as its class makes it without `rngs`.
            config: The engine's configuration.
            mesh: The devices; None for the default device.
            bytes_in_use: Of a device, by others than this model.
        """
        self.config = config
        self.model_config = config.model
        scheduler = config.scheduler
        # One page more than a request can fill: a step that is run several times goes on beyond its end.
        self.table_width = -(-scheduler.max_model_len // config.block_size) + 1
        self.is_cpu = config.platform == "cpu"
        self.buckets = make_buckets(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, coarse=self.is_cpu)
        self._layouts = {
            bucket: PackedLayout(bucket, self.table_width, config.attention_backend) for bucket in self.buckets
        }
        self._is_stacked = self.is_cpu and model.stack_layers()
        self._flat = FlatModel(model)
        self.mesh = mesh
        self._place = Placement(mesh)
        self._arrays = StepArrays(config, self._place, is_stacked=self._is_stacked)
        self._leaf_places = self._place.parameters(self._flat.state)
        self._leaves: list[jax.Array] | None = None
        self._offloaded: list[np.ndarray] | None = None
        self._processors: tuple[LogitsProcessor, ...] = config.logits_processors
        # Devices that share the vocabulary would exchange logits to find the largest few.
        is_shared = self.model_config.tensor_parallel_size > 1
        self._always_wanted = WIDE if is_shared else 0
        self._features = [features for features in FEATURE_SETS if features & WIDE or not is_shared]
        self._lowering_pool: LoweringPool | None = None
        try:
            self.num_pages = config.num_pages or least_of_all_processes(
                num_pages_that_fit(config, self._bytes_beside_cache if not self.is_cpu else None, bytes_in_use)
            )
        except BaseException:
            self._close_lowering_pool()
            raise
        self._store = open_store(config, self.num_pages) if mesh is None else None
        self._slots = [
            SlotTable(scheduler.max_num_seqs, self.table_width, self.model_config.vocab_size)
            for _ in range(self._place.num_shards)
        ]
        self._caches: list = []
        self._state: Any = None
        self._last_token: Any = None
        self._held_outputs: dict[Bucket, ForwardOutputs | None] = {}
        self._walls: list[jax.Array] = []
        num_threads = config.num_compile_threads or (2 if self.is_cpu else min(8, os.cpu_count() or 1))
        self._compiler = StepCompiler(self.compile_program, num_threads, self._end_warmup)
        keys = self._keys_at_start()
        self._start_lowering(keys)
        self._compiler.add(keys[:LAZY_SHAPES], priority=-1)
        self._compiler.add(keys)

    def load(self, model: CausalLM) -> None:
        """Takes the weights of a model of the same structure, and allocates the cache."""
        if self._is_stacked:
            model.stack_layers()
        self._leaves = self._put(FlatModel(model).leaves)
        release_free_memory()
        self._allocate()

    # Compiling

    def _warmup_keys(self) -> list[ProgramKey]:
        order = warmup_order(self.buckets)
        keys: list[ProgramKey] = [*order[:LAZY_SHAPES], SetSlotKey()]
        for bucket in order:
            keys += [bucket, *(SamplerKey(bucket.num_seqs, features, self._processors) for features in self._features)]
        keys += [PromptLogprobsKey(bucket.num_tokens) for bucket in order]
        keys += [MaskKey(bucket.num_seqs) for bucket in order]
        return list(dict.fromkeys(keys))

    def _keys_at_start(self) -> list[ProgramKey]:
        return self._warmup_keys()[: {"none": 0, "lazy": LAZY_SHAPES}.get(self.config.warmup)]

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
        return lower(key, self._flat, self._leaf_places, self._layouts, self._arrays, self.num_pages, self._store)

    def _queue(self, keys: Sequence[ProgramKey]) -> None:
        self._start_lowering(keys)
        self._compiler.add(keys)

    def _start_lowering(self, keys: Sequence[ProgramKey]) -> None:
        """Starts processes that lower programs, if that is worth some and none are there."""
        if self._store is None:
            return
        if self._lowering_pool is None:
            self._lowering_pool = start_pool(self.config, sum(map(self._store.lacks, keys)))
        if self._lowering_pool is not None:
            self._lowering_pool.begin(self.config, self.num_pages)

    def _end_warmup(self) -> None:
        """Ends what only starting needs, once all that was queued is compiled."""
        self._close_lowering_pool()
        if not self.is_cpu:  # whose steps take so long that the collector's time is lost among them
            freeze_heap()

    def _close_lowering_pool(self) -> None:
        pool, self._lowering_pool = self._lowering_pool, None
        if pool is not None:
            pool.close()

    def weight_bytes(self) -> int:
        """Bytes of all weights on one device."""
        return sum(map(bytes_on_a_device, self._flat.leaves, self._leaf_places))

    def _bytes_beside_cache(self) -> int:
        """Memory of one device that the weights need, and the largest step and its sampler.

        A model of two layers tells: each layer's temporaries take the place of the one's before it.
        """
        model = self.model_config.first_layers(2)
        config = dataclasses.replace(self.config, model=model, num_pages=16, warmup="none")
        runner = ModelRunner(abstract_model(model, config.dtype, config.weight_dtype), config, self.mesh)
        sampler = SamplerKey(self.buckets[-1].num_seqs, EVERY_FEATURE, self._processors)
        if runner.lacks(self.buckets[-1]):  # then those of this engine are not there either
            self._lowering_pool = start_pool(self.config, len(self._keys_at_start()))
        with ThreadPoolExecutor() as pool:
            used = list(map(temporary_bytes, pool.map(runner.compile_program, (self.buckets[-1], sampler))))
        runner.close()
        held = [x for bucket in self.buckets for x in jax.tree.leaves(self._arrays.abstract_held(bucket))]
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
        keys: list[ProgramKey] = list(dict.fromkeys(self._fitting(shape)[0] for shape in shapes))
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

    def _pick(self, shape: StepShape) -> Bucket:
        """The smallest compiled bucket that holds a step, or the smallest of all if those are far larger."""
        candidates = self._fitting(shape)
        if self.config.warmup == "none":
            return candidates[0]
        limit = MAX_STRETCH * max(candidates[0].num_tokens, 16)
        for bucket in candidates:
            if bucket.num_tokens <= limit and self._compiler.is_ready(bucket):
                return bucket
        return candidates[0]

    # Running

    def execute(self, batches: Sequence[ScheduledBatch]) -> StepHandle:
        """Dispatches a step, which has a batch for each shard, as often as it is to be run, and returns at once."""
        step = self.forward(batches)
        outputs = [self._outputs(step)]
        for _ in range(batches[0].num_steps - 1):
            packed = advance(step.packed, batches, self._layouts[step.bucket], self._slots)
            step = self._forward(batches, step.orders, step.bucket, packed)
            outputs.append(self._outputs(step))
        return StepHandle(outputs, step.orders, batches)

    def forward(self, batches: Sequence[ScheduledBatch]) -> ForwardStep:
        """Dispatches the model's part of a step and returns at once; `sample` must follow before the next step."""
        if self._leaves is None:
            raise RuntimeError("the engine sleeps: call wake_up() first")
        for shard, batch in enumerate(batches):
            for sequence in batch.sequences:
                if sequence.new_in_slot:
                    self._take_slot(shard, sequence)
        bucket, orders = self._pick(StepShape.of(batches)), [order_rows(batch) for batch in batches]
        return self._forward(batches, orders, bucket, pack(batches, orders, self._layouts[bucket], self._slots))

    def _forward(
        self, batches: Sequence[ScheduledBatch], orders: list[list[int]], bucket: Bucket, packed: np.ndarray
    ) -> ForwardStep:
        forward = self._compiler.get(bucket)
        args = self._leaves, self._caches, self._last_token, self._put_own(packed), self._take_held(bucket)
        self._caches, self._last_token, tokens, outputs = forward(*args)
        return ForwardStep(batches, orders, bucket, packed, tokens, outputs)

    def sample(self, step: ForwardStep, masks: Sequence[TokenMasks]) -> StepHandle:
        """Dispatches the rest of a step and returns at once.

        Args:
            step: The newest step.
            masks: What grammars allow, for each shard.
        """
        return StepHandle([self._outputs(self._mask(step, masks), has_masks=True)], step.orders, step.batches)

    def _outputs(self, step: ForwardStep, *, has_masks: bool = False) -> StepOutputs:
        batches, orders, bucket, outputs = step.batches, step.orders, step.bucket, step.outputs
        if self._held_outputs[bucket] is not None:
            self._held_outputs[bucket] = outputs
        tokens, logprobs = self._sample(step, has_masks=has_masks)
        prompt_logprobs, targets = None, prompt_targets(batches, orders, bucket.num_tokens)
        if targets is not None:
            compute = self._compiler.get(PromptLogprobsKey(bucket.num_tokens))
            prompt_logprobs = compute(self._leaves, outputs.hidden, self._put_own(targets))
        return StepOutputs(tokens, logprobs, prompt_logprobs)

    def _mask(self, step: ForwardStep, masks: Sequence[TokenMasks]) -> ForwardStep:
        """Takes the tokens that grammars do not allow out of a step's logits, which are given up."""
        num_seqs, layout = step.bucket.num_seqs, self._layouts[step.bucket]
        bitmask = np.full((len(masks), num_seqs, self._arrays.num_mask_words), -1, np.int32)
        packed = step.packed.copy()  # the device may still read the buffer
        parts = zip(bitmask, packed.reshape(len(masks), -1), step.orders, masks, strict=True)
        for own_bitmask, own_packed, order, own_masks in parts:
            own_bitmask[: len(order)] = own_masks.bitmask[order, : self._arrays.num_mask_words]
            # Where nothing is left but the end, min_tokens must not forbid it.
            features = layout.views(own_packed)["features"][: len(order)]
            features[own_masks.is_complete[order]] &= ~MIN_TOKENS
        mask = self._compiler.get(MaskKey(num_seqs))
        logits = mask(step.outputs.logits, self._put_own(bitmask.reshape(-1, self._arrays.num_mask_words)))
        return step._replace(packed=packed, outputs=step.outputs._replace(logits=logits))

    def _sample(self, step: ForwardStep, *, has_masks: bool) -> tuple[jax.Array, Logprobs | None]:
        """Samples what is not greedy; returns all tokens, and log probabilities if a row asks for them."""
        layout = self._layouts[step.bucket]
        rows = layout.rows_of(step.packed)
        wanted = layout.rows.wanted_features(rows)
        if has_masks:
            wanted |= RANDOM  # the forward part's most likely tokens do not count; greedy rows stay greedy
        if not wanted:
            return step.tokens, None
        features = feature_set(wanted | self._always_wanted)
        sampler = self._compiler.get(SamplerKey(step.bucket.num_seqs, features, self._processors))
        state = self._state if features == EVERY_FEATURE else None
        args = state, self._last_token, step.outputs.logits, self._put_own(rows)
        state, self._last_token, tokens, logprobs = sampler(*args)
        if features == EVERY_FEATURE:
            self._state = state
        return tokens, logprobs if wanted & LOGPROBS else None

    def _take_held(self, bucket: Bucket) -> ForwardOutputs | None:
        """The outputs of the last step of this shape, to be overwritten; None where none are kept."""
        if bucket not in self._held_outputs:
            self._held_outputs[bucket] = self._arrays.make_held(bucket)
        return self._held_outputs[bucket]

    def _put_own(self, x: np.ndarray) -> jax.Array | np.ndarray:
        """An argument whose first axis the shards share out."""
        return self._place.put(x, self._place.shards())

    def _take_slot(self, shard: int, sequence: ScheduledSequence) -> None:
        request = sequence.request
        params = request.sampling_params
        seed = params.seed
        if seed is None:  # the same for a request wherever and however often it runs
            seed = zlib.crc32(request.request_id.encode(), self.config.seed & 0xFFFFFFFF)
        processors = self._processor_bits(params.logits_processors or ())
        if self._slots[shard].take(sequence, seed, processors) & USES_STATE:
            set_slot_compiled = self._compiler.get(SetSlotKey())
            place = self._place
            values = slot_values(request, self._arrays.vocab_size)
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

    def _put(self, leaves: Iterable[Any]) -> list[jax.Array]:
        """Puts weights where they belong; those that are there stay."""
        if self._place.mesh is None:
            return [jnp.asarray(leaf) for leaf in leaves]
        return list(map(jax.device_put, leaves, self._leaf_places))

    def _allocate(self) -> None:
        # All of it there before a step runs anywhere: peers write into the workspace.
        self._caches = jax.block_until_ready(self._arrays.make_caches(self.num_pages))
        self._state, self._last_token = self._arrays.make_state()
        if self.config.platform == "gpu":
            largest = max(layout.size for layout in self._layouts.values()) * np.dtype(np.int32).itemsize
            self._walls = keep_small_places(lambda x: self._place.array(x, self._place.replicated()), largest)

    def sleep(self, level: int) -> None:
        """Frees the KV cache, and the weights too: level 1 keeps them in host memory, level 2 drops them."""
        if self._leaves is None:
            return
        if level == 1 and is_multiprocess():
            raise ValueError("level=1: not over several processes; level=2 loads the weights anew")
        if level == 1:
            self._offloaded = jax.device_get(self._leaves)
        weights = self._leaves if not self.is_cpu else []  # device_get shares memory there
        for array in jax.tree.leaves((weights, self._caches, self._state, self._last_token)):
            array.delete()
        self._leaves, self._caches, self._state, self._last_token = None, [], None, None
        self._held_outputs.clear()
        self._walls.clear()

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
        self._close_lowering_pool()
        gc.unfreeze()
        if self._leaves is not None:
            self.sleep(2)
