"""Runs scheduled batches on the device: owns the weights, the KV cache and the sampling state."""

from __future__ import annotations

import functools
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.config import EngineConfig
from jaxengine.host_memory import release_free_memory
from jaxengine.models.causal_lm import CausalLM
from jaxengine.runner.buckets import NUM_REPEATS, Bucket
from jaxengine.runner.cache_scales import CacheScales
from jaxengine.runner.input_batch import ALL_BUT_MIN_TOKENS, SlotTable, advance, order_rows, pack, prompt_targets
from jaxengine.runner.memory import reserve_small_blocks
from jaxengine.runner.programs import GrammarMask, PromptLogprobs, Sampler, SetSlot
from jaxengine.runner.step_handle import ForwardStep, StepHandle, StepOutputs, StepShape
from jaxengine.runner.step_programs import StepPrograms
from jaxengine.runner.steps import FlatModel, ForwardOutputs, StepCaches
from jaxengine.runner.weight_update import Weights, WeightUpdater
from jaxengine.sampling.logprobs import Logprobs
from jaxengine.sampling.sampler import EVERY_FEATURE, USES_STATE, Feature, feature_set
from jaxengine.sampling.state import slot_values
from jaxengine.scheduler.batch import ScheduledBatch, ScheduledSequence
from jaxengine.sharding.distributed import is_multiprocess

if TYPE_CHECKING:
    from jaxengine.structured.matchers import TokenMasks

logger = logging.getLogger(__name__)

MAX_LOGITS_PROCESSORS = 31
RELEASE_SECONDS = 2.0
"""Between releases of freed memory, each of which takes some 10 ms."""


