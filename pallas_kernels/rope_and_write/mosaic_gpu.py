"""Norm, rotation and cache write on Hopper: one pass where XLA takes four fusions and the attention a kernel to write.

A thread block takes a few rows (tokens) of one head: they come in by TMA, turn in registers, and go out by TMA, queries
as a tile, keys and values row by row to their pages.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

I32, F32 = jnp.int32, jnp.float32
TILE = 64  # rows of a wgmma's layout, most of which stay empty: many small thread blocks finish soonest
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def rope_and_write(
    qkv,
    cos,
    sin,
    cache,
    page,
    offset,
    *,
    norm_weights=None,
    norm_offset: float = 0.0,
    norm_eps: float = 0.0,
    scales=None,
):
    """See `api.rope_and_write`.

    Args:
      page: i32[T]; a row whose page is out of range is not written.
      offset: i32[T], slot in the page.
      scales: f32[2, K], what keys and values are divided by; only for a cache in another dtype than `qkv`'s.
    """
    num_pages, num_kv_heads, _, head_dim = cache[0].shape
    num_tokens, half = cos.shape
    all_heads = qkv.shape[1] // head_dim
    num_heads = all_heads - 2 * num_kv_heads
    rows = next(r for r in (4, 2, 1) if num_tokens % r == 0)  # so that no two thread blocks share any
    is_narrow = cache[0].dtype != qkv.dtype
    refs = tuple(jax.new_ref(pages) for pages in cache)
    own, columns = pl.ds(0, rows), [pl.ds(j * half, half) for j in (0, 1)]

    def rope_and_write(qkv_ref, cos_ref, sin_ref, page_ref, offset_ref, *rest, halves, out, values, turns, **barriers):
        rest, (k_pages_ref, v_pages_ref, q_ref) = list(rest[:-3]), rest[-3:]
        scales_ref = rest.pop() if scales is not None else None
        first, head = lax.axis_index("tokens") * rows, lax.axis_index("head")
        is_value = head >= num_heads + num_kv_heads

        def store_rows(sources, parts, pages_ref, kv_head):
            for i in range(rows):
                target, slot = page_ref[first + i], offset_ref[first + i]

                @pl.when((target >= 0) & (target < num_pages))
                def _(i=i, target=target, slot=slot):
                    for source, part in zip(sources, parts, strict=True):
                        row = pages_ref.at[target, kv_head, pl.ds(slot, 1), part]
                        plgpu.copy_smem_to_gmem(source.at[pl.ds(i, 1)], row)

        def load_halves():
            for ref, part in zip(halves, columns, strict=True):
                source = qkv_ref.at[pl.ds(first, rows), head, part]
                plgpu.copy_gmem_to_smem(source, ref.at[own], barriers["halves_full"])

        def store_narrow(parts, which: int, pages_ref, kv_head):
            scale = 1.0 if scales_ref is None else scales_ref[which, kv_head]
            for part, column in zip(parts, columns, strict=True):
                values[:, column] = _to_cache_dtype(part / scale, values.dtype)
            plgpu.commit_smem()
            store_rows((values,), (pl.ds(0, head_dim),), pages_ref, kv_head)

        @pl.when(is_value)
        def _():
            kv_head = head - num_heads - num_kv_heads
            if is_narrow:
                load_halves()
                plgpu.barrier_wait(barriers["halves_full"])
                store_narrow([_load(ref).astype(F32) for ref in halves], 1, v_pages_ref, kv_head)
                return
            plgpu.copy_gmem_to_smem(qkv_ref.at[pl.ds(first, rows), head], values.at[own], barriers["values_full"])
            plgpu.barrier_wait(barriers["values_full"])
            store_rows((values,), (pl.ds(0, head_dim),), v_pages_ref, kv_head)

        @pl.when(jnp.logical_not(is_value))
        def _():
            for ref, turn in zip((cos_ref, sin_ref), turns, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[pl.ds(first, rows)], turn.at[own], barriers["turns_full"])
            load_halves()
            plgpu.barrier_wait(barriers["turns_full"])
            plgpu.barrier_wait(barriers["halves_full"])
            turned = _turn(halves, turns, rest, (head >= num_heads).astype(F32), norm_offset, norm_eps, qkv.dtype)

            @pl.when(head < num_heads)
            def _():
                for ref, part in zip(out, turned, strict=True):
                    ref[...] = part
                plgpu.commit_smem()
                for ref, part in zip(out, columns, strict=True):
                    plgpu.copy_smem_to_gmem(ref.at[own], q_ref.at[pl.ds(first, rows), head, part])

            @pl.when(head >= num_heads)
            def _():
                if is_narrow:
                    store_narrow([part.astype(F32) for part in turned], 0, k_pages_ref, head - num_heads)
                    return
                for ref, part in zip(out, turned, strict=True):
                    ref[...] = part
                plgpu.commit_smem()
                store_rows(out, columns, k_pages_ref, head - num_heads)

        plgpu.wait_smem_to_gmem(0)

    q = plgpu.kernel(
        rope_and_write,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), qkv.dtype),
        grid=(num_tokens // rows, all_heads),
        grid_names=("tokens", "head"),
        scratch_types={
            # Of their own: columns 64 to 128 of one reference come out swizzled wrongly (jax 0.11.2, on the card).
            "halves": [plgpu.SMEM((TILE, half), qkv.dtype)] * 2,
            "out": [plgpu.SMEM((TILE, half), qkv.dtype)] * 2,
            "values": plgpu.SMEM((TILE, head_dim), cache[0].dtype),
            "turns": [plgpu.SMEM((TILE, half), F32)] * 2,
            "halves_full": plgpu.Barrier(num_arrivals=2),
            "turns_full": plgpu.Barrier(num_arrivals=2),
            "values_full": plgpu.Barrier(),
        },
    )(
        qkv.reshape(num_tokens, all_heads, head_dim),
        cos,
        sin,
        page,
        offset,
        *(norm_weights or ()),
        *(() if scales is None else (scales,)),
        *refs,
    )
    return q, tuple(jax.freeze(ref) for ref in refs)


def _turn(halves, turns, weight_refs, is_key, norm_offset: float, norm_eps: float, dtype) -> list:
    """Returns the normed and rotated halves of a head, `dtype`[64, H / 2] each."""
    cosine, sine = (_load(turn) for turn in turns)
    x, y = (_load(ref).astype(F32) for ref in halves)
    if weight_refs:
        x, y = _norm(x, y, _weights(weight_refs, is_key, x.shape, norm_offset), norm_eps, dtype)
    return [(x * cosine - y * sine).astype(dtype), (y * cosine + x * sine).astype(dtype)]


def _to_cache_dtype(x, dtype):
    """As the reference's `to_cache_dtype`: rounded, and clipped to what the dtype holds."""
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.clip(jnp.round(x), info.min, info.max).astype(dtype)
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit).astype(dtype)


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
