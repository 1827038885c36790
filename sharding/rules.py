"""The one table from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxengine.sharding import axes

RULES: dict[str, str | None] = {
    axes.VOCAB: "model",
    axes.EMBED: None,
    axes.QKV_HEADS: "model",
    axes.HEADS: "model",
    axes.HEAD_DIM: None,
    axes.MLP: "model",
    axes.POSITION: None,
    axes.EXPERT: "expert",
}


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Maps logical axes, one for each dimension, to a partition spec.

    Raises:
        ValueError: An axis is not in the table.
    """
    unknown = [axis for axis in logical_axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} has no rule; accepted: {', '.join(RULES)}")
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in logical_axes))


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding of a parameter on `mesh`.

    A dimension that its mesh axis does not divide (a vocabulary of 50257 over 8 devices) is replicated: the result is
    the same, and only memory is lost.
    """
    return NamedSharding(mesh, PartitionSpec(*_divided(mesh.shape, logical_axes, shape)))


def shape_on_a_device(
    sizes: Mapping[str, int], logical_axes: Sequence[str | None], shape: Sequence[int]
) -> tuple[int, ...]:
    """Returns the shape of one device's part of a parameter, on a mesh with axes of these sizes.

    Sizes that are not named are 1.
    """
    entries = _divided(sizes, logical_axes, shape)
    return tuple(size if entry is None else size // sizes[entry] for entry, size in zip(entries, shape, strict=True))


def _divided(sizes: Mapping[str, int], logical_axes: Sequence[str | None], shape: Sequence[int]) -> list[str | None]:
    """Returns the mesh axis that divides each dimension, or None."""
    entries = partition_spec(logical_axes)
    return [
        entry if entry in sizes and size % sizes[entry] == 0 else None
        for entry, size in zip(entries, shape, strict=True)
    ]
