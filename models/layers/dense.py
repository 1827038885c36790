"""Matrices as they are, and every product with one: all but the kernels go through `matmul`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxengine.models.layers.param import ParameterSpec
from jaxengine.pallas_kernels.skinny_matmul import gated_skinny_matmul, has_kernel, skinny_matmul

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
    """Returns `x @ weight.T` with the sums in float32.

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
    """Returns whether CPUs compute a product by `_one_row`."""
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
    """Returns the product of few rows on CPUs, see `FEW_ROWS_OF_CPU`."""
    product = _contract(weight.astype(x.dtype), x.reshape(-1, x.shape[-1]), out_dtype=out_dtype, sums_dtype=jnp.float32)
    product = lax.optimization_barrier(product)  # or XLA would swap the operands instead of transposing
    return product.T.reshape(*x.shape[:-1], -1)


def _one_row(x: jax.Array, weight: jax.Array, *, out_dtype: DTypeLike) -> jax.Array:
    """Returns the product of one row with a 16-bit weight on CPUs, which is converted to float32 in registers.

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
    """Returns the product with a weight that is converted in blocks of rows, the last of them moved back to fit."""
    num_rows = weight.shape[0]
    block = max(CONVERTED_BYTES // (weight.shape[1] * x.dtype.itemsize), 1)

    def body(i, out):
        start = jnp.minimum(i * block, num_rows - block)
        product = _dot(x, lax.dynamic_slice_in_dim(weight, start, block), out_dtype)
        return lax.dynamic_update_slice_in_dim(out, product, start, axis=-1)

    return lax.fori_loop(0, -(-num_rows // block), body, jnp.zeros((*x.shape[:-1], num_rows), out_dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseMatrix:
    """All numbers of a matrix, `[out, in]`: see `Matrix`."""

    weight: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`."""
        return self.weight.shape

    def multiply(self, x: jax.Array, out_dtype: DTypeLike | None = None, *, allow_kernel: bool = False) -> jax.Array:
        """Returns the product, see `Matrix.multiply`."""
        if allow_kernel and self._has_kernel(x):
            return skinny_matmul(x, self.weight, out_dtype or x.dtype)
        return matmul(x, self.weight, out_dtype)

    def multiply_in_parts(self, x: jax.Array) -> jax.Array | None:
        """Returns the product in parts, see `Matrix.multiply_in_parts`."""
        return skinny_matmul(x, self.weight) if self._has_kernel(x) else None

    def multiply_gated(self, x: jax.Array) -> jax.Array | None:
        """Returns the gated product, see `Matrix.multiply_gated`."""
        return gated_skinny_matmul(x, self.weight) if self._has_kernel(x, gated=True) else None

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns rows, see `Matrix.take`."""
        return jnp.take(self.weight, ids, axis=0, mode="clip")

    def _has_kernel(self, x: jax.Array, *, gated: bool = False) -> bool:
        return x.dtype == self.weight.dtype and has_kernel(x.shape, self.weight.shape, x.dtype, gated=gated)


@dataclasses.dataclass(frozen=True)
class Dense:
    """All numbers, in one dtype: see `WeightFormat`."""

    dtype: str

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, ParameterSpec]:
        """Returns the one array that there is."""
        return {"weight": ParameterSpec(shape, self.dtype, axes)}

    def matrix(self, arrays: dict[str, jax.Array]) -> DenseMatrix:
        """Returns the matrix."""
        return DenseMatrix(**arrays)
