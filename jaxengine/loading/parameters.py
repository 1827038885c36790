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

Groups = list[list[Tensor | None]]
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
    tensors: Sequence[Tensor | None],
    *,
    path: str = "a parameter",
    origin: object = "the checkpoint",
) -> Groups:
    """Decodes and transposes tensors, checks them, and groups them as `fill` takes them.

    Args:
        own: The parameter.
        spec: Which tensors it comes from.
        tensors: One for each of `spec.names`, in that order; None for one that is not there.
        path, origin: As in `read_parameter`.

    Raises:
        ValueError: One has another shape or kind, or a part lacks some of the tensors that it is decoded from.
    """
    num_stacked = own.shape[0] if spec.stack else 1
    num_each = len(own.tensors) or 1 if spec.decode else 1
    shapes, names = part_shapes(own, spec), [spec.names[i] for i in range(0, len(spec.names), num_each)]
    if len(spec.names) != num_stacked * len(shapes) * num_each:
        raise ValueError(f"{path} is made of {num_stacked * len(shapes) * num_each} tensors, not {len(spec.names)}")
    parts = [
        _decode(own, spec, tensors[i : i + num_each], names[i // num_each]) for i in range(0, len(tensors), num_each)
    ]
    for name, tensor, shape in zip(names, parts, itertools.cycle(shapes)):
        if tensor is not None:
            _check(name, tensor, shape, own, spec, path, origin)
    return [parts[i * len(shapes) : (i + 1) * len(shapes)] for i in range(num_stacked)]


def part_shapes(own: ParameterSpec, spec: WeightSpec) -> list[tuple[int, ...]]:
    """Returns the shapes of the tensors of one group: of each part, or of all together if they are one tensor."""
    shapes = own.part_shapes()
    num_each = len(own.tensors) or 1 if spec.decode else 1
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
    if not stack:
        _fill(out, groups[0], spans, own.runs, own.fused_axis)
        return
    for own_out, group in zip(out, groups[spans[0][0] : spans[0][1]], strict=True):
        _fill(own_out, group, spans[1:], own.runs[1:], max(own.fused_axis - 1, 0))


def _fill(
    out: np.ndarray,
    tensors: Sequence[Tensor | None],
    spans: Sequence[tuple[int, int]],
    runs: Sequence[Runs],
    axis: int,
) -> None:
    """Fills an array with tensors that are laid end to end along an axis."""
    pieces = [_pieces(own, span) for own, span in zip(runs, spans, strict=True)]
    sizes = [tensor.shape[axis] if tensor is not None else 0 for tensor in tensors]
    for combination in itertools.product(*pieces):
        into = [slice(at, at + count) for at, _, count in combination]
        if any(first == ZEROS for _, first, _ in combination):
            out[tuple(into)] = 0
            continue
        source = [slice(first, first + count) for _, first, count in combination]
        at, first, count = combination[axis]
        for tensor, low, high, offset in _overlapping(tensors, sizes, first, count):
            into[axis] = slice(at + offset, at + offset + high - low)
            source[axis] = slice(low, high)
            _copy(out[tuple(into)], tensor[tuple(source)])


def _pieces(runs: Runs, span: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Of the rows of a span: where they begin in it, where in the checkpoint (-1 for zeros), and how many."""
    start, stop = span
    found, at = [], 0
    for first, count in cut(runs, start, stop) if runs else ((start, stop - start),):
        found.append((at, first, count))
        at += count
    return found


def _overlapping(
    tensors: Sequence[Tensor | None], sizes: Sequence[int], first: int, count: int
) -> Iterator[tuple[Tensor, int, int, int]]:
    """The tensors that make up `count` rows from `first` on, which of their rows do, and from which of the count on."""
    offset = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        low, high = max(first - offset, 0), min(first + count - offset, size)
        if tensor is not None and low < high:
            yield tensor, low, high, offset + low - first
        offset += size


def _copy(out: np.ndarray, tensor: Tensor) -> None:
    """Copies a tensor, in the dtype of `out`."""
    if isinstance(tensor, np.ndarray):
        out[...] = tensor
    else:
        tensor.read_into(out)


def _decode(own: ParameterSpec, spec: WeightSpec, tensors: Sequence[Tensor | None], name: str) -> Tensor | None:
    """The tensor of one part."""
    if all(tensor is None for tensor in tensors):
        return None
    if spec.decode is None:
        (tensor,) = tensors
    elif any(tensor is None for tensor in tensors):
        raise ValueError(f"{name} is decoded from {len(tensors)} tensors ({', '.join(own.tensors)}); give all of them")
    else:
        tensor = spec.decode(*tensors)
    if tensor is None or not spec.transpose or len(tensor.shape) < 2:
        return tensor
    return tensor.T if len(tensor.shape) == 2 else np.swapaxes(np.asarray(tensor), -1, -2)


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

    def stored(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], *shape[:-3:-1]) if spec.transpose else shape

    if tensor.shape != shape:
        raise ValueError(
            f"tensor {name!r} of {origin} has shape {stored(tensor.shape)}; the configuration wants {stored(shape)} "
            f"for {path}"
        )
    dtype = getattr(tensor, "dtype", own.dtype)
    if not is_same_kind(dtype, own.dtype):
        raise ValueError(f"tensor {name!r} of {origin} has dtype {dtype}; {path} holds {own.dtype}")


def is_same_kind(dtype: Any, wanted: Any) -> bool:
    """Whether numbers of a dtype can be meant for a parameter of another: both are floating, or both are integers."""
    return any(jnp.issubdtype(dtype, kind) and jnp.issubdtype(wanted, kind) for kind in (jnp.floating, jnp.integer))


def are_finite(values: np.ndarray) -> bool:
    """Whether no number is NaN or infinite.

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
    """An array on pages of its own: JAX's CPU backend takes over what is aligned to 64 bytes, and copies the rest.

    Not from NumPy, which asks for huge pages: finding them took 5 of the 7 s of CPU time in which 2 GB were loaded (two
    cores of a virtual machine, 2026-11-24).
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)
