"""The memory of a device: how many pages the KV cache gets, and where small arrays go."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.config import EngineConfig
from jaxengine.kv_cache.groups import most_pages, most_tokens, page_groups
from jaxengine.models.cache import own_shape
from jaxengine.pallas_kernels.ragged_paged_attention import cache_shapes

logger = logging.getLogger(__name__)

# CPUs share their memory with everything else, so the cache takes a fixed amount and not a share of what is free.
CPU_CACHE_BYTES = 384 * 2**20
# Of what JAX has taken: outputs of a second step under way, and what lies between arrays.
MARGIN = 0.03
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
JAX_FRACTION = 0.75  # of a GPU's memory, which JAX takes at its start unless that variable says otherwise
# For small arrays, of each size: two steps are under way at once, each with inputs, tokens and what a sampler takes.
NUM_BLOCKS = 8
MIN_BLOCK_BYTES = 1024
WALL_BYTES = 256  # the least that JAX's allocator gives out


def reserve_device_memory(gpu_memory_utilization: float) -> None:
    """Lets JAX take that share of a GPU's memory; to be called before anything runs on it.

    Whoever has set `XLA_PYTHON_CLIENT_MEM_FRACTION`, or run something in JAX before, keeps what that gave.
    """
    os.environ.setdefault(FRACTION, str(gpu_memory_utilization))


def device_bytes_in_use() -> int:
    """What arrays take on the first device; 0 where the device does not tell.

    Raises:
        ValueError: JAX could not take its share of that device's memory.
    """
    jax.device_put(0).block_until_ready()  # JAX takes its share when the first array is made
    stats = jax.local_devices()[0].memory_stats() or {}
    check_pool(stats)
    return stats.get("bytes_in_use", 0)


def check_pool(stats: Mapping[str, int]) -> None:
    """Raises ValueError if JAX has got less of a device's memory than it may use: others hold it.

    JAX itself goes on with less, and would fail in the middle of a run.

    Args:
        stats: Of a device that has an array. `pool_bytes` is what JAX has got of `bytes_limit`.
    """
    limit, pool = stats.get("bytes_limit", 0), stats.get("pool_bytes")
    takes_all = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")
    if not takes_all or pool is None or pool >= limit * (1 - MARGIN):
        return
    share = float(os.environ.get(FRACTION, JAX_FRACTION))
    raise ValueError(
        f"of the {limit / 2**30:.1f} GiB that gpu_memory_utilization={share:.2f} stands for, only "
        f"{pool / 2**30:.1f} GiB are free: another process holds the rest (nvidia-smi shows it). Stop it, choose "
        f"another device with CUDA_VISIBLE_DEVICES, or set gpu_memory_utilization to "
        f"{max(math.floor(100 * share * pool / limit) / 100, 0):.2f}"
    )


def reserve_small_blocks(put: Callable[[np.ndarray], jax.Array], largest: int) -> list[jax.Array]:
    """Reserves blocks for a step's inputs and tokens on a GPU, so that they are never where its temporaries were.

    A step is a CUDA graph that has the addresses of its arrays in it. XLA writes those of its parts anew whose arrays
    are elsewhere than in the step before: cheap for the inputs, as long as half a small model's step for the
    temporaries, which all parts use. Temporaries are freed once a step is on its way and allocated again for the next,
    and any small array that comes or goes between shifts them. JAX's allocator takes
    the smallest free block that an array fits into: so there are blocks of each power of two, with arrays between that
    keep them from growing together.

    Args:
        put: Puts an array on all devices.
        largest: Bytes of the largest small array.

    Returns:
        The arrays between, which are to be kept as long as the blocks.
    """
    sizes = [MIN_BLOCK_BYTES]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    pairs = [
        (put(np.zeros(size, np.int8)), put(np.zeros(WALL_BYTES, np.int8)))
        for size in reversed(sizes)
        for _ in range(NUM_BLOCKS)
    ]
    return [wall for _, wall in jax.block_until_ready(pairs)]


def page_bytes(config: EngineConfig) -> int:
    """Bytes of one page on a device: keys and values of as many layers as a cache group has.

    Raises:
        ValueError: Pages of two groups differ in size, since the backend fills up their heads.
    """
    layout = config.model.cache_layout
    size, backend = config.model.tensor_parallel_size, config.attention_backend
    first, *others = (cache_shapes(g.attention(config.attention, size), 1, backend) for g in layout.groups)
    for group, shapes in zip(layout.groups[1:], others, strict=True):
        if shapes != tuple(own_shape(shape, layout.groups[0], group) for shape in first):
            raise ValueError(
                f"attention_backend={backend!r} cannot keep heads of {group.spec.head_dim} and of "
                f"{layout.groups[0].spec.head_dim} in the same pages"
            )
    return layout.num_arrays * sum(map(math.prod, first)) * jnp.dtype(config.kv_cache_dtype).itemsize


def state_bytes(config: EngineConfig) -> int:
    """Bytes of the states of all slots on a device."""
    shapes = [array for state in config.model.cache_layout.states for array in state.shapes]
    row = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)
    return config.scheduler.max_num_seqs * row // config.model.tensor_parallel_size


def num_pages_that_fit(config: EngineConfig, step_bytes: Callable[[], int] | None, bytes_in_use: int = 0) -> int:
    """Pages in `kv_cache_memory_bytes`, or in what weights and the largest step leave of the device.

    Args:
        step_bytes: Measures the weights and the largest step's temporaries; None on CPU.
        bytes_in_use: By others than the weights, which may be loading already.

    Raises:
        ValueError: There is no room for a single request of `max_model_len` tokens.
    """
    available = config.kv_cache_memory_bytes
    if available is None:
        available = CPU_CACHE_BYTES if step_bytes is None else _free_device_bytes(config, step_bytes(), bytes_in_use)
    else:
        total = _total_bytes(config.platform)
        if total is not None and available > total:
            raise ValueError(
                f"kv_cache_memory_bytes={available}: the device has {total} bytes ({total / 2**30:.1f} GiB) in all"
            )
    available -= state_bytes(config)
    num_pages = max(available // page_bytes(config), 0)
    longest, num_step_tokens = config.scheduler.max_model_len, config.scheduler.max_num_batched_tokens
    needed = most_pages(page_groups(config), longest, num_step_tokens)
    if num_pages < needed:
        raise ValueError(
            f"the KV cache has room for {most_tokens(page_groups(config), num_pages, num_step_tokens)} tokens "
            f"({available / 2**20:.0f} MiB), less than max_model_len={longest} "
            f"({needed * page_bytes(config) / 2**20:.0f} MiB): lower max_model_len, or raise kv_cache_memory_bytes "
            "or gpu_memory_utilization"
        )
    return num_pages


def max_tokens_on_cpu(config: EngineConfig) -> int:
    """Length of the longest sequence that a CPU's cache holds, up to `max_model_len`."""
    available = config.kv_cache_memory_bytes or CPU_CACHE_BYTES
    num_pages = max((available - state_bytes(config)) // page_bytes(config), 0)
    scheduler = config.scheduler
    return most_tokens(page_groups(config), num_pages, scheduler.max_num_batched_tokens, scheduler.max_model_len)


def _total_bytes(platform: str) -> int | None:
    """Memory of the first device, or of the machine for CPUs; None if it does not tell."""
    if platform == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _free_device_bytes(config: EngineConfig, step_bytes: int, bytes_in_use: int) -> int:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    free = cache_bytes(limit, config.gpu_memory_utilization, bytes_in_use + step_bytes)
    logger.info(
        "device memory: %.2f GiB for JAX, %.2f in use, %.2f for weights and a step: %.2f GiB for the KV cache",
        *(x / 2**30 for x in (limit, bytes_in_use, step_bytes, free)),
    )
    return free


def cache_bytes(limit: int, utilization: float, taken: int) -> int:
    """What is left for the cache.

    Args:
        limit: What JAX may allocate.
        utilization: Share of the device's memory that the engine may take.
        taken: What others and the engine's weights and steps need of it.
    """
    device_bytes = limit / float(os.environ.get(FRACTION, JAX_FRACTION))
    return int(min(limit, device_bytes * utilization) * (1 - MARGIN)) - taken
