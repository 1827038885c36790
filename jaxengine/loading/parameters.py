"""Reads one parameter from the tensors that it is made of, and takes it apart into them again."""

from __future__ import annotations

import itertools
import logging
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from jaxengine.loading.checkpoint import Tensor
from jaxengine.models.layers.param import ParameterSpec, spec_of
from jaxengine.models.weights import WeightSpec
from jaxengine.sharding.layout import ZEROS, Runs, cut

logger = logging.getLogger(__name__)

CHECKED_AT_ONCE = 2**17
"""Numbers that fit into a core's cache."""
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}

Groups = list[list[Any]]
"""Of each number on the first axis if tensors are stacked, else of all: a tensor for each part, or one for all parts;
None for a part that is not there."""


def read_parameter(
    param: nnx.Param,
    spec: WeightSpec,
    get: Callable[[str], Tensor],
    sharding: Sharding | None,
    *,
    path: str = "a parameter",
    origin: object = "the checkpoint",
) -> jax.Array:
    """Reads a parameter. Every device gets only its part, and no more than that is read.

    Args:
        param: What is wanted; its metadata `spec` says what it is made of.
        spec: Which tensors it comes from.
        get: Gives a tensor by its name.
        sharding: Where it goes; None leaves it to computations, which take it where their other arguments are.
        path: Its dotted path, for messages.
        origin: Where the tensors come from, for messages.

    Raises:
        ValueError: A tensor has another shape or kind than the parameter is made of.
    """
    own = spec_of(param)
    groups = group_tensors(own, spec, [get(name) for name in spec.names], path=path, origin=origin)
    groups = as_parts(groups, spec)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # JAX passes None for scalars only
        spans = [part.indices(size)[:2] for part, size in zip(index, own.shape, strict=True)]
        out = empty(tuple(stop - start for start, stop in spans), np.dtype(own.dtype))
        fill(out, own, groups, index, stack=spec.stack)
        if not are_finite(out):
            warn_not_finite(spec.names, origin)
        return out

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(own.shape)))
    return jax.make_array_from_callback(own.shape, sharding, read)


def group_tensors(
    own: ParameterSpec,
    spec: WeightSpec,
    tensors: Sequence[Any],
    *,
    path: str = "a parameter",
    origin: object = "the checkpoint",
) -> Groups:
    """Decodes tensors, checks them, and groups them.

    Args:
        own: The parameter.
        spec: Which tensors it comes from.
        tensors: One for each of `spec.names`, in that order; None for one that is not there.
        path, origin: As in `read_parameter`.

    Returns:
        The groups, as `spec` has them: those that are stored transposed still are.

    Raises:
        ValueError: One has another shape or kind, or a part lacks some of the tensors that it is decoded from.
    """
    num_stacked = own.shape[0] if spec.stack else 1
    num_each = (len(own.tensors) or 1) if spec.decode else 1
    shapes, names = part_shapes(own, spec), spec.names[::num_each]
    if len(spec.names) != num_stacked * len(shapes) * num_each:
        raise ValueError(f"{path} is made of {num_stacked * len(shapes) * num_each} tensors, not {len(spec.names)}")
    parts = [_decode(own, spec, tensors[i * num_each : (i + 1) * num_each], name) for i, name in enumerate(names)]
    for name, tensor, shape in zip(names, parts, itertools.cycle(shapes), strict=False):
        if tensor is not None:
            _check(name, tensor, shape, own, spec, path, origin)
    return [parts[i * len(shapes) : (i + 1) * len(shapes)] for i in range(num_stacked)]


def as_parts(groups: Groups, spec: WeightSpec) -> Groups:
    """Returns the groups as `fill` takes them: nothing is transposed."""
    return [[_transposed(part) for part in group] for group in groups] if spec.transpose else groups


def _transposed(tensor: Any) -> Any:
    if tensor is None or len(tensor.shape) < 2:
        return tensor
    return tensor.T if len(tensor.shape) == 2 else np.swapaxes(np.asarray(tensor), -1, -2)


