"""The public ops: products of the few rows of a decode step with a weight, where a platform has a kernel for them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxengine.pallas_kernels.skinny_matmul.config import (
    HOST_BOUND_ROWS,
    MAX_ROWS,
    MIN_ROWS,
    MIN_WEIGHT_BYTES,
    choose_config,
    is_hopper,
)


def has_kernel(x_shape: Sequence[int], weight_shape: Sequence[int], dtype: DTypeLike, *, gated: bool = False) -> bool:
    """Returns whether a kernel is worth it on the device that is compiled for.

    It is on a Hopper, for 8 to 256 rows of 16-bit numbers, and below 64 rows for a weight of 16 MiB at least. Not
    inside a mesh over whose devices XLA cuts the product: it would not cut a kernel.

    Args:
      x_shape: [T, K], T a multiple of 8.
      weight_shape: [N, K].
      dtype: of both.
      gated: as for `gated_skinny_matmul`.
    """
    if len(x_shape) != 2 or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16) or not is_hopper():
        return False
    num_rows, size_k = x_shape
    if num_rows < HOST_BOUND_ROWS and 2 * weight_shape[0] * size_k < MIN_WEIGHT_BYTES:
        return False
    if not MIN_ROWS <= num_rows <= MAX_ROWS or num_rows % 8 or size_k % 64:
        return False
    return choose_config(num_rows, weight_shape[0], size_k, gated=gated) is not None


def skinny_matmul(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Returns `x @ weight.T`, summed in float32. Only where `has_kernel` says so.

    Args:
      x: [T, K].
      weight: [N, K], of the same dtype.
      out_dtype: of the product; None for its parts, which whoever reads them adds up (`add_norm` does).

    Returns:
      f32[S, T, N] whose sum over the first axis is the product, S being 1 or more; or the product itself, [T, N].

    Raises:
      ValueError: shapes or dtypes that do not fit together, or that have no kernel.
    """
    from jaxengine.pallas_kernels.skinny_matmul import mosaic_gpu

    config = _config(x, weight, gated=False)
    if out_dtype is None:
        parts = mosaic_gpu.product(x, weight, config, out_dtype=jnp.float32)
        return parts if config.splits > 1 else parts[None]
    product = mosaic_gpu.product(x, weight, config, out_dtype=jnp.dtype(out_dtype))
    return product if config.splits == 1 else product.sum(0).astype(out_dtype)


def gated_skinny_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `silu(x @ gate.T) * (x @ up.T)`, computed in float32. Only where `has_kernel` says so of gated ones.

    Args:
      x: [T, K].
      weight: [2F, K], of the same dtype; the gate's rows before the up's.

    Returns:
      [T, F] in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or that have no kernel.
    """
    from jaxengine.pallas_kernels.skinny_matmul import mosaic_gpu

    return mosaic_gpu.product(x, weight, _config(x, weight, gated=True), gated=True)


def _config(x, weight, *, gated: bool):
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"expected x[T, K] and weight[N, K] of one dtype, got {x.shape} {x.dtype}, {weight.shape} {weight.dtype}"
        )
    config = choose_config(x.shape[0], *weight.shape, gated=gated)
    if config is None:
        raise ValueError(f"x{x.shape}, weight{weight.shape}: no way to cut this product; ask `has_kernel` first")
    return config
