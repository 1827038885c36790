"""Ragged paged attention on NVIDIA Hopper, in Pallas Mosaic GPU.

Three steps a call: new keys and values go to their pages; sequences whose new tokens fit one tile of 64 rows (decodes,
speculation, short tails of prompts) go to `mosaic_gpu_decode`, the others to `mosaic_gpu_prefill`. What follows from
lengths alone is in the `Plan`, made once a step.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu_common as common
from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu_decode as decode
from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu_prefill as prefill
from jaxengine.pallas_kernels.ragged_paged_attention import reference
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_gpu_write import write

# Fewer blocks than this are not worth a run of their own: merging costs about as much as reading two.
MIN_BLOCKS_A_RUN = 2

# The write copies a token's keys from shared memory at such multiples.
ROW_BYTES = 128

# Set by tests: Mosaic GPU's interpreter knows no product whose left side is in registers.
OPERANDS_IN_SMEM = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from the metadata alone, for one sliding window.

    Attributes:
      page, offset: i32[T], where each new token is written; page P (out of range) for padding.
      table: i32[S, P], the page table.
      decode_seqs, decode_runs: see the columns in `mosaic_gpu_decode`.
      prefill_items, num_prefill_items: see the columns in `mosaic_gpu_prefill`.
    """

    page: jax.Array
    offset: jax.Array
    table: jax.Array
    decode_seqs: jax.Array
    decode_runs: jax.Array
    prefill_items: jax.Array
    num_prefill_items: jax.Array
    sliding_window: int | None = dataclasses.field(metadata={"static": True})


def check_support(spec) -> None:
    """Raises NotImplementedError for what the kernels do not do."""
    if spec.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"queries in {spec.dtype}; supported: bfloat16, float16")
    if spec.cache_dtype not in (spec.dtype, "float8_e4m3fn", "int8"):
        raise NotImplementedError(f"a cache in {spec.cache_dtype} for queries in {spec.dtype}")
    if spec.head_dim > 256:
        raise NotImplementedError(f"head_dim {spec.head_dim}; supported: up to 256")
    if spec.num_heads // spec.num_kv_heads > 16:
        raise NotImplementedError(
            f"{spec.num_heads} query heads for {spec.num_kv_heads} KV heads: more than 16 for one"
        )
    row_bytes = spec.num_kv_heads * padded_head_dim(spec.head_dim) * jnp.dtype(spec.cache_dtype).itemsize
    if row_bytes % ROW_BYTES:  # as of an odd number of heads of 64 in 8 bits: the write would stop the device
        raise NotImplementedError(
            f"a cache in {spec.cache_dtype} with {spec.num_kv_heads} KV heads of {spec.head_dim}: a token's keys must "
            f"be a multiple of {ROW_BYTES} bytes"
        )
    if spec.page_size not in (16, 32, 64, 128, 256):
        raise NotImplementedError(f"page_size {spec.page_size}; supported: 16, 32, 64, 128, 256")


