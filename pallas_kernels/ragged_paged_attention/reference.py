"""Ragged paged attention in plain JAX: the CPU's path, and what the kernels are tested against.

All loops have run-time bounds, so the work follows the pages in use and not the longest sequence allowed. Softmax is
computed online over blocks of keys (Milakov and Gimelshein, arXiv 1805.02867), in float32.

Decodes go in groups of `GROUP` sequences, each group as far as its longest member: one gather and two batched matmuls
a block keep the per-operation overhead of XLA's CPU backend small. Longer chunks go one block of queries at a time.
"""

import functools

import jax.numpy as jnp
from jax import lax

GROUP = 16  # decodes handled together
KEY_BLOCK = 64  # keys a step of the decode loop (measured on CPU: 64 beats 16, 32 and 128)
QUERY_BLOCK = 64  # queries a step of the prefill loop
PREFILL_KEY_BLOCK = 128
MASKED = -1e30  # finite, so that a row with no valid key yields zeros instead of NaN


def cache_shape(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    return (num_pages, num_kv_heads, page_size, head_dim)


def ragged_paged_attention(q, k, v, cache, meta, *, scale, sliding_window, soft_cap, sinks, k_scale, v_scale):
    """See `api.ragged_paged_attention`."""
    k_pages, v_pages = _write(k, v, cache, meta, k_scale, v_scale)
    attend = functools.partial(
        _attend_block, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale
    )
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    dtype = q.dtype
    query_rows = min(QUERY_BLOCK, num_tokens)
    # Blocks of rows are sliced at run-time offsets; the padding keeps the last block from being shifted back.
    pad = max(query_rows, min(GROUP, meta.kv_lens.shape[0]))
    q = jnp.pad(q.astype(jnp.float32), ((0, pad), (0, 0), (0, 0)))
    q = q.reshape(num_tokens + pad, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [T+, K, G, H]
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(num_kv_heads, -1)  # [K, G]
    out = jnp.zeros_like(q)
    out = _decode(q, k_pages, v_pages, meta, out, attend, sinks, sliding_window)
    if num_tokens > 1:
        # In ascending order: the rows that a block writes past its sequence's end are overwritten by their owners.
        out = _prefill(q, k_pages, v_pages, meta, out, attend, sinks, sliding_window, query_rows)
    return out[:num_tokens].reshape(num_tokens, num_heads, head_dim).astype(dtype), (k_pages, v_pages)


def _write(k, v, cache, meta, k_scale, v_scale):
    """Scatters the new keys and values into their pages; rows of the padding are dropped."""
    k_pages, v_pages = cache
    num_pages, _, page_size, _ = k_pages.shape
    rows = jnp.arange(k.shape[0], dtype=jnp.int32)
    num_slots = meta.kv_lens.shape[0]
    seq = jnp.minimum(jnp.sum(rows[:, None] >= meta.query_starts[None, 1:], axis=1), num_slots - 1)  # [T]
    position = meta.kv_lens[seq] - meta.query_starts[seq + 1] + rows
    page = meta.page_table[seq, jnp.clip(position // page_size, 0, meta.page_table.shape[1] - 1)]
    page = jnp.where(rows < meta.query_starts[meta.num_seqs], page, num_pages)
    offset = position % page_size
    if k_scale is not None:
        k = k / jnp.reshape(k_scale, (-1, 1))
    if v_scale is not None:
        v = v / jnp.reshape(v_scale, (-1, 1))

    def put(pages, new):  # [P, K, page, H] <- [T, K, H]
        return pages.at[page, :, offset].set(new.astype(pages.dtype), mode="drop", unique_indices=True)

    return put(k_pages, k), put(v_pages, v)


def _attend_block(carry, q, k, v, q_pos, k_pos, *, scale, sliding_window, soft_cap, k_scale, v_scale):
    """One step of the online softmax over a block of keys.

    Args:
      carry: running maximum [..., K, R], sum [..., K, R] and output [..., K, R, H].
      q: f32[..., K, R, H]; R query rows share a KV head.
      k: [..., K, C, H] keys as cached; v likewise.
      q_pos: i32[..., R or 1] positions of the rows; a negative position sees nothing.
      k_pos: i32[C] positions of the keys.
    """
    top, total, out = carry
    k = k.astype(jnp.float32)
    v = v.astype(jnp.float32)
    if k_scale is not None:
        k = k * jnp.reshape(k_scale, (-1, 1, 1))
    if v_scale is not None:
        v = v * jnp.reshape(v_scale, (-1, 1, 1))
    scores = jnp.einsum("...krh,...kch->...krc", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = k_pos <= q_pos[..., None]  # [..., R or 1, C]
    # Pages past the end of a sequence hold anything, NaN included, and 0 * NaN is NaN.
    v = jnp.where(seen.any(axis=-2)[..., None, :, None], v, 0.0)
    if sliding_window is not None:
        seen &= k_pos > q_pos[..., None] - sliding_window
    scores = jnp.where(seen[..., None, :, :], scores, MASKED)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.where(seen[..., None, :, :], jnp.exp(scores - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    total = total * shrink + weights.sum(axis=-1)
    return new_top, total, out * shrink[..., None] + jnp.einsum("...krc,...kch->...krh", weights, v)


def _start(shape, head_dim, sinks):
    """Carry before any key. A sink is a key with a logit and no value: it only adds to the sum."""
    if sinks is None:
        return jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim))
    return jnp.broadcast_to(sinks, shape), jnp.ones(shape), jnp.zeros((*shape, head_dim))


def _finish(carry):
    _, total, out = carry
    return out / jnp.maximum(total, 1e-30)[..., None]


def _pages_a_block(block: int, page_size: int, table_width: int) -> int:
    return min(max(block // page_size, 1), table_width)


def _gather(pages, ids):
    """[P, K, page, H] pages at ids [..., B] as keys [..., K, B * page, H]."""
    _, num_kv_heads, page_size, head_dim = pages.shape
    picked = pages.at[ids].get(mode="clip")  # [..., B, K, page, H]
    picked = jnp.moveaxis(picked, -3, -4)
    return picked.reshape(*ids.shape[:-1], num_kv_heads, ids.shape[-1] * page_size, head_dim)


def _decode(q, k_pages, v_pages, meta, out, attend, sinks, sliding_window):
    num_slots, table_width = meta.page_table.shape
    _, num_kv_heads, group_size, head_dim = q.shape
    page_size = k_pages.shape[2]
    group = min(GROUP, num_slots)
    block_pages = _pages_a_block(KEY_BLOCK, page_size, table_width)
    block = block_pages * page_size
    slots_padded = -(-num_slots // group) * group
    table_padded = -(-table_width // block_pages) * block_pages
    lens = jnp.where(jnp.arange(num_slots) < meta.num_decodes, meta.kv_lens, 0)
    lens = jnp.pad(lens, (0, slots_padded - num_slots))
    table = jnp.pad(meta.page_table, ((0, slots_padded - num_slots), (0, table_padded - table_width)))

    def one_group(i, out):
        first = i * group
        group_lens = lax.dynamic_slice(lens, (first,), (group,))
        group_q = lax.dynamic_slice_in_dim(q, first, group)  # [g, K, G, H]

        def one_block(j, carry):
            ids = lax.dynamic_slice(table, (first, j * block_pages), (group, block_pages))
            return attend(
                carry,
                group_q,
                _gather(k_pages, ids),
                _gather(v_pages, ids),
                group_lens[:, None] - 1,
                j * block + jnp.arange(block),
            )

        begin = 0
        if sliding_window is not None:
            shortest = jnp.min(jnp.where(group_lens > 0, group_lens, jnp.iinfo(jnp.int32).max))
            begin = jnp.maximum(shortest - sliding_window, 0) // block
        end = (jnp.max(group_lens) + block - 1) // block
        start = _start((group, num_kv_heads, group_size), head_dim, sinks)
        done = _finish(lax.fori_loop(begin, end, one_block, start))
        return lax.dynamic_update_slice_in_dim(out, done, first, axis=0)

    return lax.fori_loop(0, (meta.num_decodes + group - 1) // group, one_group, out)


def _prefill(q, k_pages, v_pages, meta, out, attend, sinks, sliding_window, rows):
    table_width = meta.page_table.shape[1]
    _, num_kv_heads, group_size, head_dim = q.shape
    page_size = k_pages.shape[2]
    block_pages = _pages_a_block(PREFILL_KEY_BLOCK, page_size, table_width)
    block = block_pages * page_size
    table = jnp.pad(meta.page_table, ((0, 0), (0, -table_width % block_pages)))

    def one_sequence(s, out):
        first, end_row, kv_len = meta.query_starts[s], meta.query_starts[s + 1], meta.kv_lens[s]
        row_ids = lax.dynamic_index_in_dim(table, s, keepdims=False)

        def one_query_block(i, out):
            begin_row = first + i * rows
            block_q = lax.dynamic_slice_in_dim(q, begin_row, rows)  # [R, K, G, H]
            block_q = block_q.transpose(1, 2, 0, 3).reshape(num_kv_heads, group_size * rows, head_dim)
            row = begin_row + jnp.arange(rows)
            position = jnp.where(row < end_row, kv_len - end_row + row, -1)
            q_pos = jnp.tile(position, group_size)  # [G * R]

            def one_block(j, carry):
                ids = lax.dynamic_slice(row_ids, (j * block_pages,), (block_pages,))
                keys, values = _gather(k_pages, ids), _gather(v_pages, ids)
                return attend(carry, block_q, keys, values, q_pos, j * block + jnp.arange(block))

            begin = 0
            if sliding_window is not None:
                begin = jnp.maximum(kv_len - end_row + begin_row - sliding_window + 1, 0) // block
            last = kv_len - end_row + jnp.minimum(begin_row + rows, end_row)  # keys seen by the last row
            block_sinks = None if sinks is None else jnp.repeat(sinks, rows, axis=1)
            start = _start((num_kv_heads, group_size * rows), head_dim, block_sinks)
            done = _finish(lax.fori_loop(begin, (last + block - 1) // block, one_block, start))
            done = done.reshape(num_kv_heads, group_size, rows, head_dim).transpose(2, 0, 1, 3)
            return lax.dynamic_update_slice_in_dim(out, done, begin_row, axis=0)

        return lax.fori_loop(0, (end_row - first + rows - 1) // rows, one_query_block, out)

    return lax.fori_loop(meta.num_decodes, meta.num_seqs, one_sequence, out)
