"""The TPU kernel's first part: writes new keys and values into their pages."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_tpu_plan import GRANULE_FIELDS
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_tpu_refs import WRITES, Refs, Static, record, words_of_rows


def write_new(refs: Refs, static: Static) -> None:
    """Merges each granule's new rows with the old ones, and copies it back."""
    count = refs.counts[1]
    ahead = WRITES // 2

    def place(index):
        page, offset, _, _, _ = record(refs.granules, GRANULE_FIELDS, index)
        return refs.cache.at[page, :, pl.ds(pl.multiple_of(offset, static.granule), static.granule), :]

    def read_old(index):
        slot = lax.rem(index, WRITES)
        return pltpu.make_async_copy(place(index), refs.old_rows.at[slot], refs.read_sem.at[slot])

    def read_new(index, act):
        """One row for a decode, all rows otherwise: `act` starts the copy or waits for it."""
        slot = lax.rem(index, WRITES)
        _, _, first, end, row = record(refs.granules, GRANULE_FIELDS, index)
        row += static.granule

        def copy(source, target):
            act(pltpu.make_async_copy(refs.new.at[source], refs.new_rows.at[slot, target], refs.read_sem.at[slot]))

        is_single = end - first == 1
        pl.when(is_single)(lambda: copy(pl.ds(row + first, 1), pl.ds(first, 1)))
        pl.when(jnp.logical_not(is_single))(lambda: copy(pl.ds(row, static.granule), pl.ds(0, static.granule)))

    def write(index):
        slot = lax.rem(index, WRITES)
        return pltpu.make_async_copy(refs.old_rows.at[slot], place(index), refs.write_sem.at[slot])

    def start_reads(index):
        read_old(index).start()
        read_new(index, lambda copy: copy.start())

    for index in range(ahead):
        pl.when(index < count)(functools.partial(start_reads, index))

    def body(index, _):
        @pl.when(index + ahead < count)
        def _():
            pl.when(index >= WRITES - ahead)(lambda: write(index + ahead - WRITES).wait())
            start_reads(index + ahead)

        read_old(index).wait()
        read_new(index, lambda copy: copy.wait())
        slot = lax.rem(index, WRITES)
        _, _, first, end, _ = record(refs.granules, GRANULE_FIELDS, index)
        for head in range(static.num_kv_heads):
            _merge(refs.old_rows.at[slot, head], refs.new_rows[slot, :, head, :], first, end)
        write(index).start()

    lax.fori_loop(0, count, body, None)
    lax.fori_loop(jnp.maximum(count - WRITES, 0), count, lambda index, _: write(index).wait(), None)


def _merge(old, new, first, end) -> None:
    """Takes rows `first..end` of the reference `old` [rows, lanes] from `new`, as bits: they may hold anything."""
    masks = words_of_rows(old.shape, old.dtype, first, end)
    # Not for the values: libtpu 0.0.50 cannot convert what it has loaded row by row, but can select from it.
    row = lax.broadcasted_iota(jnp.int32, new.shape, 0)
    new = jnp.where((row >= first) & (row < end), new, 0.0)
    new = pltpu.bitcast(new.astype(old.dtype), jnp.int32)
    words = (pltpu.bitcast(old[...], jnp.int32) & ~masks) | (new & masks)
    old[...] = pltpu.bitcast(words, old.dtype)
