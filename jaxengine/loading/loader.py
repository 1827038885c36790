"""Fills a model's parameters: from a checkpoint, shard by shard, or with random numbers."""

from __future__ import annotations

import functools
import logging
import math
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from jaxengine.loading.checkpoint import Checkpoint, Tensor
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.param import initial_value
from jaxengine.models.registry import abstract_model
from jaxengine.models.weights import WeightSpec, parameters
from jaxengine.sharding.layout import ZEROS, Runs, cut
from jaxengine.sharding.rules import named_sharding

logger = logging.getLogger(__name__)

NUM_READERS = 4
"""Threads that read, convert and copy tensors: enough to keep a disk busy, few enough to bound the copies alive."""
CHECKED_AT_ONCE = 2**17
"""Numbers that fit into a core's cache."""
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
MAPPED_BYTES = 2**29
"""How much of the files may be mapped before it is given back: a process is charged for what it has read of them."""


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    weight_dtype: DTypeLike | None = None,
) -> CausalLM:
    """Builds a model and fills it from a checkpoint.

    Every device gets only its shards: with memory-mapped tensors no more than that is read.

    Args:
        checkpoint: Where the tensors come from.
        config: The model, as `ModelConfig.from_hf(checkpoint.config)` gives it.
        dtype: Dtype of activations and parameters.
        mesh: Where they go; None puts all on the default device.
        weight_dtype: Dtype of the matrices, if it is another one.

    Raises:
        ValueError: A tensor is missing, has another shape than the configuration says, or is not part of the model.
    """
    model = abstract_model(config, dtype, weight_dtype)
    family = type(model)
    available = checkpoint.tensor_names()
    specs = {
        path: WeightSpec(tuple(_find(name, available, family, checkpoint) for name in spec.names), spec.transpose)
        for path, spec in family.weight_map(config).items()
    }
    _check_nothing_is_left(specs, available, config, family, checkpoint)
    params = parameters(model)

    def fill(path: str) -> int:
        param, spec = params[path], specs[path]
        tensors = [checkpoint.get(name) for name in spec.names]
        tensors = [tensor.T if spec.transpose else tensor for tensor in tensors]
        _check_shapes(path, param, spec, tensors, checkpoint)
        runs = param.get_metadata("rows"), param.get_metadata("columns")
        read = functools.partial(_read_slice, tensors, np.dtype(param.dtype), param.shape, runs)

        def read_checked(index: tuple[slice, ...] | None) -> np.ndarray:
            values = read(index)
            if not _are_finite(values):
                names = ", ".join(spec.names)
                logger.warning("%s of %s has NaN or infinity in it: outputs will be wrong", names, checkpoint.path)
            return values

        if mesh is None:  # not committed to a device: computations then go wherever their other arguments are
            param.set_value(jax.device_put(read_checked((slice(None),) * len(param.shape))))
        else:
            param.set_value(jax.make_array_from_callback(param.shape, _sharding(param, mesh), read_checked))
        return math.prod(param.shape) * np.dtype(param.dtype).itemsize

    mapped = 0
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for num_bytes in pool.map(fill, specs):  # raises the first error
            mapped += num_bytes
            if mapped > MAPPED_BYTES:
                checkpoint.release()
                mapped = 0
    return model


def init_dummy(
    config: ModelConfig,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    seed: int = 0,
    weight_dtype: DTypeLike | None = None,
) -> CausalLM:
    """Builds a model with random weights, made on the devices where they stay: for benchmarks and tests.

    Args:
        config: The model.
        dtype: Dtype of activations and parameters.
        mesh: Where they go; None puts all on the default device.
        seed: The same seed gives the same weights.
        weight_dtype: Dtype of the matrices, if it is another one.
    """
    model = abstract_model(config, dtype, weight_dtype)
    key = jax.random.key(seed)
    for index, param in enumerate(parameters(model).values()):
        sharding = mesh and _sharding(param, mesh)
        make = _dummy_maker(param.shape, np.dtype(param.dtype), param.get_metadata("init"), sharding)
        param.set_value(make(jax.random.fold_in(key, index)))
    return model


@functools.lru_cache(maxsize=64)
def _dummy_maker(shape: tuple[int, ...], dtype: np.dtype, init: str, sharding: Sharding | None) -> Any:
    """One compiled function for all parameters of the same shape."""
    return jax.jit(
        functools.partial(initial_value, shape=shape, dtype=dtype, init=init),
        out_shardings=sharding,
    )


def _sharding(param: nnx.Param, mesh: Mesh) -> Sharding:
    return named_sharding(mesh, param.get_metadata("axes"), param.shape)


