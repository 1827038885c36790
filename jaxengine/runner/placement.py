"""Where a step's arrays are: all on one device, or over the devices of a mesh."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxengine.sharding.mesh import MODEL
from jaxengine.sharding.rules import named_sharding


class Placement:
    """The sharding of every array that a step reads or writes; None stands for the default device."""

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh
        self.size = 1 if mesh is None else mesh.shape[MODEL]

    def context(self) -> contextlib.AbstractContextManager:
        """What tracing needs around it."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def replicated(self) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def heads(self) -> NamedSharding | None:
        """Of pages, whose second axis is that of the heads."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(None, MODEL))

    def parameters(self, state: nnx.State) -> list[NamedSharding | None]:
        """Of a model's parameters, in the order of their leaves."""
        return jax.tree.leaves(
            jax.tree.map(self._parameter, state, is_leaf=_is_variable), is_leaf=lambda leaf: leaf is None
        )

    def _parameter(self, param: nnx.Variable) -> NamedSharding | None:
        if self.mesh is None:
            return None
        axes = param.get_metadata("axes")
        stacked = (None,) * (len(param.shape) - len(axes))  # the layers of a `LayerStack`
        return named_sharding(self.mesh, (*stacked, *axes), param.shape)

    def columns(self, num_columns: int) -> NamedSharding | None:
        """Of what has a column for every token: where that token's logits are."""
        if self.mesh is None or num_columns % self.size:
            return self.replicated()
        return NamedSharding(self.mesh, PartitionSpec(None, MODEL))

    def sampling_state(self, state: Any, vocab_size: int) -> Any:
        """Of the sampling state."""

        def of(x: jax.ShapeDtypeStruct) -> NamedSharding | None:
            has_column_per_token = len(x.shape) == 2 and x.shape[-1] == vocab_size
            return self.columns(vocab_size) if has_column_per_token else self.replicated()

        return jax.tree.map(of, state)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def abstract(x: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    """The shape, dtype and place of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def bytes_on_a_device(x: Any, sharding: NamedSharding | None) -> int:
    """Bytes of an array's part on one device."""
    size = x.size * x.dtype.itemsize
    if sharding is None or not x.size:
        return size
    part = sharding.shard_shape(x.shape)
    for whole, own in zip(x.shape, part, strict=True):
        size = size // whole * own
    return size
