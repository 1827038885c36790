"""Linear layers. Every matrix product with a weight goes through `matmul`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxengine.models.layers.param import parameter
from jaxengine.models.step import NO_CONTEXT, StepContext
from jaxengine.pallas_kernels.all_reduce import Workspace, all_reduce
from jaxengine.pallas_kernels.skinny_matmul import has_kernel, skinny_matmul
from jaxengine.sharding.layout import Runs
from jaxengine.sharding.mesh import DATA, MODEL
from jaxengine.sharding.rules import partition_spec

CONVERTED_BYTES = 8 * 2**20
"""Larger weights of another dtype than the activations' are converted in parts that stay in a CPU's cache."""
CHUNK, MAX_CHUNKS, MIN_CHUNKED = 64, 24, 256
"""Width of the chunks in which a CPU takes a 16-bit weight for one row, and their number, beyond which they widen; the
columns from which that is worth it."""
FEW_ROWS_OF_CPU = 64
"""Up to here CPUs take the weight as the first operand in float32: the library packs the second, which then is the
smaller one."""
MANY_ROWS = 256
"""From here on a product is asked for in the dtype it is wanted in: asked for in float32, a GPU's library writes
it so and another kernel rounds it. With few rows XLA sums parts of a product in a kernel of their own, which also
rounds."""


def matmul(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`x @ weight.T` with the sums in float32.

    Contracting the last axis of both keeps weights in the checkpoint's orientation (no transpose at load) and is what
    CPUs run fastest.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        out_dtype: Dtype of the result; by default that of `x`.

    Returns:
        `[..., out]`.
    """
    has_large_copy = weight.dtype != x.dtype and weight.size * x.dtype.itemsize > CONVERTED_BYTES
    multiply = _dot_by_blocks if has_large_copy and not _is_chunked(x, weight) else _dot
    return multiply(x, weight, out_dtype or x.dtype)


def _dot(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    rows = x.size // x.shape[-1]
    on_cpu = elsewhere = functools.partial(_contract, out_dtype=out_dtype, sums_dtype=jnp.float32)
    if _is_chunked(x, weight):
        on_cpu = functools.partial(_one_row, out_dtype=out_dtype)
    elif x.dtype == jnp.float32 and 1 < rows <= FEW_ROWS_OF_CPU:
        on_cpu = functools.partial(_weight_first, out_dtype=out_dtype)
    if rows >= MANY_ROWS and out_dtype != jnp.float32:
        elsewhere = functools.partial(_contract, out_dtype=out_dtype, sums_dtype=out_dtype)
    if on_cpu is elsewhere:
        return on_cpu(x, weight)
    # By the platform that is compiled for, which need not be this process's.
    return lax.platform_dependent(x, weight, cpu=on_cpu, default=elsewhere)


def _is_chunked(x: jax.Array, weight: jax.Array) -> bool:
    """Whether CPUs compute a product by `_one_row`."""
    return x.size == x.shape[-1] >= MIN_CHUNKED and weight.dtype.itemsize == 2


def _contract(x: jax.Array, weight: jax.Array, *, out_dtype: DTypeLike, sums_dtype: DTypeLike) -> jax.Array:
    return lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())),
        precision=lax.Precision.HIGHEST,  # matters for float32 on GPUs and TPUs only, which would round it
        preferred_element_type=sums_dtype,
    ).astype(out_dtype)


def _weight_first(x: jax.Array, weight: jax.Array, *, out_dtype: DTypeLike) -> jax.Array:
    """The product of few rows on CPUs, see `FEW_ROWS_OF_CPU`."""
    product = _contract(weight.astype(x.dtype), x.reshape(-1, x.shape[-1]), out_dtype=out_dtype, sums_dtype=jnp.float32)
    product = lax.optimization_barrier(product)  # or XLA would swap the operands instead of transposing
    return product.T.reshape(*x.shape[:-1], -1)


