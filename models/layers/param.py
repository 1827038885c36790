"""What a parameter is: shape, dtype, logical axes, and what it is made of in a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.sharding.layout import Part, Runs, fused_runs

INIT_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """All there is to know of a parameter but its values; metadata `spec` of its `nnx.Param`.

    Attributes:
        shape: Over all devices.
        dtype: Name of its dtype.
        axes: One logical axis (of `sharding.axes`) for each dimension.
        init: "normal" (standard deviation 0.02), "ones" or "zeros": dummy weights.
        parts: Of each dimension, the parts of it that a checkpoint has, laid end to end; empty for one that is as it is
            there. At most one dimension has several parts, each of which is a tensor of its own, or all are one.
        num_devices: How many share the model: parts lie device by device.
        block: Of an array beside a matrix, such as its scales: how many of the matrix's numbers along each dimension
            one of its own stands for. Empty: one.
        tensors: Last names of the checkpoint's tensors that each part is read from; empty for the parameter's own name.
        decode: Makes a part of these tensors, if it is not one of them as it is. See `WeightSpec`.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    init: str = "normal"
    parts: tuple[tuple[Part, ...], ...] = ()
    num_devices: int = 1
    block: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    decode: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes is {self.axes}; shape {self.shape} needs {len(self.shape)}")
        if self.parts and len(self.parts) != len(self.shape):
            raise ValueError(
                f"parts has {len(self.parts)} entries; shape {self.shape} needs {len(self.shape)}, or none"
            )
        if sum(len(parts) > 1 for parts in self.parts) > 1:
            raise ValueError("parts: several dimensions have several parts; at most one may")
        for parts, size in zip(self.parts, self.shape, strict=False):
            if parts and sum(part.own_size for part in parts) != size:
                raise ValueError(f"parts {[part.name for part in parts]} do not add up to {size} of {self.shape}")

    @property
    def fused_axis(self) -> int:
        """The dimension that has several parts; 0 if none has."""
        return next((axis for axis, parts in enumerate(self.parts) if len(parts) > 1), 0)

    @property
    def fused_parts(self) -> tuple[Part, ...]:
        """The several parts that the parameter has; none or one if it is not fused."""
        return self.parts[self.fused_axis] if self.parts else ()

    @functools.cached_property
    def runs(self) -> tuple[Runs, ...]:
        """Of each dimension, where its rows are in the checkpoint's parts laid end to end."""
        parts = self.parts or ((),) * len(self.shape)
        return tuple(fused_runs(own, self.num_devices) if own else () for own in parts)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in a checkpoint, all parts laid end to end."""
        parts = self.parts or ((),) * len(self.shape)
        return tuple(sum(p.size for p in own) if own else size for own, size in zip(parts, self.shape, strict=True))

    def part_shapes(self) -> list[tuple[int, ...]]:
        """Returns the shape in a checkpoint of each part."""
        shape, axis = self.stored_shape, self.fused_axis
        sizes = [part.size for part in self.fused_parts] or [shape[axis] if shape else 1]
        return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def make_parameter(spec: ParameterSpec, rngs: nnx.Rngs | None) -> nnx.Param:
    """Makes a parameter.

    Args:
        spec: What it is.
        rngs: Random numbers for its initial value. None makes it abstract (a `jax.ShapeDtypeStruct`), for the loader
            to fill: building a model then takes no time and no memory.
    """
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)
    return nnx.Param(initial_value(rngs.params(), spec.shape, spec.dtype, spec.init), spec=spec)


def spec_of(param: nnx.Variable) -> ParameterSpec:
    """Returns what a parameter is; of one of stacked layers, what it is in each of them."""
    return param.get_metadata("spec")


def initial_value(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, init: str) -> jax.Array:
    """Returns an initial value of one of the kinds that `ParameterSpec.init` names."""
    if init == "normal":
        return (INIT_SCALE * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jnp.full(shape, {"ones": 1, "zeros": 0}[init], dtype)
