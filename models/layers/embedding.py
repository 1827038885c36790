"""Token and position embeddings."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxengine.models.layers.param import parameter
from jaxengine.sharding import axes
from jaxengine.sharding.mesh import MODEL, model_axis_size
from jaxengine.sharding.rules import RULES


class Embedding(nnx.Module):
    """A table `[V, D]` of vectors."""

    def __init__(self, num_rows: int, dim: int, *, row_axis: str = axes.VOCAB, dtype: DTypeLike, rngs: nnx.Rngs | None):
        """Makes the table; `row_axis` is the logical axis of its rows. Vectors come out in `dtype`."""
        self.dtype = jnp.dtype(dtype)
        self.is_split = RULES[row_axis] == MODEL
        self.weight = parameter((num_rows, dim), (row_axis, axes.EMBED), dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:  # [T] -> [T, D]
        """Looks rows up; ids out of range are clipped (they occur in padding, and beyond the end of a request)."""
        size = model_axis_size()
        if not self.is_split or self.weight.shape[0] % size:
            size = 1
        lookup = _lookup if size == 1 else _over_rows(self.weight.shape[0] // size)
        return lookup(self.weight[...], ids).astype(self.dtype)


def _lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0, mode="clip")


def _over_rows(num_rows: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Looks up where every device holds `num_rows` rows: the one that has a row tells the others.

    Said outright, since of a lookup of a single row XLA makes a slice, for which it gathers the whole table.
    """

    def of_one_device(table, ids):
        own = ids - lax.axis_index(MODEL) * num_rows
        is_here = (own >= 0) & (own < num_rows)
        return lax.psum(jnp.where(is_here[:, None], _lookup(table, own), 0), MODEL)

    specs = (PartitionSpec(MODEL), PartitionSpec())
    return jax.shard_map(of_one_device, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
