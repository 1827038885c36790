"""Ragged paged attention for TPUs, in Pallas: layout of the cache, limits, and what surrounds the kernel.

The cache is one array [P, K, page, width] a layer: a row holds a token's key and value side by side, in 128 lanes for
both where head dims are at most 64, in whole multiples of 128 lanes for each otherwise. A page is thus one contiguous
copy, and each head's keys are the right operand of a matmul as they lie. `mosaic_tpu_plan` says what ragged queries and
new keys become, `mosaic_tpu_kernel` and `mosaic_tpu_write` are the kernel.
"""

import dataclasses
import functools
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_tpu_kernel as kernel
from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_tpu_plan as plans
from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_tpu_refs as refs
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_tpu_plan import CHUNK_ROWS, TABLE_ROW, Blocks, Plan
from jaxengine.pallas_kernels.target import target_device

LANES = 128
QUERY_DTYPES = ("bfloat16", "float32")
CACHE_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")
MAX_GROUP_SIZE = CHUNK_ROWS
MAX_HEAD_DIM = 256
SCALAR_BYTES = 2**19  # of the 1 MB of scalar memory
# Buffers take at most this much of the vector memory, whose smallest size is 64 MiB (v7x); the rest is for values that
# the compiler spills.
BUFFER_BYTES = 20 * 2**20
VMEM_LIMIT_BYTES = 56 * 2**20


def check_support(spec) -> None:
    """Raises NotImplementedError, naming what the kernel does not do."""
    group_size = spec.num_heads // spec.num_kv_heads
    problems: tuple[tuple[bool, str], ...] = (
        (spec.dtype not in QUERY_DTYPES, f"queries in {spec.dtype} (only {', '.join(QUERY_DTYPES)})"),
        (spec.cache_dtype not in CACHE_DTYPES, f"a cache in {spec.cache_dtype} (only {', '.join(CACHE_DTYPES)})"),
        (spec.page_size % 16 != 0 or spec.page_size > TABLE_ROW * 16, f"page_size={spec.page_size}: 16, 32, ... 2048"),
        (spec.head_dim > MAX_HEAD_DIM, f"head_dim={spec.head_dim}: at most {MAX_HEAD_DIM}"),
        (group_size > MAX_GROUP_SIZE, f"{group_size} query heads a KV head: at most {MAX_GROUP_SIZE}"),
    )
    width, itemsize = 2 * _half_width(spec.head_dim), jnp.dtype(spec.cache_dtype).itemsize
    page_bytes = _page_bytes(spec.num_kv_heads, spec.page_size, width, itemsize)
    problems += ((2 * page_bytes > BUFFER_BYTES, f"pages of {page_bytes} bytes: at most {BUFFER_BYTES // 2}"),)
    for is_wrong, problem in problems:
        if is_wrong:
            raise NotImplementedError(problem)


def cache_shapes(spec, num_pages: int) -> tuple[tuple[int, ...], ...]:
    """One array [P, K, page, width]: keys in the first half of the last axis, values in the second, each padded."""
    return ((num_pages, spec.num_kv_heads, spec.page_size, 2 * _half_width(spec.head_dim)),)


def _half_width(head_dim: int) -> int:
    return LANES // 2 if head_dim <= LANES // 2 else -(-head_dim // LANES) * LANES


def make_plan(meta, *, num_tokens: int, num_heads: int, cache, sliding_window: int | None) -> Plan:
    """See `mosaic_tpu_plan.Plan`; it holds for every sliding window."""
    del sliding_window
    num_pages, num_kv_heads, page_size, _ = cache[0].shape
    plan = plans.plan_step(
        meta,
        num_tokens=num_tokens,
        group_size=num_heads // num_kv_heads,
        num_pages=num_pages,
        page_size=page_size,
        granule=plans.granule_of(page_size, cache[0].dtype),
        chunks=_blocks(num_heads, cache[0], meta.max_query_len).chunks,
    )
    if 4 * (plan.units.size + plan.granules.size) > SCALAR_BYTES:
        raise NotImplementedError(f"T={num_tokens} with S={meta.kv_lens.shape[0]}: too many units for scalar memory")
    return plan


shift_plan = plans.shift_plan


