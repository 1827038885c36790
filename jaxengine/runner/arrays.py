"""The arrays beside the weights that a step reads, carries and returns: shapes, dtypes, and where they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxengine.config import EngineConfig
from jaxengine.pallas_kernels.all_reduce import has_kernel, make_workspace
from jaxengine.pallas_kernels.ragged_paged_attention import make_cache
from jaxengine.runner.buckets import Bucket
from jaxengine.runner.placement import Placement, abstract
from jaxengine.runner.steps import ForwardOutputs, StepCaches
from jaxengine.sampling.state import SamplingState, make_sampling_state

# On a GPU, decodes of up to so many sequences keep their outputs for the next step to overwrite: larger steps take
# longer than the host does, and their logits much memory.
MAX_REUSED_SEQS = 64


class StepArrays:
    """Makes them, or tells what they will be.

    Attributes:
        place: Where everything is.
        vocab_size: V.
        num_mask_words: 32-bit words of a row of a grammar's mask.
    """

    def __init__(self, config: EngineConfig, place: Placement, *, is_stacked: bool):
        """Takes what decides them; with `is_stacked` one cache holds the pages of all layers."""
        self.config, self.place = config, place
        self.vocab_size = config.model.vocab_size
        self.num_mask_words = -(-self.vocab_size // 32)
        self._is_stacked = is_stacked

    def per_shard(self, shape: tuple[int, ...], dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        """Returns what every shard has so much of, one part after the other."""
        shape = (self.place.num_shards * shape[0], *shape[1:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.place.shards_sharding())

    def abstract_state(self) -> tuple[SamplingState, jax.ShapeDtypeStruct]:
        """Returns the sampling state, and the token sampled last in each slot."""
        state = jax.eval_shape(self._empty_slots)
        state = jax.tree.map(abstract, state, self.place.sampling_state(state, self.vocab_size))
        return state, self.per_shard((self.config.scheduler.max_num_seqs,))

    def abstract_reused_outputs(self, bucket: Bucket) -> ForwardOutputs | None:
        """Returns the outputs that a step of this shape overwrites; None for one that does not."""
        if self.config.platform != "gpu" or not bucket.decode_only or bucket.num_seqs > MAX_REUSED_SEQS:
            return None
        logits = self.per_shard((bucket.num_seqs, self.vocab_size), jnp.float32)
        hidden = self.per_shard((bucket.num_tokens, self.config.model.hidden_size), self.config.dtype)
        return ForwardOutputs(abstract(logits, self.place.columns_sharding(self.vocab_size)), hidden)  # pyright: ignore[reportArgumentType]

    def sums_over_peers(self, num_tokens: int) -> bool:
        """Returns whether devices hand each other their parts of sums [T, D] in a kernel of ours."""
        x = jax.ShapeDtypeStruct((num_tokens, self.config.model.hidden_size), self.config.dtype)
        return self.config.all_reduce_backend != "reference" and has_kernel(x, self.place.size)

    def make_caches(self, num_pages: int) -> StepCaches:
        """Returns the caches of so many pages a shard, and the workspace of sums over devices, if a step has any."""
        config, place, layout = self.config, self.place, self.config.model.cache_layout
        num_pages, num_arrays = place.num_shards * num_pages, layout.num_arrays
        if self._is_stacked:
            num_pages, num_arrays = num_pages * num_arrays, 1
        sharding, spec = place.heads_sharding(), layout.groups[0].attention(config.attention, place.size)
        where: dict[str, Any] = {"num_devices": place.size, "sharding": sharding}
        layers = [make_cache(spec, num_pages, config.attention_backend, **where) for _ in range(num_arrays)]
        num_slots = place.num_shards * config.scheduler.max_num_seqs
        layers += [
            tuple(jnp.zeros((num_slots, *shape), dtype, device=sharding) for shape, dtype in state.shapes)
            for state in layout.states
        ]
        if sharding is None or not self.sums_over_peers(1):
            return StepCaches(layers)
        return StepCaches(layers, make_workspace(place.size, config.model.hidden_size, config.dtype, sharding))

    def make_reused_outputs(self, bucket: Bucket) -> ForwardOutputs | None:
        """Returns what `abstract_reused_outputs` tells of, for the first step of that shape."""
        reused_outputs = self.abstract_reused_outputs(bucket)
        return jax.tree.map(lambda x: self.place.array(np.zeros(x.shape, x.dtype), x.sharding), reused_outputs)

    def make_state(self) -> tuple[SamplingState, jax.Array]:
        """Returns what `abstract_state` tells of, for empty slots."""
        state, last_token = self.abstract_state()
        places = jax.tree.map(lambda x: x.sharding, (state, last_token)) if self.place.mesh is not None else None
        make = jax.jit(lambda: (self._empty_slots(), jnp.zeros(last_token.shape, jnp.int32)), out_shardings=places)
        return make()

    def _empty_slots(self) -> SamplingState:
        return make_sampling_state(self.place.num_shards * self.config.scheduler.max_num_seqs, self.vocab_size)
