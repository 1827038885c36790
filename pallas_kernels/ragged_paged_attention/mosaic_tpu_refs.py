"""What the parts of the TPU kernel share: constants, references, and the scalars of a unit."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_tpu_plan import (
    CHUNK_ROWS,
    UNIT_FIELDS,
    Blocks,
    tokens_of_chunk,
)

WRITES = 4  # granules in flight, half of them being read and half being written
TABLES = 4  # rows of page ids in flight or in use


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel is compiled for.

    `width` is the lanes of a cached row; the keys' half is `query_width` wide, or shares it with the values where both
    fit in 128 lanes (then queries are zero in the values' lanes).
    """

    blocks: Blocks
    num_kv_heads: int
    group_size: int
    page_size: int
    granule: int
    table_rows: int
    query_width: int
    sliding_window: int | None
    soft_cap: float | None
    has_sinks: bool
    compute_dtype: str

    @property
    def block_len(self) -> int:
        """Tokens of a block of keys."""
        return self.blocks.pages * self.page_size

    @property
    def chunk_len(self) -> int:
        """Tokens of a chunk."""
        return tokens_of_chunk(self.group_size)

    @property
    def unit_len(self) -> int:
        """Tokens of a unit."""
        return self.blocks.chunks * self.chunk_len

    @property
    def unit_rows(self) -> int:
        """Rows of a unit of queries."""
        return self.blocks.chunks * CHUNK_ROWS


@dataclasses.dataclass(frozen=True)
class Refs:
    """References of the kernel, in the order in which `pallas_call` passes them.

    Attributes:
      counts, units, granules: as in `Plan`, in scalar memory.
      factors: f32[K] in scalar memory, what turns q.k into the score, or into tanh's argument with a soft cap.
      table: i32[S * R, 1, TABLE_ROW] in HBM.
      q: f32[T + unit_len, N, query_width] in HBM. Head rows of 32 bits can be gathered from it with a stride.
      new: f32[granule + T + granule, K, width] in HBM, values of the cache's dtype.
      cache_in: the cache, of which only `cache` is used: they are one buffer.
      tokens: i32[unit rows, 128], token of each row of a unit.
      sinks: f32[K, CHUNK_ROWS, 128], in base 2; v_scale: f32[K, 1, 128].
      out: like q.
      cache: [P, K, page, width] in HBM.
      table_buffer: i32[TABLES, 1, TABLE_ROW] in scalar memory.
      keys: [2, pages, K, page, width].
      query_tokens, result_tokens: f32[2, unit_len, N, query_width], in the order of q; queries: [K, unit rows,
        query_width], in chunks.
      top, total: f32[K, unit rows, 128], running maximum and sum; weighted: f32[K, unit rows, query_width].
      old_rows: [WRITES, K, granule, width]; new_rows: f32[WRITES, granule, K, width].
    """

    counts: jax.Ref
    units: jax.Ref
    granules: jax.Ref
    factors: jax.Ref
    table: jax.Ref
    q: jax.Ref
    new: jax.Ref
    cache_in: jax.Ref
    tokens: jax.Ref
    sinks: jax.Ref
    v_scale: jax.Ref
    out: jax.Ref
    cache: jax.Ref
    table_buffer: jax.Ref
    keys: jax.Ref
    query_tokens: jax.Ref
    result_tokens: jax.Ref
    queries: jax.Ref
    top: jax.Ref
    total: jax.Ref
    weighted: jax.Ref
    old_rows: jax.Ref
    new_rows: jax.Ref
    table_sem: jax.Ref
    keys_sem: jax.Ref
    queries_sem: jax.Ref
    results_sem: jax.Ref
    read_sem: jax.Ref
    write_sem: jax.Ref


@dataclasses.dataclass(frozen=True)
class Unit:
    """The scalars of a unit, and the range of its blocks of keys."""

    seq: jax.Array
    row: jax.Array
    num_chunks: jax.Array
    position: jax.Array
    end: jax.Array
    first_key: jax.Array
    first_block: jax.Array
    last_block: jax.Array


def record(ref, fields, index):
    """Reads record `index` of a table that is stored field by field."""
    length = ref.shape[0] // len(fields)
    return [ref[i * length + index] for i in range(len(fields))]


def unit_of(refs: Refs, static: Static, index) -> Unit:
    """Reads a unit's scalars."""
    # The cursors run past the last unit; what they read there is not used.
    length = refs.units.shape[0] // len(UNIT_FIELDS)
    seq, row, num_chunks, position, end = record(refs.units, UNIT_FIELDS, jnp.minimum(index, length - 1))
    window = static.sliding_window
    first_key = jnp.int32(0) if window is None else jnp.maximum(position - window + 1, 0)
    block_len = static.block_len
    return Unit(
        seq, row, num_chunks, position, end, first_key, lax.div(first_key, block_len), lax.div(end - 1, block_len)
    )


def words_of_rows(shape, dtype, first, end):
    """Masks with all bits of rows `first..end` set, for [rows, lanes] of `dtype` packed in words of 32 bits."""
    bits = 8 * jnp.dtype(dtype).itemsize
    packed = 32 // bits
    row = packed * lax.broadcasted_iota(jnp.int32, (shape[0] // packed, shape[1]), 0)
    masks = jnp.zeros(row.shape, jnp.int32)
    for part in range(packed):
        mask = -1 if packed == 1 else ((1 << bits) - 1) << (part * bits)
        mask = jnp.int32(mask - 2**32 if mask >= 2**31 else mask)
        masks |= jnp.where((row + part >= first) & (row + part < end), mask, 0)
    return masks
