"""The public op: checks its arguments once and hands them to an implementation."""

import ctypes
import dataclasses
import functools
import importlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

logger = logging.getLogger(__name__)

# Modules beside this one, imported on first use.
IMPLEMENTATIONS = ("reference", "mosaic_gpu")
MAX_DEVICES = 8  # XLA keeps what it knows of peers for so many devices of a process


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Workspace:
    """What the kernel keeps from call to call, so that no call waits for all devices to begin it.

    Attributes:
      inboxes: where peers put their parts; arrays, or in a step the `jax.Ref`s that the calls change.
      flags: how far each peer is.
      implementation: a name in `IMPLEMENTATIONS`, which sums that are given the workspace use.
    """

    inboxes: Any
    flags: Any
    implementation: str = dataclasses.field(default="mosaic_gpu", metadata={"static": True})


def make_workspace(num_devices: int, dim: int, dtype: str, sharding: jax.sharding.Sharding) -> Workspace:
    """Makes the workspace of sums [T, dim] over `num_devices`, for every program that runs on them.

    It must be there on all devices before a step runs on any, and all must run the same calls in the same order.

    Args:
      num_devices: devices of the axis.
      dim: D.
      dtype: of the sums.
      sharding: splits the second axis over the devices.
    """
    from jaxengine.pallas_kernels.all_reduce import mosaic_gpu

    shapes = mosaic_gpu.workspace_shapes(num_devices, min(dim, mosaic_gpu.MAX_WIDTH))
    inboxes, flags = (
        jnp.zeros((shape[0], shape[1] * num_devices, *shape[2:]), kind, device=sharding)
        for shape, kind in zip(shapes, (dtype, jnp.int32), strict=True)
    )
    return Workspace(inboxes, flags)


def all_reduce(
    x: jax.Array,
    axis_name: str,
    *,
    residual: jax.Array | None = None,
    norm_weight: jax.Array | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    implementation: str = "reference",
    workspace: Workspace | None = None,
) -> Any:
    """Sums `x` over a mesh axis, inside `shard_map` over all axes of the mesh; all devices get the same bits.

    Args:
      x: [T, D], each device's part of the sum. It is summed in float32 and rounded once; `psum` of many devices may
        round more often.
      axis_name: the axis.
      residual: [T, D], added to the rounded sum.
      norm_weight: [D], of a root mean square norm of the result.
      norm_eps: added to the mean square.
      norm_offset: added to the weights.
      implementation: a name in `IMPLEMENTATIONS`; see `choose_implementation`. A workspace says its own.
      workspace: this device's part of one made by `make_workspace`, as `jax.Ref`s; without, the kernel waits for a
        barrier of all devices first.

    Returns:
      The sum, plus `residual`: [T, D]. With `norm_weight` a pair: that, and its norm.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or no such implementation.
    """
    implementation = implementation if workspace is None else workspace.implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if x.ndim != 2:
        raise ValueError(f"expected x[T, D], got {x.shape}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"residual is {residual.dtype}{residual.shape}, x is {x.dtype}{x.shape}: they must be alike")
    if norm_weight is not None and norm_weight.shape != x.shape[1:]:
        raise ValueError(f"norm_weight{norm_weight.shape} does not fit x{x.shape}: expected {x.shape[1:]}")
    if implementation == "mosaic_gpu" and not has_kernel(x, lax.axis_size(axis_name), norm_weight is not None):
        implementation = "reference"
    module = importlib.import_module(f"jaxengine.pallas_kernels.all_reduce.{implementation}")
    return module.all_reduce(
        x,
        axis_name,
        residual=residual,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        workspace=workspace,
    )


def has_kernel(x: jax.Array | jax.ShapeDtypeStruct, num_devices: int, has_norm: bool = False) -> bool:
    """Returns whether sums of this size go over peer memory: few tokens, in 16 bits, over more than one device."""
    from jaxengine.pallas_kernels.all_reduce import mosaic_gpu

    num_bytes = x.size * x.dtype.itemsize * (num_devices - 1)
    return (
        num_devices > 1
        and x.dtype in ("bfloat16", "float16")
        and num_bytes <= mosaic_gpu.MAX_BYTES
        and mosaic_gpu.block_width(*x.shape, whole_rows=has_norm) is not None
    )


def choose_implementation(devices: Sequence[Any]) -> str:
    """Returns the kernel where all devices of a mesh reach each other's memory.

    Otherwise returns `psum`, and the log says once why.

    Args:
      devices: of the mesh, in its order.
    """
    if len(devices) == 1 or devices[0].platform not in ("gpu", "cuda"):
        return "reference"
    reason = _obstacle(devices)
    if reason is None:
        return "mosaic_gpu"
    _warn_once(f"sums over devices run through NCCL, which is slow for few tokens: {reason}")
    return "reference"


def _obstacle(devices: Sequence[Any]) -> str | None:
    """Returns why these GPUs cannot run the kernel."""
    if len(devices) > MAX_DEVICES:
        return f"{len(devices)} devices, more than {MAX_DEVICES}"
    if len({device.process_index for device in devices}) > 1:
        return "the devices are of several processes"
    # XLA and Mosaic count devices as the mesh has them.
    if not np.array_equal([device.id for device in devices], range(len(devices))):
        return f"devices {[device.id for device in devices]} are not the first ones in their order"
    if float(getattr(devices[0], "compute_capability", 0)) < 9:
        return f"{devices[0].device_kind} is older than Hopper"
    apart = [pair for pair in itertools.permutations(devices, 2) if not _reaches(*pair)]
    return f"GPU {apart[0][0].id} does not reach the memory of GPU {apart[0][1].id}" if apart else None


def _reaches(device: Any, peer: Any) -> bool:
    """Returns whether the driver lets a GPU address another's memory. JAX does not say."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    answer = ctypes.c_int(0)
    ordinals = (device.local_hardware_id, peer.local_hardware_id)
    handles = [ctypes.c_int(0), ctypes.c_int(0)]
    failed = driver.cuInit(0)
    for handle, ordinal in zip(handles, ordinals, strict=True):
        failed = failed or driver.cuDeviceGet(ctypes.byref(handle), ordinal)
    failed = failed or driver.cuDeviceCanAccessPeer(ctypes.byref(answer), *handles)
    return not failed and answer.value == 1


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