def part_shapes(own: ParameterSpec, spec: WeightSpec) -> list[tuple[int, ...]]:
    """Returns the shapes of the tensors of one group: of each part, or of all together if they are one tensor."""
    shapes = own.part_shapes()
    num_each = (len(own.tensors) or 1) if spec.decode else 1
    is_whole = len(spec.names) < len(shapes) * num_each
    return [shape[1:] if spec.stack else shape for shape in ([own.stored_shape] if is_whole else shapes)]


def fill(out: np.ndarray, own: ParameterSpec, groups: Groups, index: tuple[slice, ...], *, stack: bool = False) -> None:
    """Fills an array with the part `index` of a parameter, in the array's dtype, reading no more than that.

    What comes from tensors that are not there stays as it is.

    Args:
        out: Of the shape of that part.
        own: The parameter.
        groups: Its tensors.
        index: Slices of the parameter's axes.
        stack: Whether the groups lie on the first axis.
    """
    spans = [part.indices(size)[:2] for part, size in zip(index, own.shape, strict=True)]
    groups = groups[slice(*spans[0])] if stack else groups
    for own_out, group in zip(out if stack else (out,), groups, strict=True):
        for into, number, source in pieces(own, len(group), spans, stack=stack):
            if number is None:
                own_out[into] = 0
            elif group[number] is not None:
                _copy(own_out[into], group[number][source])


def pieces(
    own: ParameterSpec, num_tensors: int, spans: Sequence[tuple[int, int]], *, stack: bool = False
) -> Iterator[tuple[tuple[slice, ...], int | None, tuple[slice, ...]]]:
    """Yields the blocks that a part of a parameter is copied in; of any one group with `stack`.

    Args:
        own: The parameter.
        num_tensors: Of a group: one for each of its parts, or one.
        spans: Of each of the parameter's axes, where the part begins and ends.
        stack: Whether groups lie on the first axis, which then is in no block.

    Yields:
        Where in the part, which tensor (None for zeros), and where in that.
    """
    axis = max(own.fused_axis, int(stack))
    sizes = [part.size for part in own.fused_parts] if num_tensors > 1 else [own.stored_shape[axis]]
    axis -= int(stack)
    of_axes = zip(own.runs[int(stack) :], spans[int(stack) :], strict=True)
    for combination in itertools.product(*(_pieces(runs, span) for runs, span in of_axes)):
        into = [slice(at, at + count) for at, _, count in combination]
        if any(first == ZEROS for _, first, _ in combination):
            yield tuple(into), None, ()
            continue
        source = [slice(first, first + count) for _, first, count in combination]
        at, first, count = combination[axis]
        for number, low, high, offset in _overlapping(sizes, first, count):
            into[axis] = slice(at + offset, at + offset + high - low)
            source[axis] = slice(low, high)
            yield tuple(into), number, tuple(source)


