"""Puts new weights, named as in a checkpoint, into the leaves of an engine's model while it is there.

Everything is checked before anything changes. Arrays of the host are read as those of a checkpoint are, each device its
own part. Arrays of devices never leave them: a small program for each kind of parameter writes them into the leaf,
whose memory stays where it is.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxengine.loading.loader import NUM_READERS
from jaxengine.loading.parameters import (
    Groups,
    are_finite,
    as_parts,
    empty,
    fill,
    group_tensors,
    pieces,
    warn_not_finite,
)
from jaxengine.models.abstract import abstract_model
from jaxengine.models.layer_stack import STACKED
from jaxengine.models.layers.param import ParameterSpec, spec_of
from jaxengine.models.weights import WeightSpec, parameters
from jaxengine.runner.programs import ProgramContext
from jaxengine.sharding.rules import named_sharding

logger = logging.getLogger(__name__)

ORIGIN = "the new weights"
Weights = Iterable[tuple[str, Any]]
"""Names as in the checkpoint, and NumPy's or JAX's arrays."""


class _Parameter(NamedTuple):
    """A parameter of a model whose layers are not stacked, and where it is in one whose layers may be.

    Attributes:
        path: Its dotted path.
        own, spec: What it is, and which tensors it comes from.
        leaf: Number of the leaf.
        layer: Its place in a leaf of stacked layers; None in another.
    """

    path: str
    own: ParameterSpec
    spec: WeightSpec
    leaf: int
    layer: int | None


class _Change(NamedTuple):
    """What comes into a parameter: of each group of its tensors those that are given."""

    parameter: _Parameter
    groups: Groups

    def is_whole(self) -> bool:
        return all(part is not None for group in self.groups for part in group)

    def is_on_devices(self) -> bool:
        return any(isinstance(part, jax.Array) for group in self.groups for part in group)


class WeightUpdater:
    """Knows which leaf each tensor of a checkpoint belongs to."""

    def __init__(self, context: ProgramContext):
        """Looks at the model that programs are lowered for."""
        config = context.config
        model = abstract_model(config.model, config.dtype, config.weight_dtype)
        leaves = {path: number for number, path in enumerate(context.model.paths())}
        # A device's memory may have no room for both; on CPUs others may read the memory of what has been put there.
        self._frees_first = config.platform != "cpu"
        self._place, self._shardings = context.place, context.leaf_shardings
        self._prefix = model.base_prefix
        self._ignored = (*model.ignored_tensors, *(("lm_head.weight",) if config.model.tie_word_embeddings else ()))
        self._parameters: dict[str, _Parameter] = {}
        self._users: dict[str, list[str]] = {}
        specs = model.weight_map()
        for path, param in parameters(model).items():
            leaf_path, layer = path, None
            if context.is_stacked and path.startswith("layers."):
                _, number, rest = path.split(".", 2)
                leaf_path, layer = STACKED + rest, int(number)
            self._parameters[path] = _Parameter(path, spec_of(param), specs[path], leaves[leaf_path], layer)
            for name in specs[path].names:
                self._users.setdefault(name, []).append(path)

    def check(self, weights: Weights) -> list[_Change]:
        """Takes all arrays and checks them; nothing has changed when it raises.

        Raises:
            ValueError: A name that the model does not have or that comes twice, no array, or a wrong shape or dtype.
        """
        arrays = self._by_name(weights)
        changes = []
        for path in dict.fromkeys(path for name in arrays for path in self._users[name]):
            parameter = self._parameters[path]
            tensors = [arrays.get(name) for name in parameter.spec.names]
            groups = group_tensors(parameter.own, parameter.spec, tensors, path=path, origin=ORIGIN)
            changes.append(_Change(parameter, groups))
        return changes

    def apply(self, changes: Sequence[_Change], leaves: list[jax.Array]) -> None:
        """Puts what `check` gave into the leaves, one after the other, each of which is replaced in the list."""
        on_host: dict[int, list[_Change]] = {}
        for change in changes:
            if not change.is_on_devices():
                on_host.setdefault(change.parameter.leaf, []).append(change)

        def read(number: int) -> jax.Array:
            return self._read(on_host[number], leaves[number], self._shardings[number])

        with ThreadPoolExecutor(NUM_READERS) as pool:
            for numbers in itertools.batched(on_host, NUM_READERS):  # few copies are alive at once
                for number, leaf in zip(numbers, pool.map(read, numbers), strict=True):
                    leaves[number] = leaf
        finite = []
        for change in changes:
            if change.is_on_devices():
                number = change.parameter.leaf
                leaves[number], is_finite = self._write(change, leaves[number], self._shardings[number])
                finite.append((change.parameter, is_finite))
        jax.block_until_ready(leaves)
        for parameter, is_finite in finite:
            if not is_finite:
                warn_not_finite(parameter.spec.names, ORIGIN)

    def _by_name(self, weights: Weights) -> dict[str, Any]:
        """Returns the arrays under the names that the model has.

        A checkpoint of the bare model leaves the prefix out.
        """
        arrays, unknown = {}, []
        pair: Any
        for pair in weights.items() if isinstance(weights, Mapping) else weights:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError(f"weights gave {type(pair).__name__}; expected pairs of a name and an array")
            given, array = pair
            if not isinstance(array, np.ndarray | jax.Array):
                raise ValueError(f"{given!r:.200} is {type(array).__name__}; expected an array of NumPy or JAX")
            if isinstance(array, jax.Array) and array.is_deleted():
                raise ValueError(f"{given!r:.200} has been deleted: it was donated to a computation")
            name = next((name for name in (given, f"{self._prefix}{given}") if name in self._users), None)
            if name is None:
                if not given.endswith(self._ignored):
                    unknown.append(given)
            elif name in arrays:
                raise ValueError(f"{given!r} comes twice")
            else:
                arrays[name] = array
        if unknown:
            shown = ", ".join(sorted(unknown)[:5])
            raise ValueError(f"{len(unknown)} of the names are not part of the model: {shown:.500}")
        return arrays

    def _read(self, changes: Sequence[_Change], leaf: jax.Array, sharding: NamedSharding | None) -> jax.Array:
        """Returns a leaf with what comes from the host; each device reads its own part."""
        layers = {change.parameter.layer for change in changes}
        num_layers = 1 if None in layers else leaf.shape[0]
        is_whole = len(layers) == num_layers and all(change.is_whole() for change in changes)
        before = {} if is_whole else {_spans(s.index, leaf.shape): s.data for s in leaf.addressable_shards}
        parts = [as_parts(change.groups, change.parameter.spec) for change in changes]

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            spans = _spans(index, leaf.shape)
            out = empty(tuple(stop - start for start, stop in spans), np.dtype(leaf.dtype))
            if not is_whole:
                out[...] = np.asarray(before[spans])
            for (parameter, _), groups in zip(changes, parts, strict=True):
                own_out, own_index = out, index
                if parameter.layer is not None:  # no mesh cuts the axis of layers
                    own_out, own_index = out[parameter.layer], index[1:]
                fill(own_out, parameter.own, groups, own_index, stack=parameter.spec.stack)
                if not are_finite(own_out):
                    warn_not_finite(parameter.spec.names, ORIGIN)
            return out

        if is_whole and self._frees_first:
            leaf.delete()
        if sharding is None:
            return jax.device_put(read((slice(None),) * leaf.ndim))
        return jax.make_array_from_callback(leaf.shape, sharding, read)

    def _write(self, change: _Change, leaf: jax.Array, sharding: NamedSharding | None) -> tuple[jax.Array, jax.Array]:
        """Returns a leaf with what comes from devices, and whether all of that is finite."""
        parameter = change.parameter
        groups = [[self._placed(part, parameter, leaf) for part in group] for group in change.groups]
        layer = None if parameter.layer is None else np.int32(parameter.layer)
        write = _writer(parameter.own, parameter.spec.transpose, parameter.spec.stack, sharding)
        return write(leaf, groups, layer)

    def _placed(self, tensor: Any, parameter: _Parameter, leaf: jax.Array) -> Any:
        """Returns a tensor on the devices of a leaf.

        What is there stays, and what is elsewhere is spread as the leaf is.
        """
        mesh = self._place.mesh
        if tensor is None:
            return None
        if mesh is None:
            is_there = isinstance(tensor, jax.Array) and tensor.devices() == leaf.devices()
            return tensor if is_there else jax.device_put(tensor, *leaf.devices())
        place = tensor.sharding if isinstance(tensor, jax.Array) else None
        if isinstance(place, NamedSharding) and _devices(place.mesh) == _devices(mesh):
            return tensor
        axes = parameter.own.axes[int(parameter.spec.stack) :]
        axes = (*axes[:-2], *axes[:-3:-1]) if parameter.spec.transpose else axes
        return jax.device_put(tensor, named_sharding(mesh, axes, tensor.shape))


def _devices(mesh: Any) -> list[Any]:
    return np.asarray(mesh.devices).reshape(-1).tolist()


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@functools.lru_cache(maxsize=256)
def _writer(
    own: ParameterSpec, transpose: bool, stack: bool, sharding: NamedSharding | None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns one function for all parameters of a kind; of stacked layers one for all of them.

    Returns:
        write(leaf, groups, layer) -> (leaf, is_finite); the leaf is donated, so that it stays where it is.
    """

    def write_weights(leaf: jax.Array, groups: Groups, layer: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        is_finite = jnp.array(True)
        first = () if layer is None else (layer,)
        for number, group in enumerate(groups):
            start = (*first, number) if stack else first
            for into, source, block in pieces(own, len(group), [(0, size) for size in own.shape], stack=stack):
                tensor = None if source is None else group[source]
                if tensor is None:  # zeros are there
                    continue
                part = jnp.swapaxes(tensor, -1, -2) if transpose and tensor.ndim > 1 else tensor
                part = part[block].astype(leaf.dtype)
                is_finite &= jnp.isfinite(part).all()
                starts = (*start, *(piece.start for piece in into))
                leaf = lax.dynamic_update_slice(leaf, part.reshape((1,) * len(start) + part.shape), starts)
        return leaf, is_finite

    places: Any = None if sharding is None else (sharding, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(write_weights, donate_argnums=0, out_shardings=places)
