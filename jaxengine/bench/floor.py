"""The least time that a decode step can take: what it must read, at the speed at which the device copies."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxengine.config import EngineConfig

COPY_BYTES = 2**30
COPIES = 10
RUNS = 5


def copy_bandwidth() -> float | None:
    """Returns bytes per second, read and written, of large copies within the device's memory; None on CPU.

    CPUs are left out: their caches, and whoever else uses the machine, decide what a copy takes there.
    """
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return None
    copy = jax.jit(jnp.copy)
    source = jnp.ones(COPY_BYTES // 4, jnp.float32)
    copy(source).block_until_ready()
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        for _ in range(COPIES):
            target = copy(source)
        target.block_until_ready()  # copies run one after the other
        seconds.append(time.perf_counter() - started)
    source.delete()
    return 2 * COPY_BYTES * COPIES / statistics.median(seconds)


def decode_bytes(config: EngineConfig, batch_size: int, context: float) -> float:
    """Returns bytes that each device must read for a decode step.

    They are its part of the weights, and of the batch's keys and values.

    Args:
        config: The engine's configuration.
        batch_size: B, sequences that decode, of one data-parallel shard.
        context: Tokens that each of them attends to, on average.
    """
    return weight_bytes(config) + batch_size * kv_bytes(config, context)


def weight_bytes(config: EngineConfig) -> int:
    """Returns bytes of a device's weights but the embedding table, of which a step reads few rows.

    A tied table is the head, and counts.
    """
    from jaxengine.models.abstract import abstract_model
    from jaxengine.models.layers.param import spec_of
    from jaxengine.models.weights import parameters
    from jaxengine.sharding.rules import shape_on_a_device

    model = config.model
    found = parameters(abstract_model(model, config.dtype, config.weight_dtype))
    tables = set() if model.tie_word_embeddings else {"embed_tokens.weight"}
    sizes = {"model": model.tensor_parallel_size}
    return sum(
        math.prod(shape_on_a_device(sizes, spec_of(p).axes, p.shape)) * p.dtype.itemsize
        for path, p in found.items()
        if path not in tables
    )


def kv_bytes(config: EngineConfig, context: float) -> float:
    """Returns bytes that a device holds of one sequence's keys and values, of all layers.

    Sliding layers hold their window.
    """
    from jax.numpy import dtype

    model = config.model
    num_kv_heads = model.heads.num_kv_heads // model.tensor_parallel_size
    return 2 * tokens_seen(config, context) * num_kv_heads * model.head_dim * dtype(config.kv_cache_dtype).itemsize


def tokens_seen(config: EngineConfig, context: float) -> float:
    """Returns tokens that one at the end of so many attends to, over all layers.

    Sliding layers see their window at most.
    """
    windows = (config.model.window(layer) for layer in range(config.model.num_layers))
    return sum(min(context, window or context) for window in windows)