def padded_head_dim(head_dim: int) -> int:
    """H as the cache holds it: a row must begin on 128 bytes of shared memory where TMA moves it by itself."""
    return -(-head_dim // 64) * 64


def cache_shapes(spec, num_pages: int) -> tuple[tuple[int, ...], ...]:
    """K and V, each [P, K, page, H], H padded."""
    return ((num_pages, spec.num_kv_heads, spec.page_size, padded_head_dim(spec.head_dim)),) * 2


def make_plan(meta, *, num_tokens: int, num_heads: int, cache, sliding_window: int | None) -> Plan:
    """See `Plan`."""
    num_pages, num_kv_heads, page_size, head_dim = cache[0].shape
    group = num_heads // num_kv_heads
    page, offset = reference.new_token_slots(meta, num_tokens, num_pages, page_size)
    lengths = jnp.diff(meta.query_starts)
    is_real = (jnp.arange(meta.kv_lens.shape[0]) < meta.num_seqs) & (lengths > 0)
    is_short = is_real & (lengths <= common.ROWS // group)
    heads = decode.heads_a_block(num_kv_heads, head_dim)
    num_runs = max(common.num_sms() * heads // num_kv_heads, 1)
    seqs, runs = _decode_work(meta, is_short, lengths, sliding_window, num_runs, decode_block(head_dim))
    units = prefill.CLUSTER * prefill.warpgroups(head_dim)
    block = prefill_block(head_dim, cache[0].dtype)
    is_long = is_real & ~is_short
    items, num_items = _prefill_work(meta, is_long, lengths, sliding_window, group, units, num_tokens, block)
    # Clipped, which makes it an array of its own: a slice of a larger one might not start on 256 bytes, as TMA wants.
    table = jnp.clip(meta.page_table, 0, num_pages - 1)
    return Plan(page, offset, table, seqs, runs, items, num_items, sliding_window)


def decode_block(head_dim: int) -> int:
    """Keys of a block of the decode kernel: 64 KB of keys and values of two heads, or of one wide one."""
    return 128 if head_dim <= 64 else 64


def prefill_block(head_dim: int, cache_dtype) -> int:
    """Keys of a block of the prefill kernel; fewer where each warpgroup holds a block widened to 16 bits as well."""
    return 128 if head_dim <= 128 and cache_dtype.itemsize == 2 else 64


def _prefill_work(meta, is_long, lengths, sliding_window: int | None, group: int, units: int, num_tokens: int, block):
    """Lists the tiles of `units` units of the long sequences, those with most blocks of keys first."""
    rows = common.ROWS
    num_slots = is_long.shape[0]
    starts = meta.query_starts[:-1]
    ahead = starts % prefill.ALIGNMENT  # tokens of others in the first unit
    tiles = jnp.where(is_long, -(-(-(-(ahead + lengths) // rows) * group) // units), 0)
    ends = jnp.cumsum(tiles)
    most_long = min(num_slots, num_tokens // (rows // group + 1))  # shorter ones are the decode kernel's
    most_units = (num_tokens + (prefill.ALIGNMENT - 1 + rows - 1) * most_long) // rows * group
    index = jnp.arange(max(most_units // units + most_long, 1), dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(ends[None, :] <= index[:, None], axis=1), num_slots - 1).astype(jnp.int32)
    is_real = index < ends[-1]
    first_unit = (index - (ends[seq] - tiles[seq])) * units
    begin, end = (unit // group * rows - ahead[seq] for unit in (first_unit, first_unit + units - 1))
    length, kv_len = lengths[seq], meta.kv_lens[seq]
    old = kv_len - length
    first_block = jnp.zeros_like(index)
    if sliding_window is not None:
        first_block = jnp.maximum(old + jnp.maximum(begin, 0) - sliding_window + 1, 0) // block
    blocks = jnp.where(is_real, -(-(old + jnp.minimum(end + rows, length)) // block) - first_block, 0)
    columns = (seq, first_unit, starts[seq], starts[seq] + length, first_block, blocks, kv_len)
    items = jnp.stack([c.astype(jnp.int32) for c in columns], axis=1)
    return items[jnp.argsort(-blocks)], ends[-1:]


def _decode_work(meta, is_short, lengths, sliding_window: int | None, num_runs: int, block: int):
    """Lays the blocks of the sequences end to end, and cuts them into equal runs."""
    num_slots = is_short.shape[0]
    first_block = jnp.zeros(num_slots, jnp.int32)
    if sliding_window is not None:
        first_block = jnp.maximum(meta.kv_lens - lengths - sliding_window + 1, 0) // block
    counts = jnp.where(is_short, -(-meta.kv_lens // block) - first_block, 0)
    order = jnp.argsort(jnp.logical_not(is_short), stable=True).astype(jnp.int32)
    counts = counts[order]
    ends = jnp.cumsum(counts)
    begins, total = ends - counts, ends[-1]
    columns = (order, begins, ends, first_block[order], meta.kv_lens[order], meta.query_starts[order], lengths[order])
    seqs = jnp.stack(columns, axis=1)

    used = jnp.clip(total // MIN_BLOCKS_A_RUN, 1, num_runs)
    cuts = jnp.minimum(jnp.arange(num_runs + 1) * total // used, total)
    low, high = cuts[:-1], cuts[1:]
    first = jnp.sum(ends[None, :] <= low[:, None], axis=1)
    last = jnp.sum(begins[None, :] < high[:, None], axis=1)  # begins of empty sequences are all `total`
    last = jnp.maximum(last, first)
    # The last sequence of a run that begins there and ends later is merged by that run.
    final = jnp.maximum(last - 1, 0)
    is_split = (last > first) & (begins[final] >= low) & (ends[final] > high)
    merge_end = jnp.sum(low[None, :] < ends[final][:, None], axis=1)
    num_rows = jnp.full(num_runs, meta.query_starts[meta.num_seqs])
    runs = (low, high, first, last, jnp.where(is_split, final, -1), merge_end, num_rows)
    return seqs, jnp.stack([r.astype(jnp.int32) for r in runs], axis=1)


def shift_plan(plan: Plan, offset) -> Plan:
    """The same work on pages `offset` further on."""
    return dataclasses.replace(plan, page=plan.page + offset, table=plan.table + offset)


def ragged_paged_attention(q, k, v, cache, meta, *, scale, sliding_window, soft_cap, sinks, k_scale, v_scale):
    """See `api.ragged_paged_attention`."""
    num_tokens, num_heads, original_head_dim = q.shape
    if k is not None:
        k, v = (_pad_heads(x, padded_head_dim(original_head_dim)) for x in (k, v))
        reference.check_cache(k, cache)
    num_kv_heads, page_size, head_dim = cache[0].shape[1:]
    q = _pad_heads(q, head_dim)
    plan = meta.plan
    if plan is None:
        plan = make_plan(meta, num_tokens=num_tokens, num_heads=num_heads, cache=cache, sliding_window=sliding_window)
    if plan.sliding_window != sliding_window:
        raise ValueError(f"sliding_window={sliding_window}, but meta was planned for {plan.sliding_window}")
    if scale <= 0:
        raise NotImplementedError(f"scale={scale}; supported: above 0")
    dtype = cache[0].dtype
    if k is not None:
        cache = _write_new(k, v, cache, plan, k_scale, v_scale)
    group = num_heads // num_kv_heads
    tile = common.Tile(
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        block_kv=decode_block(head_dim),
        dtype=q.dtype,
        cache_dtype=dtype,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
        quantized=k_scale is not None or v_scale is not None,
        max_query_len=meta.max_query_len or num_tokens,
        operands_in_smem=OPERANDS_IN_SMEM,
    )
    scales = None
    if tile.quantized:
        ones = jnp.ones(num_kv_heads, jnp.float32)
        scales = jnp.stack([ones if s is None else ones * s for s in (k_scale, v_scale)])
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(num_kv_heads, group) * common.LOG2E, (1, tile.tokens))
        sinks = jnp.pad(sinks, ((0, 0), (0, common.ROWS - sinks.shape[1])))
    has_chunks = tile.max_query_len > tile.tokens
    if has_chunks:
        q = jnp.pad(q, ((0, -num_tokens % prefill.ALIGNMENT), (0, 0), (0, 0)))
    out = decode.attend(
        q,
        cache,
        plan.table,
        plan.decode_seqs,
        plan.decode_runs,
        tile,
        sinks=sinks,
        scales=scales,
    )
    if has_chunks:
        prefill.attend(
            q,
            cache,
            out,
            plan.table,
            plan.prefill_items,
            plan.num_prefill_items,
            dataclasses.replace(tile, block_kv=prefill_block(head_dim, tile.cache_dtype)),
            sinks=sinks,
            scales=scales,
        )
    return jax.freeze(out)[:num_tokens, :, :original_head_dim], cache


def _pad_heads(x, head_dim: int):
    return x if x.shape[2] == head_dim else jnp.pad(x, ((0, 0), (0, 0), (0, head_dim - x.shape[2])))


def _write_new(k, v, cache, plan: Plan, k_scale, v_scale):
    """The cache with new keys and values [T, K, H]."""
    is_real = (plan.page < cache[0].shape[0])[:, None, None]
    k, v = (jnp.where(is_real, x, 0) for x in (k, v))  # arrays of their own, as the page table
    k, v = (reference.to_cache_dtype(x, scale, cache[0].dtype) for x, scale in ((k, k_scale), (v, v_scale)))
    return write(k, v, cache, plan.page, plan.offset)