def _one_row(x: jax.Array, weight: jax.Array, *, out_dtype: DTypeLike) -> jax.Array:
    """The product of one row with a 16-bit weight on CPUs, which is converted to float32 in registers.

    Chunks of the weight's rows are added up element by element, a loop that vectorises; what is left of a row, 64
    numbers or a few more, is summed in an operation of its own. The last chunk is moved back to fit.
    """
    row = x.reshape(-1).astype(jnp.float32)
    width = CHUNK * -(-row.size // (CHUNK * MAX_CHUNKS))
    sums = jnp.zeros((), jnp.float32)
    for end in [*range(width, row.size, width), row.size]:
        own = row[(end - 1) // width * width : end]
        numbers = jnp.pad(own, (width - own.size, 0))  # zeros for those that the chunk before has
        sums += numbers * lax.slice_in_dim(weight, end - width, end, axis=1).astype(jnp.float32)
    sums = lax.optimization_barrier(sums)  # or the loop would be part of the reduction
    return sums.sum(axis=-1).astype(out_dtype).reshape(*x.shape[:-1], -1)


def _dot_by_blocks(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike) -> jax.Array:
    """The product with a weight that is converted block by block of its rows, the last of them moved back to fit."""
    num_rows = weight.shape[0]
    block = max(CONVERTED_BYTES // (weight.shape[1] * x.dtype.itemsize), 1)

    def body(i, out):
        start = jnp.minimum(i * block, num_rows - block)
        product = _dot(x, lax.dynamic_slice_in_dim(weight, start, block), out_dtype)
        return lax.dynamic_update_slice_in_dim(out, product, start, axis=-1)

    return lax.fori_loop(0, -(-num_rows // block), body, jnp.zeros((*x.shape[:-1], num_rows), out_dtype))


def few_rows_matmul(x: jax.Array, weight: jax.Array) -> Callable[..., jax.Array]:
    """`skinny_matmul` where it has a kernel for a product, else `matmul`."""
    has_own = x.dtype == weight.dtype and has_kernel(x.shape, weight.shape, x.dtype)
    return skinny_matmul if has_own else matmul


class Linear(nnx.Module):
    """`x @ weight.T + bias`, weight `[out, in]`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        parts: tuple[int, ...] = (),
        rows: Runs = (),
        columns: Runs = (),
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        """Makes the layer.

        Args:
            in_features: Size of the input.
            out_features: Size of the output.
            axes: Logical axes of `[out, in]`.
            bias: Whether there is one.
            parts, rows, columns: As in `parameter`, where layers of a checkpoint are fused into this one, or its rows
                or columns are in another order.
            dtype: Dtype of the parameters.
            rngs: As in `parameter`.
        """
        shape, order = (out_features, in_features), {"parts": parts, "rows": rows}
        self.weight = parameter(shape, axes, dtype=dtype, rngs=rngs, columns=columns, **order)
        self.bias = parameter(shape[:1], axes[:1], dtype=dtype, rngs=rngs, init="zeros", **order) if bias else None
        self.has_shared_input = partition_spec(axes)[1] == MODEL

    def __call__(self, x: jax.Array, step: StepContext = NO_CONTEXT, *, allow_partial: bool = False) -> jax.Array:
        """Applies the layer.

        Args:
            x: `[..., in]`; `[T, in]` for a step with a workspace, if the devices share the last axis.
            step: The step's context.
            allow_partial: Allows a result in parts, for a `PendingResidual`.

        Returns:
            `[..., out]`, or parts of it, f32[S, T, out].
        """
        weight = self.weight[...]
        if step.workspace is not None and self.has_shared_input:
            out = sum_over_devices(x, weight, step.workspace)
            return out if self.bias is None else out + self.bias[...]
        multiply = matmul if step.is_differentiable else few_rows_matmul(x, weight)
        if allow_partial and multiply is skinny_matmul and self.bias is None:
            return skinny_matmul(x, weight)
        if self.bias is None:
            return multiply(x, weight, x.dtype)
        # The bias is added before rounding, as a fused kernel would.
        return (multiply(x, weight, jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def sum_over_devices(x: jax.Array, weight: jax.Array, workspace: Workspace) -> jax.Array:
    """`x @ weight.T`, `[T, in]` and `[out, in]` with the last axis of both over the devices of the model."""

    def own(x, weight, workspace):
        return all_reduce(few_rows_matmul(x, weight)(x, weight, x.dtype), MODEL, workspace=workspace)

    columns, kept = PartitionSpec(None, MODEL), PartitionSpec(DATA, MODEL)
    return jax.shard_map(own, in_specs=(columns, columns, kept), out_specs=PartitionSpec(), check_vma=False)(
        x, weight, workspace
    )


def split_fused(x: jax.Array, parts: Sequence[int], size: int) -> list[jax.Array]:
    """Takes apart what a fused layer made on `size` devices, which hold their shares of all parts side by side.

    Args:
        x: `[T, sum(parts)]`.
        parts: Size of each part, over all devices.
        size: Devices.

    Returns:
        `[T, part]` of each part.
    """
    ends = list(itertools.accumulate(part // size for part in parts))
    shares = jnp.split(x.reshape(x.shape[0], size, -1), ends[:-1], axis=-1)
    return [share.reshape(x.shape[0], -1) for share in shares]
