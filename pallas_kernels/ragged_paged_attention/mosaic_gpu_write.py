"""New keys and values into their pages on Hopper: by TMA, both in one kernel, where XLA takes a scatter for each."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_gpu_common import I32

MAX_BYTES = 64 * 1024  # of shared memory for the keys or values that a thread block moves
MAX_TOKENS = 16


def write(k, v, cache, page, offset):
    """Stores rows of k and v [T, K, H], in the cache's dtype, to slots of pages; in place where the cache is donated.

    Args:
      cache: K and V pages, [P, K, page, H].
      page: i32[T]; a row whose page is out of range is dropped.
      offset: i32[T], slot in the page.
    """
    num_rows, num_kv_heads, head_dim = k.shape
    num_pages = cache[0].shape[0]
    row_bytes = num_kv_heads * head_dim * k.dtype.itemsize
    tokens = max(1, min(MAX_TOKENS, num_rows, MAX_BYTES // row_bytes))
    refs = tuple(jax.new_ref(pages) for pages in cache)

    def write_pages(k_ref, v_ref, page_ref, offset_ref, k_pages_ref, v_pages_ref, rows, barrier):
        own = lax.axis_index("tokens") * tokens
        first = jnp.minimum(own, num_rows - tokens)  # the last block starts earlier, and leaves out what is not its own

        def move(new_ref, pages_ref):
            plgpu.copy_gmem_to_smem(new_ref.at[pl.ds(first, tokens)], rows, barrier)
            plgpu.barrier_wait(barrier)

            def store(i, _):
                target = page_ref[first + i]

                @pl.when((target >= 0) & (target < num_pages))
                def _():
                    plgpu.copy_smem_to_gmem(rows.at[i], pages_ref.at[target, :, offset_ref[first + i]])

            lax.fori_loop(own - first, I32(tokens), store, None)
            plgpu.wait_smem_to_gmem(0)

        is_key = lax.axis_index("which") == 0
        pl.when(is_key)(lambda: move(k_ref, k_pages_ref))
        pl.when(jnp.logical_not(is_key))(lambda: move(v_ref, v_pages_ref))

    plgpu.kernel(
        write_pages,
        grid=(pl.cdiv(num_rows, tokens), 2),
        grid_names=("tokens", "which"),
        scratch_types=[plgpu.SMEM((tokens, num_kv_heads, head_dim), k.dtype), plgpu.Barrier()],
    )(k, v, page, offset, *refs)
    return tuple(jax.freeze(ref) for ref in refs)
