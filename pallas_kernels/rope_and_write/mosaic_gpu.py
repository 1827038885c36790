"""Norm, rotation and cache write on Hopper: one pass where XLA takes four fusions and the attention a kernel to write.

A thread block takes some rows (tokens) of some heads, one head after the other: a tile of rows comes in by TMA, turns
in registers, and goes out by TMA, queries as a tile, keys and values row by row to their pages.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

I32, F32 = jnp.int32, jnp.float32
TILE = 64  # rows of a wgmma's layout; fewer may be in use
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
FEW_TOKENS = 1024  # up to so many, many small thread blocks finish sooner than few large ones


def rows_and_heads(num_tokens: int, num_heads: int) -> tuple[int, int]:
    """Rows and heads of a thread block; the rows divide T, so that no two blocks share any."""
    few = num_tokens <= FEW_TOKENS
    rows = next(r for r in (() if few else (TILE,)) + (16, 8, 4, 2, 1) if num_tokens % r == 0)
    return rows, 1 if few else next(h for h in (8, 6, 5, 4, 3, 2, 1) if num_heads % h == 0)


def rope_and_write(qkv, cos, sin, cache, page, offset, *, norm_weights, norm_offset: float, norm_eps: float):
    """See `api.rope_and_write`.

    Args:
      page: i32[T]; a row whose page is out of range is not written.
      offset: i32[T], slot in the page.
    """
    num_pages, num_kv_heads, _, head_dim = cache[0].shape
    num_tokens, half = cos.shape
    all_heads = qkv.shape[1] // head_dim
    num_heads = all_heads - 2 * num_kv_heads
    rows, heads = rows_and_heads(num_tokens, all_heads)
    refs = tuple(jax.new_ref(pages) for pages in cache)

    def rope_and_write(qkv_ref, cos_ref, sin_ref, page_ref, offset_ref, *rest, raw, out, turns, loaded, turns_loaded):
        *weight_refs, k_pages_ref, v_pages_ref, q_ref = rest
        first = lax.axis_index("tokens") * rows
        own = pl.ds(0, rows)
        for i, ref in enumerate((cos_ref, sin_ref)):
            plgpu.copy_gmem_to_smem(ref.at[pl.ds(first, rows)], turns.at[i, own], turns_loaded)
        plgpu.barrier_wait(turns_loaded)
        cosine, sine = (_load(turns.at[i]) for i in (0, 1))

        def store_row(i: int, source, pages_ref, kv_head):
            target, slot = page_ref[first + i], offset_ref[first + i]

            @pl.when((target >= 0) & (target < num_pages))
            def _():
                plgpu.copy_smem_to_gmem(source.at[pl.ds(i, 1)], pages_ref.at[target, kv_head, pl.ds(slot, 1)])

        def store_rows(*args):
            for i in range(rows):
                store_row(i, *args)

        def one_head(i, _):
            head = lax.axis_index("heads") * heads + i
            plgpu.wait_smem_to_gmem(0)  # of the head before
            plgpu.copy_gmem_to_smem(qkv_ref.at[pl.ds(first, rows), head], raw.at[own], loaded)
            plgpu.barrier_wait(loaded)

            @pl.when(head < num_heads + num_kv_heads)
            def _():
                x, y = (_load(raw.at[:, pl.ds(j * half, half)]).astype(F32) for j in (0, 1))
                if weight_refs:
                    weights = _weights(weight_refs, (head >= num_heads).astype(F32), x.shape, norm_offset)
                    x, y = _norm(x, y, weights, norm_eps, qkv.dtype)
                out[:, pl.ds(0, half)] = (x * cosine - y * sine).astype(qkv.dtype)
                out[:, pl.ds(half, half)] = (y * cosine + x * sine).astype(qkv.dtype)
                plgpu.commit_smem()

            @pl.when(head < num_heads)
            def _():
                plgpu.copy_smem_to_gmem(out.at[own], q_ref.at[pl.ds(first, rows), head])

            @pl.when((head >= num_heads) & (head < num_heads + num_kv_heads))
            def _():
                store_rows(out, k_pages_ref, head - num_heads)

            @pl.when(head >= num_heads + num_kv_heads)
            def _():
                store_rows(raw, v_pages_ref, head - num_heads - num_kv_heads)

        lax.fori_loop(I32(0), I32(heads), one_head, None)
        plgpu.wait_smem_to_gmem(0)

    q = plgpu.kernel(
        rope_and_write,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), qkv.dtype),
        grid=(num_tokens // rows, all_heads // heads),
        grid_names=("tokens", "heads"),
        scratch_types={
            "raw": plgpu.SMEM((TILE, head_dim), qkv.dtype),
            "out": plgpu.SMEM((TILE, head_dim), qkv.dtype),
            "turns": plgpu.SMEM((2, TILE, half), F32),
            "loaded": plgpu.Barrier(),
            "turns_loaded": plgpu.Barrier(num_arrivals=2),
        },
    )(qkv.reshape(num_tokens, all_heads, head_dim), cos, sin, page, offset, *(norm_weights or ()), *refs)
    return q, tuple(jax.freeze(ref) for ref in refs)


def _load(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def _weights(refs, is_key, shape, offset: float) -> list:
    """Weights of the norm of keys (`is_key` 1.0) or of queries (0.0), for each half of the heads: f32[64, H / 2]."""
    halves = []
    for j in (0, 1):
        part = pl.ds(j * shape[1], shape[1])
        of_queries, of_keys = (plgpu.load(ref.at[part], layout=COLUMNS, optimized=False).astype(F32) for ref in refs)
        chosen = of_keys * is_key + of_queries * (1 - is_key)
        halves.append(lax.broadcast_in_dim(chosen + offset, shape, [1]))
    return halves


def _norm(x, y, weights, eps: float, dtype) -> list:
    """The norm of heads whose halves are x and y, f32[64, H / 2] each, rounded as a norm of its own would."""
    mean = ((x * x).sum(axis=1) + (y * y).sum(axis=1)) / (2 * x.shape[1])
    factor = lax.broadcast_in_dim(lax.rsqrt(mean + eps), x.shape, [0])
    return [(part * factor * w).astype(dtype).astype(F32) for part, w in zip((x, y), weights, strict=True)]