def ragged_paged_attention(q, k, v, cache, meta, *, scale, sliding_window, soft_cap, sinks, k_scale, v_scale):
    """See the public op in `api`."""
    _check(q, k, cache)
    plan = meta.plan
    if plan is None:
        plan = make_plan(meta, num_tokens=q.shape[0], num_heads=q.shape[1], cache=cache, sliding_window=sliding_window)
    (pages,) = cache
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page_size, width = pages.shape[1:]
    static = refs.Static(
        blocks=_blocks(num_heads, pages, meta.max_query_len),
        num_kv_heads=num_kv_heads,
        group_size=num_heads // num_kv_heads,
        page_size=page_size,
        granule=plans.granule_of(page_size, pages.dtype),
        table_rows=plan.table.shape[0] // meta.kv_lens.shape[0],
        query_width=max(width // 2, LANES),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
        compute_dtype=str(q.dtype),
    )
    factor = scale * kernel.LOG2_E if soft_cap is None else scale / soft_cap
    factors = jnp.broadcast_to(jnp.float32(factor) * (1.0 if k_scale is None else k_scale), (num_kv_heads,))
    v_factors = jnp.broadcast_to(jnp.float32(1.0) if v_scale is None else v_scale, (num_kv_heads,))
    new = jnp.concatenate([_to_cache(k, k_scale, pages), _to_cache(v, v_scale, pages)], axis=-1)  # f32[T, K, width]
    padding = (0, 0), (0, 0)
    out, pages = _call(
        static,
        plan,
        factors.astype(jnp.float32),
        jnp.pad(q.astype(jnp.float32), ((0, static.unit_len), (0, 0), (0, static.query_width - head_dim))),
        jnp.pad(new, ((static.granule, static.granule), *padding)),
        pages,
        _row_tokens(static),
        _chunk_sinks(static, sinks),
        jnp.broadcast_to(v_factors.astype(jnp.float32)[:, None, None], (num_kv_heads, 1, LANES)),
    )
    first = 0 if width > LANES else width // 2  # where values share the lanes with keys, so do the results
    is_padding = jnp.arange(q.shape[0]) >= plan.num_rows
    out = jnp.where(is_padding[:, None, None], 0, out[: q.shape[0], :, first : first + head_dim])
    return out.astype(q.dtype), (pages,)


def _check(q, k, cache) -> None:
    """Raises ValueError unless the cache fits k[T, K, H], NotImplementedError for what `check_support` refuses."""
    num_kv_heads, head_dim = k.shape[1:]
    shapes = [c.shape for c in cache]
    width = 2 * _half_width(head_dim)
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1::2] != (num_kv_heads, width):
        raise ValueError(f"cache {shapes} does not fit k{k.shape}: expected one [P, {num_kv_heads}, page, {width}]")
    # Imported here: api imports this module by name.
    from jaxengine.pallas_kernels.ragged_paged_attention.api import AttentionSpec

    check_support(AttentionSpec(q.shape[1], num_kv_heads, head_dim, shapes[0][2], str(q.dtype), str(cache[0].dtype)))


# Block sizes