def _pieces(runs: Runs, span: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Of the rows of a span: where they begin in it, where in the checkpoint (-1 for zeros), and how many."""
    start, stop = span
    found, at = [], 0
    for first, count in cut(runs, start, stop) if runs else ((start, stop - start),):
        found.append((at, first, count))
        at += count
    return found


def _overlapping(sizes: Sequence[int], first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Which tensors of these sizes make up `count` rows from `first` on, which rows do, and from which of them on."""
    offset = 0
    for number, size in enumerate(sizes):
        low, high = max(first - offset, 0), min(first + count - offset, size)
        if low < high:
            yield number, low, high, offset + low - first
        offset += size


def _copy(out: np.ndarray, tensor: Tensor) -> None:
    """Copies a tensor, in the dtype of `out`."""
    if isinstance(tensor, np.ndarray):
        out[...] = tensor
    else:
        tensor.read_into(out)


def _decode(own: ParameterSpec, spec: WeightSpec, tensors: Sequence[Any], name: str) -> Any:
    """Returns the tensor of one part."""
    if all(tensor is None for tensor in tensors):
        return None
    if spec.decode is None:
        (tensor,) = tensors
    elif any(tensor is None for tensor in tensors):
        raise ValueError(f"{name} is decoded from {len(tensors)} tensors ({', '.join(own.tensors)}); give all of them")
    else:
        tensor = spec.decode(*tensors)
    return tensor


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    own: ParameterSpec,
    spec: WeightSpec,
    path: str,
    origin: object,
) -> None:
    """Checks a tensor by itself, not only their sum: parts of a fused weight could have changed places."""
    if spec.transpose:
        shape = (*shape[:-2], *shape[:-3:-1])
    if tensor.shape != shape:
        raise ValueError(
            f"tensor {name!r} of {origin} has shape {tensor.shape}; the configuration wants {shape} for {path}"
        )
    dtype = getattr(tensor, "dtype", own.dtype)
    if not is_same_kind(dtype, own.dtype):
        raise ValueError(f"tensor {name!r} of {origin} has dtype {dtype}; {path} holds {own.dtype}")


def is_same_kind(dtype: Any, wanted: Any) -> bool:
    """Returns whether numbers of a dtype can be meant for a parameter of another.

    They can if both are floating, or both are integers.
    """
    return any(jnp.issubdtype(dtype, kind) and jnp.issubdtype(wanted, kind) for kind in (jnp.floating, jnp.integer))


def are_finite(values: np.ndarray) -> bool:
    """Returns whether no number is NaN or infinite.

    These are the largest if the bits are compared as integers: with a sign among positive ones, without among all.
    """
    if values.dtype.name not in _INFINITY:
        return True
    infinity, size = _INFINITY[values.dtype.name], values.dtype.itemsize
    bits = values.reshape(-1)
    for start in range(0, len(bits), CHECKED_AT_ONCE):
        part = bits[start : start + CHECKED_AT_ONCE]
        if part.view(f"i{size}").max() >= infinity or part.view(f"u{size}").max() >= infinity + (1 << 8 * size - 1):
            return False
    return True


def warn_not_finite(names: Sequence[str], origin: object) -> None:
    """Warns of a parameter that makes wrong outputs."""
    logger.warning("%s of %s has NaN or infinity in it: outputs will be wrong", ", ".join(names), origin)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array on pages of its own.

    JAX's CPU backend takes over what is aligned to 64 bytes, and copies the rest.

    Not from NumPy, which asks for huge pages: finding them takes most of the time of loading.
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


def unread_parameter(value: jax.Array, own: ParameterSpec, spec: WeightSpec) -> Iterator[tuple[str, jax.Array]]:
    """Yields the tensors that a parameter was read from, by their names: the inverse of `read_parameter`.

    Args:
        value: The parameter's value.
        own: What it is.
        spec: Which tensors it comes from.

    Raises:
        ValueError: They are decoded, and nothing encodes them.
    """
    if spec.decode is not None:
        raise ValueError(f"{spec.names[0]} is decoded when it is read, and cannot be written")
    for axis, (runs, size) in enumerate(zip(own.runs, own.stored_shape, strict=True)):
        if runs:  # of copies any one, and none of zeros
            ours = np.concatenate(
                [np.full(n, -1) if first == ZEROS else np.arange(first, first + n) for first, n in runs]
            )
            where = {int(row): i for i, row in enumerate(ours)}
            value = jnp.take(value, np.array([where[row] for row in range(size)]), axis=axis)
    shapes = part_shapes(own, spec)
    axis = max(own.fused_axis - int(spec.stack), 0)
    ends = list(itertools.accumulate(shape[axis] for shape in shapes))
    groups = value if spec.stack else [value]
    parts = (part for group in groups for part in jnp.split(group, ends[:-1], axis=axis))
    for name, part in zip(spec.names, parts, strict=True):
        yield name, jnp.swapaxes(part, -1, -2) if spec.transpose and part.ndim > 1 else part
