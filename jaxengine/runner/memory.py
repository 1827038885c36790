"""How many pages the KV cache gets."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxengine.config import EngineConfig
from jaxengine.pallas_kernels.ragged_paged_attention import cache_shapes

logger = logging.getLogger(__name__)

# CPUs share their memory with everything else, so the cache takes a fixed amount and not a share of what is free.
CPU_CACHE_BYTES = 384 * 2**20


def page_bytes(config: EngineConfig) -> int:
    """Bytes of one page: keys and values of all layers."""
    shapes = cache_shapes(config.attention, 1, config.attention_backend)
    return config.model.num_layers * sum(map(math.prod, shapes)) * jnp.dtype(config.kv_cache_dtype).itemsize


def num_pages_that_fit(config: EngineConfig, step_bytes: Callable[[], int] | None) -> int:
    """Pages in `kv_cache_memory_bytes`, or in what weights and the largest step leave of the device.

    Args:
        step_bytes: Measures the weights and the largest step's temporaries; None on CPU.

    Raises:
        ValueError: There is no room for a single request of `max_model_len` tokens.
    """
    available = config.kv_cache_memory_bytes
    if available is None:
        available = CPU_CACHE_BYTES if step_bytes is None else _free_device_bytes(config, step_bytes())
    num_pages = available // page_bytes(config)
    needed = -(-config.scheduler.max_model_len // config.block_size)
    if num_pages < needed:
        raise ValueError(
            f"the KV cache has room for {max(num_pages, 0) * config.block_size} tokens "
            f"({available / 2**20:.0f} MiB), less than max_model_len={config.scheduler.max_model_len} "
            f"({needed * page_bytes(config) / 2**20:.0f} MiB): lower max_model_len, or raise kv_cache_memory_bytes "
            "or gpu_memory_utilization"
        )
    return num_pages


def _free_device_bytes(config: EngineConfig, step_bytes: int) -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit", 0), stats.get("bytes_in_use", 0)
    free = int(limit * config.gpu_memory_utilization) - used - step_bytes
    logger.info(
        "device memory: %.2f GiB, %.2f in use, %.2f for weights and a step: %.2f GiB for the KV cache",
        *(x / 2**30 for x in (limit, used, step_bytes, free)),
    )
    return free
