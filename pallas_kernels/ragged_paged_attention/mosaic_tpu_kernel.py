"""The TPU kernel: one grid step that writes all new keys and values, then walks through all units of queries.

Both parts are pipelines of asynchronous copies. The second one is a single loop over (unit, block of keys): the next
block is under way while this one is computed, also where it is another sequence's (as in RPA v3, arXiv 2604.15464). The
page ids of a block are themselves fetched, two blocks ahead: a whole page table need not fit the 1 MB of scalar memory.
Softmax is computed online over the blocks (Milakov and Gimelshein, arXiv 1805.02867), in float32.

Rows of a page that nobody has written may hold anything, NaN included, and a masked weight of zero would let it
through. The key buffer therefore starts as zeros and the last page of a unit is cleared behind its end once it has
arrived: what the buffer holds is always finite.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_tpu_plan import CHUNK_ROWS, TABLE_ROW
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_tpu_refs import (
    TABLES,
    Refs,
    Static,
    Unit,
    unit_of,
    words_of_rows,
)
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_tpu_write import write_new

MASKED = -1e30  # finite, so that a row that has seen no key yet stays free of NaN
LOG2_E = math.log2(math.e)  # scores are logits in base 2: a TPU has no other exponential


def kernel(*refs, static: Static) -> None:
    """Writes the new keys, then attends. `refs` are those of `Refs`."""
    named = Refs(*refs)
    named.keys[...] = jnp.zeros(named.keys.shape, named.keys.dtype)
    write_new(named, static)
    attend_all(named, static)


def attend_all(refs: Refs, static: Static) -> None:
    """Attends for all units, block after block, while the next blocks are on their way."""
    num_units = refs.counts[0]

    def next_block(cursor):
        """The block after this one: the unit's next, or the next unit's first."""
        unit_id, block = cursor
        is_last = block >= unit_of(refs, static, unit_id).last_block
        following = unit_of(refs, static, unit_id + 1).first_block
        return jnp.where(is_last, unit_id + 1, unit_id), jnp.where(is_last, following, block + 1)

    def table_copy(cursor, index):
        unit_id, block = cursor
        row = lax.div(block * static.blocks.pages, TABLE_ROW)
        source = refs.table.at[unit_of(refs, static, unit_id).seq * static.table_rows + row]
        slot = lax.rem(index, TABLES)
        return pltpu.make_async_copy(source, refs.table_buffer.at[slot], refs.table_sem.at[slot])

    def start_table(cursor, index):
        pl.when(cursor[0] < num_units)(lambda: table_copy(cursor, index).start())

    def start_block(cursor, index):
        unit_id, block = cursor

        @pl.when(unit_id < num_units)
        def _():
            unit = unit_of(refs, static, unit_id)
            table_copy(cursor, index).wait()
            _start_pages(refs, static, unit, block, index)

            @pl.when(block == unit.first_block)
            def _():
                _query_copy(refs, static, unit, unit_id, lambda copy: copy.start())

    def count_blocks(unit_id, total):
        unit = unit_of(refs, static, unit_id)
        return total + unit.last_block - unit.first_block + 1

    num_blocks = lax.fori_loop(0, num_units, count_blocks, jnp.int32(0))
    first = (jnp.int32(0), unit_of(refs, static, 0).first_block)
    second = next_block(first)
    start_table(first, 0)
    start_table(second, 1)
    start_block(first, 0)

    def body(index, cursors):
        cursor, following = cursors
        after = next_block(following)
        start_table(after, index + 2)
        start_block(following, index + 1)
        _attend_block(refs, static, cursor, index)
        return following, after

    lax.fori_loop(0, num_blocks, body, (first, second))

    @pl.when(num_units > 0)
    def _():
        last = num_units - 1
        _result_copy(refs, static, unit_of(refs, static, last), last, lambda copy: copy.wait())


def _for_chunks(unit: Unit, act) -> None:
    lax.fori_loop(0, unit.num_chunks, lambda n, _: act(n), None)


def _rows(chunk):
    return pl.ds(pl.multiple_of(chunk * CHUNK_ROWS, CHUNK_ROWS), CHUNK_ROWS)


def _for_size(static: Static, unit: Unit, act) -> None:
    """Calls `act` with a constant number of tokens that holds the unit's: what is too much is never used."""
    if static.blocks.chunks == 1:
        act(static.unit_len)
    else:
        pl.when(unit.num_chunks == 1)(lambda: act(static.chunk_len))
        pl.when(unit.num_chunks > 1)(lambda: act(static.unit_len))


def _query_copy(refs: Refs, static: Static, unit: Unit, unit_id, act) -> None:
    slot = lax.rem(unit_id, 2)

    def one(size: int):
        target = refs.query_tokens.at[slot, pl.ds(0, size)]
        act(pltpu.make_async_copy(refs.q.at[pl.ds(unit.row, size)], target, refs.queries_sem.at[slot]))

    _for_size(static, unit, one)


