"""What the TPU kernel works through: units of queries, and granules of new keys.

- A *chunk* is a tile of `CHUNK_ROWS` rows of queries of one KV head: all G = N / K heads of its group, for as many
  tokens of one sequence as fit; row `g * tokens + t` is head g of token t. A *unit* is up to `Blocks.chunks`
  consecutive chunks of one sequence, which share one pass over its keys: a decode is a unit of one chunk, also if it
  has several query tokens.
- A *granule* is `granule` consecutive slots of one page of which at least one is new. A TPU copies and stores tiles of
  8 to 32 rows, so a new row is merged into the granule around it.
"""

import dataclasses

import jax
import jax.numpy as jnp

CHUNK_ROWS = 16  # a tile of bfloat16
TABLE_ROW = 128  # page ids that are fetched together: one row of lanes
UNIT_FIELDS = ("seq", "row", "num_chunks", "position", "end")
GRANULE_FIELDS = ("page", "offset", "first", "end", "row")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes that the kernel is compiled for.

    Attributes:
      pages: pages of a block of keys; divides `TABLE_ROW`.
      chunks: most chunks of a unit.
      rows: query rows of one matmul where a unit has more than one chunk; divides `chunks * CHUNK_ROWS`.
      heads: KV heads that are computed side by side where a unit has one chunk; divides K.
    """

    pages: int
    chunks: int
    rows: int
    heads: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from the metadata alone. U units, A granules; only the first ones of each are real.

    Attributes:
      counts: i32[2], units and granules.
      units: i32[5 * U], `UNIT_FIELDS` one after the other: sequence, row of its first token in q, chunks, position of
        the first token, and the position after its last one. In ascending order of rows.
      granules: i32[5 * A], `GRANULE_FIELDS`: page, first slot in the page, range of its rows that are new, and the row
        of k that belongs to its first row (negative where that is an old one).
      table: i32[S * R, 1, TABLE_ROW], each sequence's page ids in R rows.
      num_rows: i32[], rows of q that are not padding.
    """

    counts: jax.Array
    units: jax.Array
    granules: jax.Array
    table: jax.Array
    num_rows: jax.Array


def tokens_of_chunk(group_size: int) -> int:
    """Query tokens whose G rows each fit a chunk."""
    return max(CHUNK_ROWS // group_size, 1)


def granule_of(page_size: int, cache_dtype) -> int:
    """Slots that are written together: a tile of the cache's dtype, where pages are that large."""
    packed = 4 // jnp.dtype(cache_dtype).itemsize
    return 8 * packed if page_size % (8 * packed) == 0 else 16


def plan_step(meta, *, num_tokens: int, group_size: int, num_pages: int, page_size: int, granule: int, chunks: int):
    """Makes the `Plan` of a step.

    Args:
      meta: lengths and pages of S sequences.
      num_tokens: T.
      group_size: G.
      num_pages: P of the cache; page ids are clamped to it.
      page_size: tokens of a page.
      granule: see `granule_of`.
      chunks: as in `Blocks`.
    """
    num_slots, width = meta.page_table.shape
    starts = meta.query_starts[:-1]
    is_used = jnp.arange(num_slots) < meta.num_seqs
    num_new = jnp.where(is_used, meta.query_starts[1:] - starts, 0)
    old_len = meta.kv_lens - num_new
    per_chunk = tokens_of_chunk(group_size)
    table = jnp.clip(meta.page_table, 0, num_pages - 1)

    unit_len = chunks * per_chunk
    unit_seq, nth, num_units = _members(
        _ceil_div(num_new, unit_len), min(num_tokens, num_slots + num_tokens // unit_len)
    )
    position = old_len[unit_seq] + nth * unit_len
    end = jnp.minimum(position + unit_len, meta.kv_lens[unit_seq])
    units = (unit_seq, starts[unit_seq] + nth * unit_len, _ceil_div(end - position, per_chunk), position, end)

    first = old_len // granule
    seq_granules = jnp.where(num_new > 0, (meta.kv_lens - 1) // granule - first + 1, 0)
    max_granules = min(num_tokens, 2 * num_slots + num_tokens // granule)
    new_seq, new_nth, num_granules = _members(seq_granules, max_granules)
    slot = (first[new_seq] + new_nth) * granule
    shift = slot - old_len[new_seq]  # of the granule's first slot, from the first new token
    granules = (
        table[new_seq, jnp.clip(slot // page_size, 0, width - 1)],
        slot % page_size,
        jnp.maximum(-shift, 0),
        jnp.minimum(num_new[new_seq] - shift, granule),
        starts[new_seq] + shift,
    )

    table = jnp.pad(table, ((0, 0), (0, -width % TABLE_ROW)))
    return Plan(
        counts=jnp.stack([num_units, num_granules]).astype(jnp.int32),
        units=jnp.concatenate(units).astype(jnp.int32),
        granules=jnp.concatenate(granules).astype(jnp.int32),
        table=table.reshape(-1, 1, TABLE_ROW),
        num_rows=meta.query_starts[meta.num_seqs],
    )


def shift_plan(plan: Plan, offset) -> Plan:
    """The same work on pages `offset` further on."""
    num_granules = plan.granules.shape[0] // len(GRANULE_FIELDS)
    granules = plan.granules.at[:num_granules].add(offset)
    return dataclasses.replace(plan, granules=granules, table=plan.table + offset)


def _ceil_div(a, b: int):
    return (a + b - 1) // b


def _members(counts, size: int):
    """Lists the members of units that have `counts` each: their unit and number in it, and how many there are."""
    ends = jnp.cumsum(counts)
    member = jnp.arange(size, dtype=jnp.int32)
    unit = jnp.sum(member[:, None] >= ends[None, :], axis=1)
    unit = jnp.minimum(unit, counts.shape[0] - 1)
    return unit, member - (ends - counts)[unit], ends[-1]
