"""Fills a model's parameters: from a checkpoint, shard by shard, or with random numbers."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from jaxengine.loading.cache_scales import ENDINGS
from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.loading.parameters import read_parameter, unread_parameter
from jaxengine.models.abstract import abstract_model
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.layer_stack import STACKED, LayerStack
from jaxengine.models.layers.matrix import Formats
from jaxengine.models.layers.param import initial_value, spec_of
from jaxengine.models.weights import WeightSpec, parameters
from jaxengine.sharding.rules import named_sharding

logger = logging.getLogger(__name__)

NUM_READERS = 4
"""Threads that read, convert and copy tensors: enough to keep a disk busy, few enough to bound the copies alive."""
MAPPED_BYTES = 2**29
"""How much of the files may be mapped before it is given back: a process is charged for what it has read of them."""


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    weight_dtype: DTypeLike | None = None,
    formats: Formats | None = None,
) -> CausalLM:
    """Builds a model and fills it from a checkpoint.

    Every device gets only its shards: with memory-mapped tensors no more than that is read.

    Args:
        checkpoint: Where the tensors come from.
        config: The model, as `ModelConfig.from_hf(checkpoint.config)` gives it.
        dtype: Dtype of activations and parameters.
        mesh: Where they go; None puts all on the default device.
        weight_dtype: Dtype of the matrices, if it is another one.
        formats: See `abstract_model`.

    Raises:
        ValueError: A tensor is missing, has another shape than the configuration says, or is not part of the model.
    """
    model = abstract_model(config, dtype, weight_dtype, formats)
    family = type(model)
    available = checkpoint.tensor_names()
    specs = {
        path: dataclasses.replace(spec, names=tuple(_find(name, available, family, checkpoint) for name in spec.names))
        for path, spec in model.weight_map().items()
    }
    _check_nothing_is_left(specs, available, config, family, checkpoint)
    params = parameters(model)

    def load(path: str) -> int:
        param = params[path]
        sharding = mesh and _sharding(param, mesh)
        options = {"path": path, "origin": checkpoint.path}
        param.set_value(read_parameter(param, specs[path], checkpoint.get, sharding, **options))
        return math.prod(param.shape) * np.dtype(param.dtype).itemsize

    mapped = 0
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for num_bytes in pool.map(load, specs):  # raises the first error
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
        make = _dummy_maker(param.shape, np.dtype(param.dtype), spec_of(param).init, sharding)
        param.set_value(make(jax.random.fold_in(key, index)))
    return model


def named_weights(model: CausalLM) -> Iterator[tuple[str, jax.Array]]:
    """Yields a model's weights under the names, and in the form, that its checkpoint has: the inverse of `load_model`.

    Fused layers are taken apart, stacked ones too; rows that several devices hold come once.

    Args:
        model: A model with weights, such as one that is being trained.

    Raises:
        ValueError: A matrix is held in a format that a checkpoint does not have.
    """
    for path, param in parameters(model).items():
        own, value = spec_of(param), param[...]
        paths = [(path, value)]
        if isinstance(model.layers, LayerStack) and path.startswith(STACKED):
            rest = path.removeprefix(STACKED)
            paths = [(f"layers.{layer}.{rest}", value[layer]) for layer in range(model.layers.num_layers)]
        for path, value in paths:
            yield from unread_parameter(value, own, model.weight_spec(path, own))


@functools.lru_cache(maxsize=64)
def _dummy_maker(shape: tuple[int, ...], dtype: np.dtype, init: str, sharding: Sharding | None) -> Any:
    """Returns one compiled function for all parameters of the same shape."""
    return jax.jit(
        functools.partial(initial_value, shape=shape, dtype=dtype, init=init),
        out_shardings=sharding,
    )


def _sharding(param: nnx.Param, mesh: Mesh) -> Sharding:
    return named_sharding(mesh, spec_of(param).axes, param.shape)


def _find(name: str, available: set[str], family: type[CausalLM], checkpoint: Checkpoint) -> str:
    """Returns the name under which a checkpoint has a tensor; checkpoints of the bare model leave the prefix out."""
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
    if scales := {name for name in left if name.endswith(ENDINGS)}:
        left -= scales  # `fill_cache_scales` reads them
        if not config.cache_scales:
            logger.info("%d scales of cached keys and values are not used: kv_cache_dtype is not fp8", len(scales))
    left = {name for name in left if not name.endswith(ignored)}
    if left:
        shown = ", ".join(sorted(left)[:5])
        raise ValueError(f"{len(left)} tensors of {checkpoint.path} are not part of {config.architecture}: {shown}")
