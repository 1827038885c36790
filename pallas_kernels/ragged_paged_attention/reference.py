"""Ragged paged attention in plain JAX: the CPU's path, and what the kernels are tested against.

The work is a flat list of (block of queries, block of keys), as long as the pages in use ask for and no longer; one
loop with a run-time bound goes through it. Softmax is computed online over the blocks of keys (Milakov and Gimelshein,
arXiv 1805.02867), in float32.

Decodes go one by one on CPU, in a loop kept so small that XLA's CPU backend compiles all of it into one function, with
no overhead an operation (see `_decode_group`). Where that is not possible, they go in groups of `GROUP` sequences, each
group as far as its longest member: one gather and two batched matmuls a block keep the overhead low. Longer chunks go
one block of queries at a time.

Everything that depends on the metadata alone is in the `Plan`, made once a step and not once a layer: XLA compiles each
layer's operations anew, and on CPU compiling is what a user waits for.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxengine.pallas_kernels.target import target_device

GROUP = 16  # decodes handled together, where not one by one
SMALL_STEP = 2**18  # multiplications for q.k up to which a step of the decode loop is small, see `_decode_group`
SMALL_HEADS = 8  # query heads of a KV head, up to which they are multiplied one by one
KEY_BLOCK = 64  # keys a step of the decode loop (measured on CPU, one by one: 64 beats 32 and 128)
QUERY_BLOCK = 64  # queries a step of the prefill loop
PREFILL_KEY_BLOCK = 128
MASKED = -1e30  # finite, so that a row with no valid key yields zeros instead of NaN


class Items(NamedTuple):
    """A list of work, of which the first `count` entries are real.

    Attributes:
      count: i32[].
      row: i32[I], first query row of the block.
      key_block: i32[I], which block of keys.
      is_first: bool[I], whether it is the query block's first block of keys.
      source: i32[I], the group of decodes or the sequence that the queries belong to.
    """

    count: jax.Array
    row: jax.Array
    key_block: jax.Array
    is_first: jax.Array
    source: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from the metadata alone, for one sliding window.

    Attributes:
      page, offset: i32[T], where each new token is written; page P (out of range) for padding.
      lens: i32[S+], lengths of the decodes, 0 for other slots; padded to whole groups.
      table: i32[S+, P+], the page table, padded to whole groups and blocks.
      decode_items, prefill_items: the work; no prefill items where all are decodes.
      group: decodes handled together.
      row_end, shift: i32[S+], end of each sequence's rows, and its length minus that: a row's position is row + shift.
    """

    page: jax.Array
    offset: jax.Array
    lens: jax.Array
    table: jax.Array
    row_end: jax.Array
    shift: jax.Array
    decode_items: Items
    prefill_items: Items | None
    group: int = dataclasses.field(metadata={"static": True})
    sliding_window: int | None = dataclasses.field(metadata={"static": True})


def check_support(spec) -> None:
    """Everything is supported."""


def stored_dtype(cache_dtype: str) -> str:
    """Returns what a cache of a dtype is an array of: float8_e4m3fn is bytes.

    XLA's CPU backend would widen the whole cache to write a row into it.
    """
    return "uint8" if cache_dtype == "float8_e4m3fn" else cache_dtype


def cache_shapes(spec, num_pages: int) -> tuple[tuple[int, ...], ...]:
    """Returns K and V, each [P, K, page, H]."""
    return ((num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim),) * 2


def make_plan(meta, *, num_tokens: int, num_heads: int, cache, sliding_window: int | None) -> Plan:
    """See `Plan`."""
    num_pages, num_kv_heads, page_size, head_dim = cache[0].shape
    num_slots, width = meta.page_table.shape
    decode_pages, prefill_pages = (_pages_a_block(b, page_size, width) for b in (KEY_BLOCK, PREFILL_KEY_BLOCK))
    group = _decode_group(num_heads, num_kv_heads, head_dim, decode_pages * page_size, num_slots)
    slots_pad = -num_slots % group
    lens = jnp.where(jnp.arange(num_slots) < meta.num_decodes, meta.kv_lens, 0)
    lens = jnp.pad(lens, (0, slots_pad))
    width_pad = max(-width % decode_pages, -width % prefill_pages)
    table = jnp.pad(meta.page_table, ((0, slots_pad), (0, width_pad)))

    page, offset = new_token_slots(meta, num_tokens, num_pages, page_size)
    row_end = jnp.pad(meta.query_starts[1:], (0, slots_pad))
    return Plan(
        page=page,
        offset=offset,
        lens=lens,
        table=table,
        row_end=row_end,
        shift=jnp.pad(meta.kv_lens, (0, slots_pad)) - row_end,
        decode_items=_decode_items(lens, group, decode_pages * page_size, width * page_size, sliding_window),
        prefill_items=None
        if num_tokens == 1 or meta.max_query_len == 1
        else _prefill_items(meta, num_tokens, prefill_pages * page_size, width * page_size, sliding_window),
        group=group,
        sliding_window=sliding_window,
    )


