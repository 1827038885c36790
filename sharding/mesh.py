"""The device mesh that every step runs under."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

DATA, MODEL, EXPERT = MESH_AXES = ("data", "model", "expert")


def make_mesh(data: int = 1, model: int = 1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh ("data", "model", "expert").

    Args:
        data: Replicas of the model.
        model: Devices over which heads, FFN columns and vocabulary are split.
        expert: Devices over which experts are split.
        devices: The devices to use, at least `data * model * expert`; by default the first ones of the backend.

    Raises:
        ValueError: A size is not positive, or there are fewer devices than the mesh needs.
    """
    sizes = {"data": data, "model": model, "expert": expert}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {name} is {size}; it must be at least 1")
    available = list(jax.devices() if devices is None else devices)
    needed = data * model * expert
    if needed > len(available):
        raise ValueError(f"a mesh of {sizes} needs {needed} devices, but there are {len(available)}")
    return jax.make_mesh(
        (data, model, expert), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=available[:needed]
    )


def model_axis_size() -> int:
    """Returns devices that share the model, of the mesh under which a step is being traced; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(MODEL, 1)


EVERYWHERE, ROWS, COLUMNS = PartitionSpec(), PartitionSpec(MODEL), PartitionSpec(None, MODEL)
"""Places of a step's arrays: the same on all devices that share the model; the first axis over them; the second."""


def on_each_device(function: Callable[..., Any], places: Sequence[Any], out: Any = EVERYWHERE) -> Callable[..., Any]:
    """Makes a function of each device's own arrays one of all arrays, under the mesh at hand; XLA cuts nothing of it.

    Args:
        function: Sees of each argument what the device has of it.
        places: Of each argument: a `PartitionSpec`, or a tree of them.
        out: Of its results.
    """
    return jax.shard_map(function, in_specs=tuple(places), out_specs=out, check_vma=False)


def columns_in_place(x: jax.Array) -> jax.Array:
    """Keeps the columns of `[S, V]` with the devices that hold those tokens' logits.

    XLA decides alone where the results of a condition's branches are, and may gather them on every device.
    """
    size = model_axis_size()
    return x if size == 1 or x.shape[1] % size else lax.with_sharding_constraint(x, COLUMNS)
