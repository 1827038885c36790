"""The scales of keys and values in caches of 8 bits: measured on some tokens where the checkpoint has none."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.models.layers.cache_scale import CACHE_LIMITS
from jaxengine.models.step import ModelInputs, SlotRows, StepContext
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata, make_cache
from jaxengine.runner.programs import ProgramContext

NUM_TOKENS = 512
TEXT = """The river had risen in the night. By seven o'clock the lower road was under water, and Mrs Okafor, who kept
the ferry, stood on the step with her hands in her pockets. "Nobody crosses today," she said. "Not for 20 dollars."

A matrix is invertible if and only if its determinant is not zero. For a 2 x 2 matrix [[a, b], [c, d]] that number is
ad - bc; with a = 3, b = 1, c = 4 and d = 2 it is 6 - 4 = 2, so the inverse exists.

def mean(values: list[float]) -> float:
    # Of at least one value.
    return sum(values) / len(values)

Les marchés ont ouvert en hausse mardi, portés par l'énergie (+2,4 %) et les banques. Der Zug nach Köln fährt heute von
Gleis 7. El museo abre a las diez. 今日は雨が降っています。Температура воды 18 градусов.

Q: What should I pack for three days in the mountains?
A: 1. A warm layer and a rain jacket. 2. Water, 2 litres a day. 3. A map; phones lose signal above 1,800 m. 4. Something
sweet. Leave the third pair of shoes at home!
"""
HEADROOM = {"float8_e4m3fn": 2.0, "int8": 1.0}
"""By how much what is cached may exceed what was measured. It costs a float nothing, but an integer its precision."""
SCALE = re.compile(r"layers\.(?P<layer>\d+|layer)\.(.*\.)?(?P<which>[kv])_scale")


class CacheScales:
    """Measures the largest keys and values of each head, and makes scales of them.

    The tokens are always the same: answers must not depend on who asked first.
    """

    def __init__(self, context: ProgramContext, token_ids: Sequence[int]):
        """Takes the engine, and tokens of an ordinary text."""
        self._context = context
        num_tokens = min(NUM_TOKENS, context.config.scheduler.max_model_len, len(token_ids))
        self._token_ids = np.array(token_ids[:num_tokens], np.int32)
        paths = [SCALE.fullmatch(path) for path in context.model.paths()]
        self._scales = {leaf: found for leaf, found in enumerate(paths) if found}
        self._given: dict[int, jax.Array] = {}
        place = context.place
        self._measure = jax.jit(place.of_every_shard(self._measure_one_shard, [True, True]))

    def fill(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """Returns the leaves of a model that was just loaded, with scales in place of those that are 0."""
        self._given = {leaf: leaves[leaf] for leaf in self._scales}
        if all(bool(jnp.all(given > 0)) for given in self._given.values()):
            return leaves
        return self.refresh(leaves)

    def refresh(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """Returns leaves with scales measured anew, as after a change of weights; those of the checkpoint stay."""
        with self._context.place.context():
            measured = self._measure(leaves, self._token_ids)
        leaves, limit = list(leaves), CACHE_LIMITS[self._context.config.kv_cache_dtype]
        for leaf, largest in zip(self._scales, measured, strict=True):
            scale = largest[0] * (HEADROOM[self._context.config.kv_cache_dtype] / limit)
            scale = jnp.where(scale > 0, scale, 1.0)  # of heads of zeros
            leaves[leaf] = jax.device_put(
                jnp.where(self._given[leaf] > 0, self._given[leaf], scale), self._context.leaf_shardings[leaf]
            )
        return leaves

    def _measure_one_shard(self, leaves: Sequence[jax.Array], token_ids: jax.Array) -> list[jax.Array]:
        """Of each leaf of scales, the largest of each head, f32[1, K], or f32[1, L, K] of stacked layers."""
        model, layout = self._context.model.merge(leaves), self._context.config.model.cache_layout
        outputs = model(ModelInputs(token_ids, jnp.arange(token_ids.shape[0])), self._caches(), self._step())
        largest = []
        for found in self._scales.values():
            layers = range(len(layout.cache_of)) if found["layer"] == "layer" else [int(found["layer"])]
            own = [self._largest(outputs.caches, layer, is_key=found["which"] == "k") for layer in layers]
            largest.append((jnp.stack(own) if found["layer"] == "layer" else own[0])[None])
        return largest

    @property
    def _num_pages(self) -> int:
        """Of each group."""
        return -(-len(self._token_ids) // self._context.config.block_size)

    def _caches(self) -> list[Any]:
        """Caches of full precision, for the tokens alone."""
        config, layout = self._context.config, self._context.config.model.cache_layout
        spec = layout.groups[0].attention(config.attention, self._context.place.size)
        spec = dataclasses.replace(spec, cache_dtype=config.dtype)
        num_pages, num_arrays = len(layout.groups) * self._num_pages, layout.num_arrays
        if self._context.is_stacked:
            num_pages, num_arrays = num_pages * num_arrays, 1
        size, backend = self._context.place.size, config.attention_backend
        pages = [make_cache(spec, num_pages, backend, num_devices=size) for _ in range(num_arrays)]
        states = [tuple(jnp.zeros((1, *shape), dtype) for shape, dtype in state.shapes) for state in layout.states]
        return [*pages, *states]

    def _step(self) -> StepContext:
        """Of one sequence, which has pages of its own in each group."""
        num_tokens, num_pages = len(self._token_ids), self._num_pages
        starts = jnp.array([0, num_tokens], jnp.int32)

        def attention(group: int) -> AttentionMetadata:
            return AttentionMetadata(
                jnp.array([num_tokens], jnp.int32),
                starts,
                group * num_pages + jnp.arange(num_pages, dtype=jnp.int32)[None],
                jnp.int32(1),
                jnp.int32(num_tokens == 1),
                implementation=self._context.config.attention_backend,
            )

        zero = jnp.zeros(1, jnp.int32)
        groups = range(len(self._context.config.model.cache_layout.groups))
        return StepContext(tuple(map(attention, groups)), SlotRows(zero, zero, starts))

    def _largest(self, caches: Sequence[Any], layer: int, *, is_key: bool) -> jax.Array:
        """The largest absolute number among a layer's keys or values, of each head: f32[K]."""
        layout, num_pages = self._context.config.model.cache_layout, self._num_pages
        group = layout.group_of[layer]
        assert group is not None
        index, first = (0, layer) if self._context.is_stacked else (layout.cache_of[layer], group)
        cache, first = layout.view(caches[index], layout.groups[group]), first * num_pages
        if len(cache) == 1:  # keys and values side by side
            half = cache[0].shape[-1] // 2
            part = cache[0][..., :half] if is_key else cache[0][..., half:]
        else:
            part = cache[0 if is_key else 1]
        return jnp.max(jnp.abs(part[first : first + num_pages].astype(jnp.float32)), axis=(0, 2, 3))
