"""Residual addition and norm on Hopper: a thread block takes a row, each of its warpgroups some of the columns.

A row is little to read, so that what takes time is waiting for it: many threads, with few numbers each, ask for all of
it at once.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F32 = jnp.float32
THREADS, MAX_WARPGROUPS = 128, 8


def add_norm(residual, parts, weight, *, eps: float, offset: float):
    """See `api.add_norm`; parts are [S, T, D], D a multiple of 512."""
    num_rows, dim = residual.shape
    vec_size = next(v for v in (8, 4) if dim % (THREADS * v) == 0)
    warpgroups = next(w for w in range(MAX_WARPGROUPS, 0, -1) if dim % (THREADS * vec_size * w) == 0)
    size = dim // warpgroups
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vec_size)

    def add_norm(residual_ref, parts_ref, weight_ref, sum_ref, normed_ref, squares, is_written):
        row, wg = lax.axis_index("row"), lax.axis_index("wg")
        columns = pl.ds(wg * size, size)

        def load(ref):
            return plgpu.load(ref, layout=layout, optimized=False).astype(F32)

        values = [load(residual_ref.at[row, columns])]
        values += [load(parts_ref.at[i, row, columns]) for i in range(parts.shape[0])]
        scale = load(weight_ref.at[columns]) + offset
        rounded = sum(values[1:], values[0]).astype(residual.dtype)
        sum_ref[row, columns] = rounded
        wide = rounded.astype(F32)
        square = jnp.sum(wide * wide)
        if warpgroups > 1:
            squares[wg] = square
            plgpu.barrier_arrive(is_written)
            plgpu.barrier_wait(is_written)
            square = squares[0]
            for i in range(1, warpgroups):
                square += squares[i]
        normed_ref[row, columns] = (wide * lax.rsqrt(square / dim + eps) * scale).astype(residual.dtype)

    shape = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    return plgpu.kernel(
        add_norm,
        out_type=(shape, shape),
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="wg",
        scratch_types=[plgpu.SMEM((warpgroups,), F32), plgpu.Barrier(num_arrivals=warpgroups)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(residual, parts, weight)
