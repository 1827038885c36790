"""Where a step's arrays are: all on one device, or over the devices of a mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxengine.models.layers.param import spec_of
from jaxengine.sharding.distributed import is_multiprocess
from jaxengine.sharding.mesh import DATA, MODEL
from jaxengine.sharding.rules import named_sharding


class Placement:
    """The sharding of every array that a step reads or writes; None stands for the default device.

    Data-parallel shards hold the same parameters, and each its part of the first axis of everything else.

    Attributes:
        mesh: The devices; None for the default one.
        size: Devices that share the model.
        num_shards: Data-parallel shards.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh
        self.size = 1 if mesh is None else mesh.shape[MODEL]
        self.num_shards = 1 if mesh is None else mesh.shape[DATA]

    def context(self) -> contextlib.AbstractContextManager:
        """Returns what tracing needs around it."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def replicated(self) -> NamedSharding | None:
        """Returns the sharding of what all devices have; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def shards_sharding(self) -> NamedSharding | None:
        """Returns the sharding of what every shard has its own part of."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(DATA))

    def outputs_sharding(self) -> NamedSharding | None:
        """Returns the sharding of what the host reads: every process reads everything."""
        return self.replicated() if is_multiprocess() else self.shards_sharding()

    def put(self, x: np.ndarray, sharding: NamedSharding | None) -> jax.Array | np.ndarray:
        """Makes a host array, the same in all processes, an argument of a compiled function."""
        if sharding is None or not is_multiprocess():
            return x  # the call itself puts it in place, in half the time that `device_put` takes
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def array(self, x: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
        """Puts a host array, the same in all processes, in place."""
        return jax.device_put(self.put(x, sharding), sharding)

    def heads_sharding(self) -> NamedSharding | None:
        """Returns the sharding of pages, whose second axis is that of the heads."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(DATA, MODEL))

    def of_every_shard(self, function: Callable[..., Any], is_shared: Sequence[bool]) -> Callable[..., Any]:
        """Makes a function of one shard's arrays one of all shards', each by itself; to be traced in `context()`.

        The devices that share the model are left to the compiler, as in the function alone.

        Args:
            function: Its arguments and results have a first axis that the shards share out.
            is_shared: Of each argument: whether it is the same for all shards instead.
        """
        if self.num_shards == 1:
            return function
        own = PartitionSpec(DATA)
        specs = tuple(PartitionSpec() if shared else own for shared in is_shared)
        return jax.shard_map(function, in_specs=specs, out_specs=own, axis_names={DATA}, check_vma=False)

    def parameters(self, state: nnx.State) -> list[NamedSharding | None]:
        """Returns the shardings of a model's parameters: one for each of its leaves, in their order.

        A parameter is one array; a matrix of several arrays is several parameters of its layer.
        """
        variables = jax.tree.leaves(state, is_leaf=_is_variable)
        return [self._parameter(variable) for variable in variables for _ in jax.tree.leaves(variable)]

    def _parameter(self, param: nnx.Variable) -> NamedSharding | None:
        if self.mesh is None:
            return None
        axes = spec_of(param).axes
        stacked = (None,) * (len(param.shape) - len(axes))  # the layers of a `LayerStack`
        return named_sharding(self.mesh, (*stacked, *axes), param.shape)

    def columns_sharding(self, num_columns: int) -> NamedSharding | None:
        """Returns the sharding of what has a column for every token: where that token's logits are."""
        if self.mesh is None or num_columns % self.size:
            return self.shards_sharding()
        return NamedSharding(self.mesh, PartitionSpec(DATA, MODEL))

    def sampling_state(self, state: Any, vocab_size: int) -> Any:
        """Returns the shardings of the sampling state."""

        def of(x: jax.ShapeDtypeStruct) -> NamedSharding | None:
            has_column_per_token = len(x.shape) == 2 and x.shape[-1] == vocab_size
            return self.columns_sharding(vocab_size) if has_column_per_token else self.shards_sharding()

        return jax.tree.map(of, state)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def abstract(x: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and place of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def bytes_on_a_device(x: Any, sharding: NamedSharding | None) -> int:
    """Returns the bytes of an array's part on one device."""
    size = x.size * x.dtype.itemsize
    if sharding is None or not x.size:
        return size
    part = sharding.shard_shape(x.shape)
    for whole, own in zip(x.shape, part, strict=True):
        size = size // whole * own
    return size
