"""Token and position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.models.layers.param import parameter
from jaxengine.sharding import axes


class Embedding(nnx.Module):
    """A table `[V, D]` of vectors."""

    def __init__(self, num_rows: int, dim: int, *, row_axis: str = axes.VOCAB, dtype: DTypeLike, rngs: nnx.Rngs | None):
        """Makes the table; `row_axis` is the logical axis of its rows. Vectors come out in `dtype`."""
        self.dtype = jnp.dtype(dtype)
        self.weight = parameter((num_rows, dim), (row_axis, axes.EMBED), dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:  # [T] -> [T, D]
        """Looks rows up; ids out of range are clipped (they occur in padding only)."""
        return jnp.take(self.weight[...], ids, axis=0, mode="clip").astype(self.dtype)