@functools.cache
def _tuning(device_kind: str) -> dict:
    """The tuning file of a device kind, such as "TPU v6 lite"; empty where there is none."""
    folder = device_kind.lower().replace(" ", "_")
    file = resources.files("jaxengine.pallas_kernels") / "tuning" / folder / "ragged_paged_attention.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _blocks(num_heads: int, pages, max_query_len: int | None) -> Blocks:
    """Block sizes for a cache: from the device kind's tuning file, or else by a heuristic.

    Where a chunk holds any sequence's queries, units of several chunks are left out of the kernel.
    """
    _, num_kv_heads, page_size, width = pages.shape
    key = f"{num_heads}/{num_kv_heads} heads, width {width}, page {page_size}, {pages.dtype}"
    tuned = _tuning(target_device().device_kind).get("blocks", {}).get(key)
    blocks = Blocks(**tuned) if tuned else heuristic_blocks(num_kv_heads, page_size, width, pages.dtype.itemsize)
    if max_query_len is not None and max_query_len <= plans.tokens_of_chunk(num_heads // num_kv_heads):
        blocks = dataclasses.replace(blocks, chunks=1, rows=CHUNK_ROWS)
    return blocks


def heuristic_blocks(num_kv_heads: int, page_size: int, width: int, itemsize: int) -> Blocks:
    """Blocks of up to 512 keys and units of up to 512 rows a head, as far as buffers fit `BUFFER_BYTES`."""
    pages = 1
    while (
        2 * pages * page_size <= 512
        and 2 * pages <= TABLE_ROW
        and 4 * pages * _page_bytes(num_kv_heads, page_size, width, itemsize) <= BUFFER_BYTES // 2
    ):
        pages *= 2
    query_width = max(width // 2, LANES)
    # Queries and results as they come, twice; queries as they are used; output, maximum and sum.
    row_bytes = num_kv_heads * 4 * (6 * query_width + 2 * LANES)
    rows = 512
    while rows > CHUNK_ROWS and rows * row_bytes > BUFFER_BYTES // 2:
        rows //= 2
    heads = next(n for n in range(8, 0, -1) if num_kv_heads % n == 0)
    return Blocks(pages=pages, chunks=rows // CHUNK_ROWS, rows=min(rows, 256), heads=heads)


def _page_bytes(num_kv_heads: int, page_size: int, width: int, itemsize: int) -> int:
    return num_kv_heads * page_size * width * itemsize


# Between the caller's arrays and the kernel's


def _to_cache(new, scale, pages):
    """[T, K, H] as it is cached, divided by its scale and rounded, but in float32; padded to [T, K, width / 2]."""
    new = new.astype(jnp.float32)
    if scale is not None:
        new = new / jnp.reshape(scale, (-1, 1))
    if jnp.issubdtype(pages.dtype, jnp.integer):
        limits = jnp.iinfo(pages.dtype)
        new = jnp.clip(jnp.round(new), limits.min, limits.max)
    new = new.astype(pages.dtype).astype(jnp.float32)
    return jnp.pad(new, ((0, 0), (0, 0), (0, pages.shape[-1] // 2 - new.shape[-1])))


def _row_tokens(static: refs.Static):
    """i32[unit rows, LANES], token of each row of a unit."""
    row = np.arange(static.unit_rows, dtype=np.int32)
    token = row // CHUNK_ROWS * static.chunk_len + row % CHUNK_ROWS % static.chunk_len
    return jnp.asarray(np.broadcast_to(token[:, None], (row.size, LANES)))


def _chunk_sinks(static: refs.Static, sinks):
    """[N] as f32[K, CHUNK_ROWS, LANES], one a row of a chunk, in base 2 like the scores."""
    shape = (static.num_kv_heads, CHUNK_ROWS, LANES)
    if sinks is None:
        return jnp.zeros(shape, jnp.float32)
    sinks = kernel.LOG2_E * sinks.astype(jnp.float32).reshape(static.num_kv_heads, static.group_size)
    head = np.minimum(np.arange(CHUNK_ROWS) // static.chunk_len, static.group_size - 1)
    return jnp.broadcast_to(sinks[:, head][:, :, None], shape)


def _call(static: refs.Static, plan: Plan, factors, q, new, pages, tokens, sinks, v_scale):
    """Calls the kernel; returns the results' chunks and the cache, which is the one given."""
    blocks, heads, rows, width = static.blocks, static.num_kv_heads, static.unit_rows, static.query_width
    in_hbm, in_vmem = (pl.BlockSpec(memory_space=space) for space in (pl.ANY, pltpu.VMEM))
    tokens_buffer = pltpu.VMEM((2, static.unit_len, *q.shape[1:]), jnp.float32)
    scratch = [
        pltpu.SMEM((refs.TABLES, 1, TABLE_ROW), jnp.int32),
        pltpu.VMEM((2, blocks.pages, *pages.shape[1:]), pages.dtype),
        tokens_buffer,
        tokens_buffer,
        pltpu.VMEM((heads, rows, width), static.compute_dtype),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, LANES), jnp.float32),
        pltpu.VMEM((heads, rows, width), jnp.float32),
        pltpu.VMEM((refs.WRITES, heads, static.granule, pages.shape[-1]), pages.dtype),
        pltpu.VMEM((refs.WRITES, static.granule, heads, pages.shape[-1]), jnp.float32),
        *(pltpu.SemaphoreType.DMA((n,)) for n in (refs.TABLES, 2, 2, 2, refs.WRITES, refs.WRITES)),
    ]
    return pl.pallas_call(
        functools.partial(kernel.kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[in_hbm, in_hbm, in_hbm, in_hbm, in_vmem, in_vmem, in_vmem],
            out_specs=[in_hbm, in_hbm],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)],
        input_output_aliases={7: 1},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT_BYTES, disable_bounds_checks=True),
        cost_estimate=_cost(static, plan, q, pages),
        name="ragged_paged_attention",
    )(plan.counts, plan.units, plan.granules, factors, plan.table, q, new, pages, tokens, sinks, v_scale)


def _cost(static: refs.Static, plan: Plan, q, pages) -> pl.CostEstimate:
    """An upper bound, as lengths are not known: full tables, or the whole cache where that is less."""
    num_units = plan.units.shape[0] // len(plans.UNIT_FIELDS)
    table_pages = static.table_rows * TABLE_ROW
    read_pages = min(num_units * table_pages, pages.shape[0])
    keys_of_row = min(table_pages, pages.shape[0]) * static.page_size
    num_rows = q.shape[0] * q.shape[1]
    page_bytes = pages.size // pages.shape[0] * pages.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * num_rows * keys_of_row * static.query_width,
        transcendentals=num_rows * keys_of_row,
        bytes_accessed=read_pages * page_bytes + 2 * q.size * q.dtype.itemsize,
    )