def _result_copy(refs: Refs, static: Static, unit: Unit, unit_id, act) -> None:
    slot = lax.rem(unit_id, 2)

    def one(size: int):
        source = refs.result_tokens.at[slot, pl.ds(0, size)]
        act(pltpu.make_async_copy(source, refs.out.at[pl.ds(unit.row, size)], refs.results_sem.at[slot]))

    _for_size(static, unit, one)


def _needed_pages(static: Static, unit: Unit, block):
    """First and last page of a block that the unit needs."""
    first = jnp.maximum(lax.div(unit.first_key, static.page_size) - block * static.blocks.pages, 0)
    last = lax.div(jnp.minimum(unit.end - block * static.block_len, static.block_len) - 1, static.page_size)
    return first, last


def _start_pages(refs: Refs, static: Static, unit: Unit, block, index) -> None:
    slot, table_slot = lax.rem(index, 2), lax.rem(index, TABLES)
    in_row = lax.rem(block * static.blocks.pages, TABLE_ROW)
    first, last = _needed_pages(static, unit, block)

    def start(i, _):
        page = refs.table_buffer[table_slot, 0, in_row + i]
        pltpu.make_async_copy(refs.cache.at[page], refs.keys.at[slot, i], refs.keys_sem.at[slot]).start()

    is_whole = last - first + 1 == static.blocks.pages

    @pl.when(is_whole)  # unrolled: with small pages the scalar unit would be what takes longest
    def _():
        for i in range(static.blocks.pages):
            start(i, None)

    pl.when(jnp.logical_not(is_whole))(lambda: lax.fori_loop(first, last + 1, start, None))


def _wait_for_pages(refs: Refs, static: Static, unit: Unit, block, index) -> None:
    slot = lax.rem(index, 2)
    first, last = _needed_pages(static, unit, block)

    def wait(target):  # a wait counts bytes: any source of the target's size will do
        pltpu.make_async_copy(target, target, refs.keys_sem.at[slot]).wait()

    is_whole = last - first + 1 == static.blocks.pages
    pl.when(is_whole)(lambda: wait(refs.keys.at[slot]))

    @pl.when(jnp.logical_not(is_whole))
    def _():
        lax.fori_loop(first, last + 1, lambda i, _: wait(refs.keys.at[slot, i]), None)


def _attend_block(refs: Refs, static: Static, cursor, index) -> None:
    unit_id, block = cursor
    unit = unit_of(refs, static, unit_id)
    slot = lax.rem(unit_id, 2)
    _wait_for_pages(refs, static, unit, block, index)

    @pl.when(block == unit.first_block)
    def _():
        _query_copy(refs, static, unit, unit_id, lambda copy: copy.wait())
        _for_chunks(unit, lambda n: _start_chunk(refs, static, slot, n))

    @pl.when(block == unit.last_block)
    def _():
        _clear_behind(refs, static, unit.end - block * static.block_len, lax.rem(index, 2))

    step = functools.partial(_attend_heads, refs, static, unit, block, index)
    if static.blocks.chunks == 1:
        _attend_few_rows(static, step)
    else:
        pl.when(unit.num_chunks == 1)(lambda: _attend_few_rows(static, step))
        pl.when(unit.num_chunks > 1)(lambda: _attend_many_rows(static, unit, block, step))

    @pl.when(block == unit.last_block)
    def _():
        _for_chunks(unit, lambda n: _finish_chunk(refs, static, slot, n))

        # One after the other: a unit's surplus rows are the next unit's, which overwrites them.
        @pl.when(unit_id >= 1)
        def _():
            previous = unit_of(refs, static, unit_id - 1)
            _result_copy(refs, static, previous, unit_id - 1, lambda copy: copy.wait())

        _result_copy(refs, static, unit, unit_id, lambda copy: copy.start())