def _read_slice(
    tensors: Sequence[Tensor],
    dtype: np.dtype,
    shape: tuple[int, ...],
    runs: tuple[Runs, Runs],
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    """The part `index` of a parameter, in `dtype`, reading no more than that of its tensors.

    Args:
        tensors: Laid end to end along the first axis.
        dtype: Of the parameter.
        shape: Of the parameter.
        runs: Which of the tensors' rows and columns it holds; see `parameter`.
        index: Slices of the parameter's axes.
    """
    assert index is not None  # JAX passes None for scalars only
    spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    rows, columns = (
        cut(order, start, stop) if order else ((start, stop - start),)
        for order, (start, stop) in zip(runs, [*spans, (0, 1)][:2], strict=True)
    )
    out = _empty(tuple(stop - start for start, stop in spans), dtype)
    row = 0
    for first, count in rows:
        for tensor in [None] if first == ZEROS else _overlapping(tensors, first, count):
            length = count if tensor is None else len(tensor)
            _copy_columns(out[row : row + length], tensor, columns)
            row += length
    return out


def _copy_columns(out: np.ndarray, tensor: Tensor | None, columns: Runs) -> None:
    """Copies runs of a tensor's columns side by side."""
    if tensor is None or out.ndim == 1:
        _copy(out, tensor)
    else:
        column = 0
        for first, count in columns:
            part = out[:, column : column + count]
            _copy(part, None if first == ZEROS else tensor[:, first : first + count])
            column += count


def _copy(out: np.ndarray, tensor: Tensor | None) -> None:
    """Copies a tensor, in the dtype of `out`; None stands for zeros."""
    if tensor is None or isinstance(tensor, np.ndarray):
        out[...] = 0 if tensor is None else tensor
    else:
        tensor.read_into(out)


def _are_finite(values: np.ndarray) -> bool:
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


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array on pages of its own: JAX's CPU backend takes over what is aligned to 64 bytes, and copies the rest.

    Not from NumPy, which asks for huge pages: finding them takes most of the time of loading.
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


def _overlapping(tensors: Sequence[Tensor], first: int, count: int) -> list[Tensor]:
    """The parts of `tensors`, laid end to end, that make up `count` rows from `first` on."""
    parts, offset = [], 0
    for tensor in tensors:
        low, high = max(first - offset, 0), min(first + count - offset, len(tensor))
        if low < high:
            parts.append(tensor[low:high])
        offset += len(tensor)
    return parts


def _find(name: str, available: set[str], family: type[CausalLM], checkpoint: Checkpoint) -> str:
    """The name under which a checkpoint has a tensor; checkpoints of the bare model leave the prefix out."""
    for candidate in (name, name.removeprefix(family.base_prefix)):
        if candidate in available:
            return candidate
    raise ValueError(f"tensor {name!r} is missing in {checkpoint.path}, which has {len(available)} tensors")


def _check_nothing_is_left(
    specs: dict[str, WeightSpec],
    available: set[str],
    config: ModelConfig,
    family: type[CausalLM],
    checkpoint: Checkpoint,
) -> None:
    """Raises on tensors that nothing reads (biases, scales, ...): the model would run, and answer wrongly."""
    left = available - {name for spec in specs.values() for name in spec.names}
    ignored = (*family.ignored_tensors, *(("lm_head.weight",) if config.tie_word_embeddings else ()))
    left = {name for name in left if not name.endswith(ignored)}
    if left:
        shown = ", ".join(sorted(left)[:5])
        raise ValueError(f"{len(left)} tensors of {checkpoint.path} are not part of {config.architecture}: {shown}")


def _check_shapes(
    path: str, param: nnx.Param, spec: WeightSpec, tensors: Sequence[Tensor], checkpoint: Checkpoint
) -> None:
    """Checks each tensor, not only their sum: parts of a fused weight could have changed places."""
    parts, columns = param.get_metadata("parts"), param.get_metadata("columns")
    rest = param.shape[1:] if not columns else (sum(count for first, count in columns if first != ZEROS),)
    wanted = [(row, *rest) for row in (parts if len(tensors) > 1 else (sum(parts),))]
    for name, tensor, shape in zip(spec.names, tensors, wanted, strict=True):
        if tensor.shape != shape:
            stored = tensor.shape[::-1] if spec.transpose else tensor.shape
            raise ValueError(
                f"tensor {name!r} of {checkpoint.path} has shape {stored}; the configuration wants "
                f"{shape[::-1] if spec.transpose else shape} for {path}"
            )
