"""The public op: adds what a layer made to the residual, and norms the sum for the next layer."""

import jax
import jax.numpy as jnp

from jaxengine.pallas_kernels.add_norm import reference
from jaxengine.pallas_kernels.skinny_matmul.config import HOST_BOUND_ROWS, MAX_ROWS, MIN_ROWS, is_hopper

MIN_COLUMNS = 2048  # of few rows; narrower models are bound by the host then: see `skinny_matmul.config`
COLUMNS = 512  # of a row, or a multiple of it: each thread of the kernel reads at least four at once


def add_norm(
    residual: jax.Array, parts: jax.Array, weight: jax.Array, *, eps: float, offset: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Adds to the residual and applies a root mean square norm over the last axis (arXiv 1910.07467), in float32.

    On a Hopper GPU that is one kernel for 8 to 256 rows, if D is a multiple of 512, below 64 rows 2048 at least, and
    the dtype has 16 bits; elsewhere XLA fuses it.

    Args:
      residual: [T, D].
      parts: [S, T, D] to be added up, in order (see `skinny_matmul`), or [T, D].
      weight: [D], of the norm.
      eps: added to the mean square.
      offset: added to the weight.

    Returns:
      The sum, rounded to the residual's dtype, and its norm: [T, D] each.

    Raises:
      ValueError: shapes that do not fit together.
    """
    parts = parts[None] if parts.ndim == 2 else parts
    if residual.ndim != 2 or parts.shape[1:] != residual.shape or weight.shape != residual.shape[1:]:
        raise ValueError(
            f"expected residual[T, D], parts[S, T, D] and weight[D], got {residual.shape}, {parts.shape} and "
            f"{weight.shape}"
        )
    is_narrow = residual.dtype in (jnp.bfloat16, jnp.float16)
    has_few_rows = MIN_ROWS <= residual.shape[0] <= MAX_ROWS
    is_wide = residual.shape[1] >= MIN_COLUMNS or residual.shape[0] >= HOST_BOUND_ROWS
    if is_narrow and has_few_rows and is_wide and residual.shape[1] % COLUMNS == 0 and is_hopper():
        from jaxengine.pallas_kernels.add_norm import mosaic_gpu

        return mosaic_gpu.add_norm(residual, parts, weight, eps=eps, offset=offset)
    return reference.add_norm(residual, parts, weight, eps=eps, offset=offset)