class ModelRunner:
    """Turns scheduled batches into tokens.

    Attributes:
        programs: What it runs.
    """

    def __init__(self, programs: StepPrograms):
        """Takes the programs, which may still be compiling; `load` brings the weights."""
        self.programs = programs
        self.config: EngineConfig = programs.config
        context = programs.context
        self._layouts, self._place, self._arrays = context.layouts, context.place, context.arrays
        self._leaves: list[jax.Array] | None = None
        self._offloaded: list[np.ndarray] | None = None
        self._slots = [
            SlotTable(self.config.scheduler.max_num_seqs, context.tables, self.config.model.vocab_size)
            for _ in range(self._place.num_shards)
        ]
        self._cache_scales: CacheScales | None = None
        self._caches: StepCaches | None = None
        self._state: Any = None
        self._last_token: Any = None
        self._reused_outputs: dict[Bucket, ForwardOutputs | None] = {}
        self._walls: list[jax.Array] = []
        self._released = time.monotonic()

    def load(self, model: CausalLM, calibration_tokens: Sequence[int] = ()) -> None:
        """Takes the weights of a model of the same structure, and allocates the cache.

        Args:
            model: The model.
            calibration_tokens: What scales of the cache are measured on, if it has any; needed the first time only.
        """
        self._take_weights(model, calibration_tokens)
        self._allocate()

    def _take_weights(self, model: CausalLM, calibration_tokens: Sequence[int] = ()) -> None:
        if self.programs.context.is_stacked:
            model.stack_layers()
        leaves = self._put(FlatModel(model).leaves)
        if self.config.model.cache_scales:
            self._cache_scales = self._cache_scales or CacheScales(self.programs.context, calibration_tokens)
            leaves = self._cache_scales.fill(leaves)
        self._leaves = leaves
        release_free_memory()

    def update_weights(self, weights: Weights) -> None:
        """Puts new weights in place of some or all; nothing is compiled again. See `LLM.update_weights`.

        Args:
            weights: Names as in the checkpoint, and arrays.

        Raises:
            ValueError: A name, a shape or a dtype is wrong; then nothing has changed.
            RuntimeError: The engine sleeps; or it has to sleep now, as at level 2, for not all could be put in place.
        """
        if self._leaves is None:
            raise RuntimeError("the engine has no weights while it sleeps: wake_up() before update_weights()")
        changes = self._updater.check(weights)
        try:
            self._updater.apply(changes, self._leaves)
        except BaseException as error:
            self.sleep(2)
            raise RuntimeError(
                "the new weights could not all be put in place, so the engine sleeps: wake_up() loads its checkpoint"
            ) from error
        if self._cache_scales is not None:
            self._leaves = self._cache_scales.refresh(self._leaves)

    @functools.cached_property
    def _updater(self) -> WeightUpdater:
        return WeightUpdater(self.programs.context)

    # Running

    def execute(self, batches: Sequence[ScheduledBatch]) -> StepHandle:
        """Dispatches a step, which has a batch for each shard, as often as it is to be run, and returns at once."""
        bucket, orders = self._prepare(batches)
        buffers = [self._pack(batches, orders, bucket)]
        while len(buffers) < batches[0].num_steps:
            buffers.append(advance(buffers[-1], batches, self._layouts[bucket], self._slots))
        outputs = []
        if len(buffers) >= NUM_REPEATS:
            repeat = self.programs.repeated(bucket, self._wanted_features(bucket, buffers[0]))
            while repeat is not None and len(buffers) >= NUM_REPEATS:
                outputs.append(StepOutputs(self._repeat(repeat, buffers[:NUM_REPEATS]), None, None))
                del buffers[:NUM_REPEATS]
        outputs += [self._outputs(self._forward(batches, orders, bucket, packed)) for packed in buffers]
        return StepHandle(outputs, orders, batches)

    def forward(self, batches: Sequence[ScheduledBatch]) -> ForwardStep:
        """Dispatches the model's part of a step and returns at once; `sample` must follow before the next step."""
        bucket, orders = self._prepare(batches)
        return self._forward(batches, orders, bucket, self._pack(batches, orders, bucket))

    def _prepare(self, batches: Sequence[ScheduledBatch]) -> tuple[Bucket, list[list[int]]]:
        """Fills the slots of new requests; returns the step's shape, and the order of its rows."""
        if self.is_sleeping:
            raise RuntimeError("the engine sleeps: call wake_up() first")
        self._release_gaps()
        for shard, batch in enumerate(batches):
            for sequence in batch.sequences:
                if sequence.new_in_slot:
                    self._take_slot(shard, sequence)
        return self.programs.pick(StepShape.of(batches)), [order_rows(batch) for batch in batches]

    def _pack(self, batches: Sequence[ScheduledBatch], orders: list[list[int]], bucket: Bucket) -> np.ndarray:
        return pack(batches, orders, self._layouts[bucket], self._slots)

    def _wanted_features(self, bucket: Bucket, packed: np.ndarray) -> int:
        """What a step's sampler has to do; 0 if the model's most likely tokens are all that is wanted."""
        layout = self._layouts[bucket]
        return layout.rows.wanted_features(layout.rows_of(packed))

    def _repeat(self, repeat: Callable, buffers: Sequence[np.ndarray]) -> jax.Array:
        """Dispatches a step of each buffer in one call; returns the tokens, i32[S, times] of each shard."""
        packed = np.stack([x.reshape(self._place.num_shards, -1) for x in buffers], axis=1).reshape(-1)
        args = self._leaves, self._caches, self._last_token, self._put_own(packed)
        self._caches, self._last_token, tokens = repeat(*args)
        return tokens

    def _forward(
        self, batches: Sequence[ScheduledBatch], orders: list[list[int]], bucket: Bucket, packed: np.ndarray
    ) -> ForwardStep:
        forward = self.programs.step(bucket)
        args = self._leaves, self._caches, self._last_token, self._put_own(packed), self._take_reused_outputs(bucket)
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
        if self._reused_outputs[bucket] is not None:
            self._reused_outputs[bucket] = outputs
        tokens, logprobs = self._sample(step, has_masks=has_masks)
        prompt_logprobs, targets = None, prompt_targets(batches, orders, bucket.num_tokens)
        if targets is not None:
            compute = self.programs.get(PromptLogprobs(bucket.num_tokens))
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
            features[own_masks.is_complete[order]] &= ALL_BUT_MIN_TOKENS
        mask = self.programs.get(GrammarMask(num_seqs))
        logits = mask(step.outputs.logits, self._put_own(bitmask.reshape(-1, self._arrays.num_mask_words)))
        return step._replace(packed=packed, outputs=step.outputs._replace(logits=logits))

    def _sample(self, step: ForwardStep, *, has_masks: bool) -> tuple[jax.Array, Logprobs | None]:
        """Samples what is not greedy; returns all tokens, and log probabilities if a row asks for them."""
        wanted = self._wanted_features(step.bucket, step.packed)
        if has_masks:
            wanted |= (
                Feature.RANDOM.value
            )  # the forward part's most likely tokens do not count; greedy rows stay greedy
        if not wanted:
            return step.tokens, None
        features = feature_set(wanted | self.programs.always_wanted)
        sampler = self.programs.get(Sampler(step.bucket.num_seqs, features, self.programs.processors))
        state = self._state if features == EVERY_FEATURE else None
        rows = self._layouts[step.bucket].rows_of(step.packed)
        args = state, self._last_token, step.outputs.logits, self._put_own(rows)
        state, self._last_token, tokens, logprobs = sampler(*args)
        if features == EVERY_FEATURE:
            self._state = state
        return tokens, logprobs if wanted & Feature.LOGPROBS.value else None

    def _take_reused_outputs(self, bucket: Bucket) -> ForwardOutputs | None:
        """The outputs of the last step of this shape, to be overwritten; None where none are kept."""
        if bucket not in self._reused_outputs:
            self._reused_outputs[bucket] = self._arrays.make_reused_outputs(bucket)
        return self._reused_outputs[bucket]

    def _put_own(self, x: np.ndarray) -> jax.Array | np.ndarray:
        """An argument whose first axis the shards share out."""
        return self._place.put(x, self._place.shards_sharding())

    def _take_slot(self, shard: int, sequence: ScheduledSequence) -> None:
        request = sequence.request
        params = request.sampling_params
        seed = params.seed
        if seed is None:  # the same for a request wherever and however often it runs
            seed = zlib.crc32(request.request_id.encode(), self.config.seed & 0xFFFFFFFF)
        processors = self._processor_bits(params.logits_processors or ())
        if self._slots[shard].take(sequence, seed, processors) & USES_STATE:
            set_slot_compiled = self.programs.get(SetSlot())
            place = self._place
            values = slot_values(request, self._arrays.vocab_size)
            values = jax.tree.map(lambda x: place.put(x, place.replicated()), values)
            slots = np.full(len(self._slots), self.config.scheduler.max_num_seqs, np.int32)  # out of range: none
            slots[shard] = sequence.slot
            self._state = set_slot_compiled(self._state, place.put(slots, place.shards_sharding()), values)

    def _processor_bits(self, processors) -> int:
        new = tuple(p for p in processors if p not in self.programs.processors)
        if new:
            if len(self.programs.processors) + len(new) > MAX_LOGITS_PROCESSORS:
                raise ValueError(
                    f"logits_processors: at most {MAX_LOGITS_PROCESSORS} different ones in an engine's life"
                )
            logger.warning("compiling again for a logits processor that was not given to LLM(logits_processors=[...])")
            self.programs.processors += new
        return sum(1 << self.programs.processors.index(p) for p in processors)

    # Memory

    def _release_gaps(self) -> None:
        """On CPU, now and then: arrays of steps of many sizes leave gaps in the heap, which would grow by 0.1 GB."""
        if self.config.platform == "cpu" and time.monotonic() - self._released > RELEASE_SECONDS:
            release_free_memory()
            self._released = time.monotonic()

    def _put(self, leaves: Iterable[Any]) -> list[jax.Array]:
        """Puts weights where they belong; those that are there stay."""
        if self._place.mesh is None:
            return [jnp.asarray(leaf) for leaf in leaves]
        return list(map(jax.device_put, leaves, self.programs.context.leaf_shardings))

    def _allocate(self) -> None:
        # All of it there before a step runs anywhere: peers write into the workspace.
        self._caches = jax.block_until_ready(self._arrays.make_caches(self.programs.num_pages))
        self._state, self._last_token = self._arrays.make_state()
        if self.config.platform == "gpu":
            largest = max(layout.size for layout in self._layouts.values()) * np.dtype(np.int32).itemsize
            self._walls = reserve_small_blocks(lambda x: self._place.array(x, self._place.replicated()), largest)

    def check_sleep(self, level: int) -> None:
        """Raises ValueError if this engine cannot sleep at this level."""
        if level == 1 and is_multiprocess():
            raise ValueError("level=1: not over several processes; level=2 loads the weights anew")

    def sleep(self, level: int) -> None:
        """Frees the KV cache, and the weights too: level 1 keeps them in host memory, level 2 drops them."""
        self.check_sleep(level)
        if level == 2:
            self._offloaded = None
        elif self._leaves is not None:
            self._offloaded = jax.device_get(self._leaves)
        weights = self._leaves if self.config.platform != "cpu" else []  # device_get shares memory there
        for array in jax.tree.leaves((weights, self._caches, self._state, self._last_token)):
            array.delete()
        self._leaves = self._caches = self._state = self._last_token = None
        self._reused_outputs.clear()
        self._walls.clear()

    @property
    def has_weights(self) -> bool:
        """Whether the weights are on the device."""
        return self._leaves is not None

    @property
    def is_sleeping(self) -> bool:
        """Whether weights or cache are to be woken."""
        return self._leaves is None or self._caches is None

    def wake_up(self, tags: Sequence[str], reload_model: Callable[[], CausalLM]) -> None:
        """Takes memory back.

        Args:
            tags: "weights", "kv_cache" or both; what is there already stays.
            reload_model: Gives the model anew after a sleep of level 2.
        """
        if "weights" in tags and self._leaves is None:
            if self._offloaded is None:
                self._take_weights(reload_model())
            else:
                self._leaves, self._offloaded = self._put(self._offloaded), None
        if "kv_cache" in tags and self._caches is None:
            self._allocate()

    def close(self) -> None:
        """Ends what compiles, and frees the device memory."""
        self.programs.close()
        self.sleep(2)
