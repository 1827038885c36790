"""Products of few rows with a weight on Hopper, bound by reading the weight.

Each thread block streams its rows of the weight, and its part of the sums, through a ring in shared memory; one
warpgroup brings blocks in by TMA, some ahead, the others multiply. The rows of x are padded to the 64 of a wgmma, which
costs nothing while memory is what takes time. So that all multiprocessors read, the sums of a short product are cut in
parts, which whoever reads them adds up, in the same order every time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.skinny_matmul.config import ROWS, Config

I32, F32 = jnp.int32, jnp.float32


def product(x, weight, config: Config, *, gated: bool = False, out_dtype=None):
    """Returns the parts of `x @ weight.T`, or `silu(x @ gate.T) * (x @ up.T)`.

    Args:
      x: [T, K], T a multiple of 8.
      weight: [N, K], of the same 16-bit dtype; the gate's rows before the up's if `gated`.
      config: how to cut it; N must be a multiple of its tile_n, K of its tile_k.
      gated: whether to apply the gate; needs all sums in one part.
      out_dtype: of a result that is not in parts.

    Returns:
      f32[splits, T, N] to be added up; with one part, in `out_dtype` (x's by default): [T, N], or [T, N / 2] if gated.
    """
    num_rows, size_k = x.shape
    size_n = weight.shape[0]
    warpgroups = -(-num_rows // ROWS)
    halves = 2 if gated else 1
    part_n, tile_k = config.tile_n // halves, config.tile_k
    num_tiles, num_blocks = size_n // config.tile_n, size_k // tile_k
    is_whole, is_full = config.splits == 1, num_rows % ROWS == 0
    out_dtype = (out_dtype or x.dtype) if is_whole else F32
    out_shape = (num_rows, size_n // halves) if is_whole else (config.splits, num_rows, size_n)
    stages = config.num_stages(num_rows, jnp.dtype(out_dtype).itemsize, gated=gated)
    if stages < 2:  # a place is free only when the next block has been multiplied
        raise ValueError(f"{config} has no room for two blocks of {num_rows} rows")
    swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    def skinny_matmul(x_ref, weight_ref, out_ref, x_ring, weight_ring, out, full, free):
        tile, split, wg = (lax.axis_index(name) for name in ("tile", "split", "wg"))
        begin = lax.div(split * num_blocks, I32(config.splits))
        count = lax.div((split + 1) * num_blocks, I32(config.splits)) - begin

        @pl.when(wg < warpgroups)
        def _():
            own = pl.ds(wg * ROWS, ROWS)

            def multiply(*sums):
                def one_block(i, _):
                    slot = lax.rem(i, I32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    for j, acc in enumerate(sums):
                        plgpu.wgmma(acc, x_ring.at[slot, own], weight_ring.at[slot, j].transpose((1, 0)))
                    # The block before is done with: its place may be filled again.
                    plgpu.wgmma_wait(len(sums))

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(i - 1, I32(stages))])

                lax.fori_loop(I32(0), count, one_block, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[lax.rem(count - 1, I32(stages))])
                return tuple(acc[...] for acc in sums)

            sums = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, part_n), F32)] * halves)
            result = jax.nn.silu(sums[0]) * sums[1] if gated else sums[0]
            columns = pl.ds(tile * part_n, part_n)
            target = out_ref if is_whole else out_ref.at[split]
            if is_full:
                target[own, columns] = result.astype(out_dtype)
                return
            out[wg] = result.astype(out_dtype)
            plgpu.commit_smem()
            for i in range(warpgroups):
                used = min(ROWS, num_rows - i * ROWS)

                @pl.when(wg == i)
                def _(i=i, used=used):
                    source = out.at[i, pl.ds(0, used)]
                    plgpu.copy_smem_to_gmem(source, target.at[pl.ds(i * ROWS, used), columns])

            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == warpgroups)
        def _():
            def one_block(i, _):
                slot = lax.rem(i, I32(stages))
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                columns = pl.ds((begin + i) * tile_k, tile_k)
                plgpu.copy_gmem_to_smem(x_ref.at[:, columns], x_ring.at[slot, pl.ds(0, num_rows)], full.at[slot])
                for j in range(halves):
                    rows = pl.ds(j * (size_n // halves) + tile * part_n, part_n)
                    plgpu.copy_gmem_to_smem(weight_ref.at[rows, columns], weight_ring.at[slot, j], full.at[slot])

            lax.fori_loop(I32(0), count, one_block, None)
            for i in range(stages):  # every phase of a barrier must be observed
                pl.when(i < count)(functools.partial(plgpu.barrier_wait, free.at[i]))

    # A profile tells the products of a step apart.
    kind = "gated_" if gated else ""
    skinny_matmul.__name__ = f"{kind}skinny_matmul_{num_rows}x{size_n}x{size_k}_" + config.label
    return plgpu.kernel(
        skinny_matmul,
        out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
        grid=(num_tiles, config.splits),
        grid_names=("tile", "split"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((stages, warpgroups * ROWS, tile_k), x.dtype, transforms=swizzle),
            plgpu.SMEM((stages, halves, part_n, tile_k), x.dtype, transforms=swizzle),
            plgpu.SMEM((0 if is_full else warpgroups, ROWS, part_n), out_dtype),
            plgpu.Barrier(num_arrivals=1 + halves, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, weight)
