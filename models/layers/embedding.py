"""Token and position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxengine.models.layers.matrix import LayerBuilder, Matrix, MatrixLayer
from jaxengine.sharding import axes
from jaxengine.sharding.mesh import EVERYWHERE, MODEL, model_axis_size, on_each_device
from jaxengine.sharding.rules import RULES


class Embedding(MatrixLayer):
    """A table `[V, D]` of vectors."""

    def __init__(self, num_rows: int, dim: int, build: LayerBuilder, *, row_axis: str = axes.VOCAB):
        """Makes the table; `row_axis` is the logical axis of its rows. Vectors come out in the builder's dtype."""
        super().__init__(num_rows, dim, (row_axis, axes.EMBED), build)
        self.dtype = jnp.dtype(build.dtype)
        self.is_split = RULES[row_axis] == MODEL

    def __call__(self, ids: jax.Array) -> jax.Array:  # [T] -> [T, D]
        """Looks rows up; ids out of range are clipped (they occur in padding, and beyond the end of a request)."""
        size, matrix = model_axis_size(), self.matrix
        if size == 1 or not self.is_split or matrix.shape[0] % size:
            return matrix.take(ids).astype(self.dtype)
        take = on_each_device(_take_from_peers, (self.matrix_places, EVERYWHERE))
        return take(matrix, ids).astype(self.dtype)


def _take_from_peers(matrix: Matrix, ids: jax.Array) -> jax.Array:
    """Looks up where every device holds some rows of the matrix: the one that has a row tells the others.

    Said outright, since of a lookup of a single row XLA makes a slice, for which it gathers the whole table.
    """
    num_rows = matrix.shape[0]
    own = ids - lax.axis_index(MODEL) * num_rows
    is_here = (own >= 0) & (own < num_rows)
    return lax.psum(jnp.where(is_here[:, None], matrix.take(own), 0), MODEL)