def _decode_group(num_heads: int, num_kv_heads: int, head_dim: int, block: int, num_slots: int) -> int:
    """How many decodes are handled together: one where that makes the loop over them small.

    XLA's CPU backend (jaxlib 0.12) compiles a loop that touches few bytes a step, and calls no library, into one
    function. It runs on one thread, but without overhead, its keys and values stay in the L2 cache, and nothing is read
    for the sake of a longer member of the group. Two such loops, each with half of the work, run one after the other
    whatever XLA's scheduler.
    """
    small = num_heads * head_dim * block <= SMALL_STEP and num_heads <= SMALL_HEADS * num_kv_heads
    return 1 if small and target_device().platform == "cpu" else min(GROUP, num_slots)


def new_token_slots(meta, num_tokens: int, num_pages: int, page_size: int):
    """Page and offset, i32[T] each, where each new token is written; page `num_pages` for rows of the padding."""
    num_slots, width = meta.page_table.shape
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(rows[:, None] >= meta.query_starts[None, 1:], axis=1), num_slots - 1)  # [T]
    position = meta.kv_lens[seq] - meta.query_starts[seq + 1] + rows
    page = meta.page_table[seq, jnp.clip(position // page_size, 0, width - 1)]
    return jnp.where(rows < meta.query_starts[meta.num_seqs], page, num_pages), position % page_size


def shift_plan(plan: Plan, offset) -> Plan:
    """The same work on pages `offset` further on."""
    return dataclasses.replace(plan, page=plan.page + offset, table=plan.table + offset)


def _pages_a_block(block: int, page_size: int, table_width: int) -> int:
    return min(max(block // page_size, 1), table_width)


def _list_items(begin, end, row, source, longest: int) -> Items:
    """Lists blocks `begin[u]..end[u]` of every unit u, the units one after the other."""
    num_units = begin.shape[0]
    counts = jnp.maximum(end - begin, 0)
    ends = jnp.cumsum(counts)
    item = jnp.arange(num_units * longest, dtype=jnp.int32)
    unit = jnp.minimum(jnp.searchsorted(ends, item, side="right"), num_units - 1)
    nth = item - (ends[unit] - counts[unit])
    return Items(ends[-1], row[unit], begin[unit] + nth, nth == 0, source[unit])


def _decode_items(lens, group: int, block: int, longest: int, sliding_window: int | None) -> Items:
    lens = lens.reshape(-1, group)
    begin = jnp.zeros(lens.shape[0], jnp.int32)
    if sliding_window is not None:
        shortest = jnp.min(jnp.where(lens > 0, lens, jnp.iinfo(jnp.int32).max), axis=1)
        begin = jnp.maximum(shortest - sliding_window, 0) // block
    end = -(-jnp.max(lens, axis=1) // block)
    groups = jnp.arange(lens.shape[0], dtype=jnp.int32)
    return _list_items(begin, end, groups * group, groups, -(-longest // block))


def _prefill_items(meta, num_tokens: int, block: int, longest: int, sliding_window: int | None) -> Items:
    """Query blocks of all sequences but the decodes, in ascending order of rows."""
    num_slots = meta.kv_lens.shape[0]
    rows = min(QUERY_BLOCK, num_tokens)
    slots = jnp.arange(num_slots)
    lengths = jnp.diff(meta.query_starts)
    num_blocks = jnp.where((slots >= meta.num_decodes) & (slots < meta.num_seqs), -(-lengths // rows), 0)
    ends = jnp.cumsum(num_blocks)
    units = jnp.arange(min(num_tokens, num_tokens // rows + num_slots), dtype=jnp.int32)  # query blocks at most
    seq = jnp.minimum(jnp.searchsorted(ends, units, side="right"), num_slots - 1)
    first_row = meta.query_starts[seq] + (units - (ends[seq] - num_blocks[seq])) * rows
    row_end = meta.query_starts[seq + 1]
    shift = meta.kv_lens[seq] - row_end
    begin = jnp.zeros_like(first_row)
    if sliding_window is not None:
        begin = jnp.maximum(shift + first_row - sliding_window + 1, 0) // block
    end = -(-(shift + jnp.minimum(first_row + rows, row_end)) // block)  # as far as the block's last row sees
    end = jnp.where(units < ends[-1], end, begin)
    return _list_items(begin, end, first_row, seq, -(-longest // block))


def ragged_paged_attention(q, k, v, cache, meta, *, scale, sliding_window, soft_cap, sinks, k_scale, v_scale):
    """See `api.ragged_paged_attention`."""
    check_cache(k, cache)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    plan = meta.plan
    if plan is None:
        plan = make_plan(meta, num_tokens=num_tokens, num_heads=num_heads, cache=cache, sliding_window=sliding_window)
    if plan.sliding_window != sliding_window:
        raise ValueError(f"sliding_window={sliding_window}, but meta was planned for {plan.sliding_window}")
    k_pages, v_pages = write(k, v, cache, plan.page, plan.offset, k_scale, v_scale)
    attend = functools.partial(
        _attend_block, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale
    )
    # Blocks of rows are sliced at run-time offsets; the padding keeps the last block from being shifted back.
    rows = min(QUERY_BLOCK, num_tokens)
    padded = jnp.pad(q.astype(jnp.float32), ((0, max(rows, plan.group)), (0, 0), (0, 0)))
    padded = padded.reshape(-1, num_kv_heads, num_heads // num_kv_heads, head_dim)  # [T+, K, G, H]
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(num_kv_heads, -1)  # [K, G]
    out = _decode(padded, k_pages, v_pages, plan, attend, sinks)
    if plan.prefill_items is not None:
        # In ascending order: the rows that a block writes past its sequence's end are overwritten by their owners.
        out = _prefill(padded, k_pages, v_pages, plan, rows, out, attend, sinks)
    return out[:num_tokens].reshape(q.shape).astype(q.dtype), (k_pages, v_pages)


def check_cache(k, cache) -> None:
    """Raises ValueError unless the cache is K and V pages [P, K, page, H] that fit k[T, K, H]."""
    shapes = [c.shape for c in cache]
    if len(shapes) != 2 or shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][1::2] != k.shape[1:]:
        raise ValueError(f"cache {shapes} does not fit k{k.shape}: expected K and V as [P, K, page, H]")


def write(k, v, cache, page, offset, k_scale, v_scale):
    """Scatters new keys and values [T, K, H] into slots of pages; those with a page out of range are dropped."""

    def put(pages, new, scale):  # [P, K, page, H] <- [T, K, H]
        new = to_cache_dtype(new, scale, pages.dtype)
        return pages.at[page, :, offset].set(new, mode="drop", unique_indices=True)

    return put(cache[0], k, k_scale), put(cache[1], v, v_scale)


def to_cache_dtype(new, scale, dtype):
    """Keys or values [T, K, H], divided by a scale for each head or for all, as the cache holds them.

    What a narrow dtype cannot hold becomes its largest value: float8_e4m3fn has no infinity, and would make it NaN.
    """
    if dtype == jnp.uint8:
        return lax.bitcast_convert_type(to_cache_dtype(new, scale, jnp.float8_e4m3fn), jnp.uint8)
    if scale is not None:
        new = new / jnp.reshape(scale, (-1, 1))
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        new = jnp.clip(jnp.round(new.astype(jnp.float32)), limits.min, limits.max)
    elif jnp.dtype(dtype).itemsize == 1:
        limits = jnp.finfo(dtype)
        new = jnp.clip(new.astype(jnp.float32), float(limits.min), float(limits.max))
    return new.astype(dtype)


def _to_float32(cached):
    """Keys or values as cached, in float32; bytes are those of float8_e4m3fn."""
    if cached.dtype != jnp.uint8:
        return cached.astype(jnp.float32)
    # Sign, exponent and mantissa in the places of a float16, whose exponent counts from 8 below.
    bits = cached.astype(jnp.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 256


def _multiply(equation: str, rows, block, by_row: bool):
    """Returns the einsum of rows[..., R, X] and a block of keys or values.

    `by_row` makes R products of a vector and a matrix.

    XLA's CPU backend emits those inline, where it calls a library for a product of matrices. Selects put the rows
    together, since it emits a concatenation through pointers, element by element.
    """
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # GPUs would round float32 to TF32
    if not by_row:
        return einsum(equation, rows, block)
    equation = equation.replace("r", "")
    index = jnp.arange(rows.shape[-2])[:, None]
    out = jnp.zeros(())
    for r in range(rows.shape[-2]):
        product = einsum(equation, rows[..., r, :], block)
        out = jnp.where(index == r, product[..., None, :], out)
    return out


def _attend_block(
    carry, q, k, v, q_pos, k_pos, *, scale, sliding_window, soft_cap, k_scale, v_scale, by_row: bool = False
):
    """One step of the online softmax over a block of keys.

    Args:
      carry: running maximum [..., K, R], sum [..., K, R] and output [..., K, R, H].
      q: f32[..., K, R, H]; R query rows share a KV head.
      k: [..., K, C, H] keys as cached; v likewise.
      q_pos: i32[..., R or 1] positions of the rows; a negative position sees nothing.
      k_pos: i32[C] positions of the keys.
      by_row: see `_multiply`.
    """
    top, total, out = carry
    k, v = _to_float32(k), _to_float32(v)
    if k_scale is not None:
        k = k * jnp.reshape(k_scale, (-1, 1, 1))
    if v_scale is not None:
        v = v * jnp.reshape(v_scale, (-1, 1, 1))
    scores = _multiply("...krh,...kch->...krc", q, k, by_row) * scale
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
    return new_top, total, out * shrink[..., None] + _multiply("...krc,...kch->...krh", weights, v, by_row)


def _start(shape, head_dim, sinks):
    """Carry before any key. A sink is a key with a logit and no value: it only adds to the sum."""
    if sinks is None:
        return jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim))
    return jnp.broadcast_to(sinks, shape), jnp.ones(shape), jnp.zeros((*shape, head_dim))


def _run(items: Items, start, step, out, finish):
    """Goes through a list of work, one online softmax for each query block.

    Every step writes its block's result so far; the block's last step is the one that stays.
    """

    def body(i, state):
        out, carry = state
        carry = jax.tree.map(lambda new, old: jnp.where(items.is_first[i], new, old), start, carry)
        carry = step(i, carry)
        _, total, weighted = carry
        done = finish(weighted / jnp.maximum(total, 1e-30)[..., None])
        return lax.dynamic_update_slice_in_dim(out, done, items.row[i], axis=0), carry

    return lax.fori_loop(0, items.count, body, (out, start))[0]


def _gather(pages, ids):
    """[P, K, page, H] pages at ids [..., B] as keys [..., K, B * page, H]."""
    _, num_kv_heads, page_size, head_dim = pages.shape
    picked = pages.at[ids].get(mode="clip")  # [..., B, K, page, H]
    picked = jnp.moveaxis(picked, -3, -4)
    return picked.reshape(*ids.shape[:-1], num_kv_heads, ids.shape[-1] * page_size, head_dim)


def _decode(q, k_pages, v_pages, plan: Plan, attend, sinks):
    _, num_kv_heads, group_size, head_dim = q.shape
    page_size = k_pages.shape[2]
    items, group, num_pages = plan.decode_items, plan.group, _pages_a_block(KEY_BLOCK, page_size, plan.table.shape[1])
    keys = jnp.arange(num_pages * page_size, dtype=jnp.int32)

    def step(i, carry):
        first = items.row[i]
        ids = lax.dynamic_slice(plan.table, (first, items.key_block[i] * num_pages), (group, num_pages))
        q_pos = lax.dynamic_slice(plan.lens, (first,), (group,))[:, None] - 1
        block_q = lax.dynamic_slice_in_dim(q, first, group)  # [g, K, G, H]
        k_pos = items.key_block[i] * keys.size + keys
        keys_values = _gather(k_pages, ids), _gather(v_pages, ids)
        return attend(carry, block_q, *keys_values, q_pos, k_pos, by_row=group == 1 and group_size <= SMALL_HEADS)

    start = _start((group, num_kv_heads, group_size), head_dim, sinks)
    return _run(items, start, step, jnp.zeros_like(q), lambda done: done)


def _prefill(q, k_pages, v_pages, plan: Plan, rows: int, out, attend, sinks):
    _, num_kv_heads, group_size, head_dim = q.shape
    page_size = k_pages.shape[2]
    items, num_pages = plan.prefill_items, _pages_a_block(PREFILL_KEY_BLOCK, page_size, plan.table.shape[1])
    assert items is not None
    keys = jnp.arange(num_pages * page_size, dtype=jnp.int32)

    def step(i, carry):
        first, seq = items.row[i], items.source[i]
        ids = lax.dynamic_slice(plan.table, (seq, items.key_block[i] * num_pages), (1, num_pages))[0]
        row = first + jnp.arange(rows)
        q_pos = jnp.tile(jnp.where(row < plan.row_end[seq], row + plan.shift[seq], -1), group_size)  # [G * R]
        block_q = lax.dynamic_slice_in_dim(q, first, rows)  # [R, K, G, H]
        block_q = block_q.transpose(1, 2, 0, 3).reshape(num_kv_heads, group_size * rows, head_dim)
        k_pos = items.key_block[i] * keys.size + keys
        return attend(carry, block_q, _gather(k_pages, ids), _gather(v_pages, ids), q_pos, k_pos)

    def finish(done):  # [K, G * R, H] -> [R, K, G, H]
        return done.reshape(num_kv_heads, group_size, rows, head_dim).transpose(2, 0, 1, 3)

    block_sinks = None if sinks is None else jnp.repeat(sinks, rows, axis=1)
    start = _start((num_kv_heads, group_size * rows), head_dim, block_sinks)
    return _run(items, start, step, out, finish)