def _attend_few_rows(static: Static, step) -> None:
    heads = static.blocks.heads

    def group(i, _):
        step(True, [i * heads + j for j in range(heads)], jnp.int32(0), CHUNK_ROWS)

    lax.fori_loop(0, static.num_kv_heads // heads, group, None)


def _attend_many_rows(static: Static, unit: Unit, block, step) -> None:
    num_rows = static.blocks.rows
    num_steps = lax.div(unit.num_chunks * CHUNK_ROWS + num_rows - 1, num_rows)
    # A block that all of the unit's queries see needs no mask. (With few rows the mask costs nothing.)
    is_masked = block * static.block_len + static.block_len - 1 > unit.position
    if static.sliding_window is not None:
        is_masked |= block * static.block_len <= unit.end - 1 - static.sliding_window

    def all_rows(masked: bool):
        def one(i, _):
            step(masked, [lax.div(i, num_steps)], lax.rem(i, num_steps) * num_rows, num_rows)

        lax.fori_loop(0, static.num_kv_heads * num_steps, one, None)

    pl.when(is_masked)(lambda: all_rows(True))
    pl.when(jnp.logical_not(is_masked))(lambda: all_rows(False))


def _start_chunk(refs: Refs, static: Static, slot, n) -> None:
    """Arranges the queries of a chunk, and sets the state before any key.

    A sink is a key with a logit and no value: it only adds to the sum.
    """
    rows, tokens = _rows(n), pl.ds(n * static.chunk_len, static.chunk_len)
    width, group_size = static.query_width, static.group_size
    surplus = CHUNK_ROWS - static.chunk_len * group_size
    for head in range(static.num_kv_heads):
        parts = [refs.query_tokens[slot, tokens, head * group_size + g, :] for g in range(group_size)]
        if surplus:
            parts.append(jnp.zeros((surplus, width), jnp.float32))
        refs.queries[head, rows, :] = jnp.concatenate(parts).astype(refs.queries.dtype)
    shape = (static.num_kv_heads, CHUNK_ROWS, 128)
    refs.top[:, rows, :] = refs.sinks[...] if static.has_sinks else jnp.full(shape, MASKED, jnp.float32)
    refs.total[:, rows, :] = jnp.full(shape, float(static.has_sinks), jnp.float32)
    refs.weighted[:, rows, :] = jnp.zeros((*shape[:2], width), jnp.float32)


def _finish_chunk(refs: Refs, static: Static, slot, n) -> None:
    """Divides by the sum, and puts the rows back into the order of the tokens."""
    rows, chunk_len, group_size = _rows(n), static.chunk_len, static.group_size
    tokens = pl.ds(n * chunk_len, chunk_len)
    for head in range(static.num_kv_heads):
        factor = refs.v_scale[head] / jnp.maximum(refs.total[head, rows, :], 1e-30)
        result = refs.weighted[head, rows, :] * factor[:, :1]
        for g in range(group_size):
            part = result[g * chunk_len : (g + 1) * chunk_len]
            refs.result_tokens[slot, tokens, head * group_size + g, :] = part


def _clear_behind(refs: Refs, static: Static, end, slot) -> None:
    """Clears the rows of the page of `end` (in the block) that are behind it; none where it is at a page's end."""
    page = lax.div(end, static.page_size)

    @pl.when(lax.rem(end, static.page_size) != 0)
    def _():
        for head in range(static.num_kv_heads):
            rows = refs.keys.at[slot, page, head]
            masks = words_of_rows(rows.shape, rows.dtype, 0, lax.rem(end, static.page_size))
            rows[...] = pltpu.bitcast(pltpu.bitcast(rows[...], jnp.int32) & masks, rows.dtype)


def _attend_heads(refs: Refs, static: Static, unit: Unit, block, index, masked: bool, heads, row, num_rows: int):
    """One step of the online softmax of `num_rows` query rows from `row` on, for each of `heads`.

    All heads are loaded first and stored last: the compiler keeps the order of loads and stores, and would otherwise
    not fill one head's latencies with another head's work.
    """
    rows = pl.ds(pl.multiple_of(row, CHUNK_ROWS), num_rows)
    scored, state = [], []
    for head in heads:
        keys, values = _keys_and_values(refs, static, head, lax.rem(index, 2))
        scores = _dot(refs.queries[head, rows, :], keys, 1) * refs.factors[head]
        if static.soft_cap is not None:
            scores = (static.soft_cap * LOG2_E) * jnp.tanh(scores)
        if masked:
            first_key = block * static.block_len
            scores = _mask(static, scores, unit.position - first_key + refs.tokens[rows, :1])
        scored.append((scores, values))
        state.append((refs.top[head, rows, :], refs.total[head, rows, :], refs.weighted[head, rows, :]))
    for head, old, (scores, values) in zip(heads, state, scored, strict=True):
        top, total, weighted = _softmax_step(static, old, scores, values)
        refs.top[head, rows, :] = top
        refs.total[head, rows, :] = total
        refs.weighted[head, rows, :] = weighted


def _keys_and_values(refs: Refs, static: Static, head, slot):
    """Both [block, query_width]; where they share their lanes they are the same array."""
    cached = refs.keys[slot, :, head].astype(static.compute_dtype)  # [pages, page, width]
    cached = cached.reshape(static.block_len, cached.shape[-1])
    return cached[:, : static.query_width], cached[:, cached.shape[-1] - static.query_width :]


def _mask(static: Static, scores, position):
    """Masks scores [rows, keys] of queries at position [rows, 1], counted from the first key."""
    key = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    is_seen = key <= position
    if static.sliding_window is not None:
        is_seen &= key > position - static.sliding_window
    return jnp.where(is_seen, scores, MASKED)


def _softmax_step(static: Static, state, scores, values):
    """Adds a block of keys to the running maximum and sum [rows, 128] and output [rows, query_width]."""
    old_top, total, weighted = state
    # A row that sees none of its first blocks' keys sums up junk, which the first key seen shrinks to exactly 0.
    top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - top[:, :1])
    shrink = jnp.exp2(old_top - top)
    total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
    return top, total, weighted * shrink[:, :1] + _dot(weights.astype(static.compute_dtype), values, 0)


def _dot(a, b, b_axis: int):
    """a[rows, X] with axis `b_axis` of b, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
