"""How every parameter is made: with its logical axes, and abstract unless random numbers are given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.sharding.layout import Runs

INIT_SCALE = 0.02


def parameter(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs | None,
    init: str = "normal",
    parts: tuple[int, ...] = (),
    rows: Runs = (),
    columns: Runs = (),
) -> nnx.Param:
    """Makes a parameter that knows its logical axes.

    Args:
        shape: Its shape.
        axes: One logical axis (of `sharding.axes`) for each dimension.
        dtype: Its dtype.
        rngs: Random numbers for its initial value. None makes it abstract (a `jax.ShapeDtypeStruct`), for the loader
            to fill: building a model then takes no time and no memory.
        init: "normal" (standard deviation 0.02), "ones" or "zeros"; kept as metadata for dummy weights.
        parts: Sizes along the first axis of the checkpoint's tensors that it is made of, if it is fused.
        rows: Which of those tensors' rows it holds, in which order, if not all as they are there.
        columns: Likewise along the second axis.
    """
    value = jax.ShapeDtypeStruct(shape, dtype) if rngs is None else initial_value(rngs.params(), shape, dtype, init)
    # Not named `sharding` or `out_sharding`: Flax would then want a mesh at hand whenever the value is set.
    return nnx.Param(value, axes=axes, init=init, parts=parts or shape[:1], rows=rows, columns=columns)


def initial_value(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, init: str) -> jax.Array:
    """An initial value of one of the kinds that `parameter` names."""
    if init == "normal":
        return (INIT_SCALE * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jnp.full(shape, {"ones": 1, "zeros": 0}[init], dtype)
