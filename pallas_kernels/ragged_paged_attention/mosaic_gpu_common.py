"""What the Mosaic GPU kernels of ragged paged attention share: the shape of a tile, its mask, its softmax, its I/O.

A tile is 64 rows, the M of a wgmma: `64 // G` consecutive query tokens of one sequence with the G query heads of one
KV head each, so that row r is token `r // G`, head `r % G`. Fewer rows may be in use; nobody stores the others.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.target import num_cores, target_device

ROWS = 64
LOG2E = math.log2(math.e)
# Finite, so that a row that sees no key of a block stays without NaN; and a power of two, so that its products are
# exact: a fused multiply-add would otherwise see the rounding of the maximum, some 1e22, and call it a logit.
MASKED = -(2.0**100)
SMEM_BYTES = 232_448 - 2048  # of a block on Hopper, less what barriers and reductions take

I32 = jnp.int32
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is fixed when a kernel is traced.

    Attributes:
      group: G, query heads of a KV head.
      head_dim: H.
      page_size: tokens of a page.
      block_kv: keys that one step of the pipeline handles.
      dtype: of the queries, the output and the products.
      cache_dtype: of the pages.
      scale: factor on the logits, positive.
      sliding_window: or None.
      soft_cap: or None.
      has_sinks: whether a logit without a value takes part in each row's softmax.
      quantized: whether k_scale and v_scale apply.
      max_query_len: most new tokens of a sequence that a tile needs to load.
      operands_in_smem: pass the left sides of products through shared memory; the interpreter cannot take registers.
    """

    group: int
    head_dim: int
    page_size: int
    block_kv: int
    dtype: jnp.dtype
    cache_dtype: jnp.dtype
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    has_sinks: bool
    quantized: bool
    max_query_len: int
    operands_in_smem: bool

    @property
    def tokens(self) -> int:
        """Query tokens of a tile."""
        return ROWS // self.group

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the products. Both 16-bit types hold int8; float8 is converted to float16 in one instruction."""
        return jnp.dtype(jnp.float16) if self.cache_dtype == jnp.float8_e4m3fn else self.dtype

    @property
    def queries_in_smem(self) -> bool:
        """Whether queries wait in shared memory for their products: wide ones would take half of the registers.

        A product reads half as much again from there then, which costs power.
        """
        return self.operands_in_smem or self.head_dim > 128

    @property
    def is_narrow(self) -> bool:
        """Whether the cache must be widened before a product."""
        return self.cache_dtype != self.dtype

    @property
    def chunk(self) -> int:
        """Keys that one TMA copy brings."""
        return min(self.page_size, self.block_kv)

    def smem(self, shape: tuple[int, ...], dtype) -> plgpu.SMEM:
        """Shared memory for matrices [..., rows, columns], laid out for wgmma."""
        itemsize = jnp.dtype(dtype).itemsize
        swizzle = next(s for s in (128, 64, 32, 16) if (itemsize * shape[-1]) % s == 0)
        transforms = plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
        return plgpu.SMEM(shape, dtype, transforms=transforms)


def split_optional(tile: Tile, refs) -> tuple:
    """The references of scales and sinks, None for what the kernel was not given."""
    refs = iter(refs)
    return (next(refs) if tile.quantized else None), (next(refs) if tile.has_sinks else None)


def row_layout():
    """Returns the layout of a number for each row of a tile."""
    return plgpu.Layout.WGMMA.reduce(1)


def across(x, shape):
    """Broadcasts [R] over the columns of `shape` [R, C]."""
    return lax.broadcast_in_dim(x, shape, [0])


def row_tokens(tile: Tile):
    """i32[64]: which token of the tile each row belongs to."""
    rows = plgpu.broadcasted_iota(I32, (ROWS,), 0, layout=row_layout())
    return rows if tile.group == 1 else lax.div(rows, jnp.full((ROWS,), tile.group, I32))


def start(tile: Tile):
    """Carry of the online softmax: output so far, maximum of the logits in units of log 2, sum."""
    top = plgpu.layout_cast(jnp.full((ROWS,), MASKED, F32), row_layout())
    total = plgpu.layout_cast(jnp.full((ROWS,), 0.0, F32), row_layout())
    acc = plgpu.layout_cast(jnp.full((ROWS, tile.head_dim), 0.0, F32), plgpu.Layout.WGMMA)
    return acc, top, total


def to_logits(tile: Tile, scores, k_scale):
    """Scores q.k as logits up to a factor, and that factor, which gives them in units of log 2."""
    if tile.soft_cap is None:
        return scores, k_scale * (tile.scale * LOG2E)
    return jnp.tanh(scores * (k_scale * (tile.scale / tile.soft_cap))), tile.soft_cap * LOG2E


def mask(tile: Tile, logits, q_pos, first_key):
    """Hides what a row does not see: later keys, and those before its window.

    Args:
      logits: f32[64, C].
      q_pos: i32[64], position of each row's token.
      first_key: position of the first column.
    """
    shape = logits.shape
    keys = plgpu.broadcasted_iota(I32, shape, 1, layout=plgpu.Layout.WGMMA)
    last = across(q_pos - first_key, shape)
    seen = keys <= last
    if tile.sliding_window is not None:
        seen = seen & (keys > last - tile.sliding_window)
    return jnp.where(seen, logits, MASKED)


def query_operand(tile: Tile, raw, operand):
    """A tile's queries [64, H] as the left side of a product: registers, or `operand` in shared memory."""
    # Of wide heads, the search for a layout without bank conflicts fails for some groups, after minutes (jax 0.11.2).
    q = plgpu.load(raw, layout=plgpu.Layout.WGMMA, optimized=tile.head_dim <= 128)
    if tile.compute_dtype != tile.dtype:
        q = q.astype(F32).astype(tile.compute_dtype)
    if operand is None:
        return q
    operand[...] = q
    plgpu.commit_smem()
    return operand


def matmul(a, b):
    """a[64, X] @ b[X, C] as f32[64, C], waited for."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), F32))


def softmax_step(tile: Tile, carry, logits, factor, operand):
    """One block of the online softmax, of `logits` times `factor`.

    Returns:
      The carry with the output so far shrunk, and the weights [64, C] as the left side of a product.
    """
    acc, top, total = carry
    new_top = jnp.maximum(top, logits.max(axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    p = jnp.exp2(logits * factor - across(new_top, logits.shape))  # a fused multiply-add
    total = total * shrink + p.sum(axis=1)
    acc = acc * across(shrink, acc.shape)
    p = p.astype(tile.compute_dtype)
    if operand is not None:
        operand[...] = p
        plgpu.commit_smem()
        p = operand
    return (acc, new_top, total), p


def add_values(tile: Tile, carry, p, v):
    """Adds p[64, C] @ v[C, H] to the output."""
    acc, top, total = carry
    if tile.operands_in_smem:  # the interpreter knows no accumulator with a start value either
        return acc + matmul(p, v), top, total

    def run(acc_ref):
        plgpu.wgmma(acc_ref, p, v)

    return pl.run_state(run)(plgpu.ACC.init(acc)), top, total


def add_sink(carry, sink):
    """Lets a row's sink, a logit in units of log 2, take part in its softmax."""
    acc, top, total = carry
    new_top = jnp.maximum(top, sink)
    shrink = jnp.exp2(top - new_top)
    return acc * across(shrink, acc.shape), new_top, total * shrink + jnp.exp2(sink - new_top)


def wait_when(condition, barrier) -> None:
    """Waits for a barrier if a condition holds."""

    @pl.when(condition)
    def _():
        plgpu.barrier_wait(barrier)


def load_queries(tile: Tile, q_ref, first_token, head, raw, barrier):
    """Starts the copy of a tile's queries [T, N, H] to `raw` [64, H]; `barrier` counts `query_copies` arrivals.

    Rows past the end of the batch repeat the last token's.
    """
    group, last = tile.group, q_ref.shape[0] - 1
    for i in range(query_copies(tile)):
        token = jnp.minimum(first_token + i, last)
        plgpu.copy_gmem_to_smem(q_ref.at[token, pl.ds(head * group, group)], raw.at[pl.ds(i * group, group)], barrier)


def query_copies(tile: Tile) -> int:
    """Returns how many copies bring a tile's queries."""
    return min(tile.tokens, tile.max_query_len)


def store_rows(tile: Tile, raw, out_ref, first_token, num_tokens, head):
    """Starts the copies of the first `num_tokens` tokens of `raw` [64, H] to their rows of [T, N, H]."""
    group = tile.group

    def store(i, _):
        plgpu.copy_smem_to_gmem(
            raw.at[pl.ds(i * group, group)], out_ref.at[first_token + i, pl.ds(head * group, group)]
        )

    lax.fori_loop(I32(0), num_tokens, store, None)


def block_pages(tile: Tile, page_table_ref, seq, last_page, block) -> tuple:
    """Ids of the pages of one block of keys; the sequence's last page stands for those past it.

    Looked up a block ahead: the copies would wait for each lookup in turn otherwise.
    """
    first = block * tile.block_kv
    chunks = range(0, tile.block_kv, tile.chunk)
    places = [lax.div(first + I32(c), I32(tile.page_size)) for c in chunks]
    last_page = jnp.clip(last_page, 0, page_table_ref.shape[1] - 1)  # what is no work has any length
    return tuple(page_table_ref[seq, jnp.minimum(place, last_page)] for place in places)


def copy_block(tile: Tile, pages_ref, smem, barrier, page_ids, block, head, collective_axes=None):
    """Starts the copies of one block of keys or values of one head, [block_kv, H], page by page."""
    chunk = tile.chunk
    for j, page in enumerate(page_ids):
        source = pages_ref.at[page, head]
        if chunk < tile.page_size:
            offset = lax.rem(block * tile.block_kv, I32(tile.page_size)) + j * chunk
            source = source.at[pl.ds(pl.multiple_of(offset, chunk), chunk)]
        target = smem.at[pl.ds(j * chunk, chunk)]
        plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=collective_axes)


def block_copies(tile: Tile) -> int:
    """Returns how many copies bring a block of keys."""
    return tile.block_kv // tile.chunk


def widen(tile: Tile, smem, wide):
    """Copies a block [block_kv, H] of 8-bit keys or values to 16 bits."""
    narrow = plgpu.load(smem, layout=plgpu.Layout.WGMMA_UPCAST_2X)  # reads four at a time
    wide[...] = narrow.astype(tile.compute_dtype)
    plgpu.commit_smem()
    return wide


def zero_tail(tile: Tile, smem, valid):
    """Clears the rows of a block [block_kv, H] of values from `valid` on: they hold anything, and 0 * NaN is NaN."""
    values = plgpu.layout_cast(smem[...], plgpu.Layout.WGMMA)
    rows = plgpu.broadcasted_iota(I32, smem.shape, 0, layout=plgpu.Layout.WGMMA)
    smem[...] = jnp.where(rows < valid, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def num_sms() -> int:
    """Multiprocessors of the GPU, for the size of a persistent grid; an H100's where there is none."""
    return num_cores(target_device()) or 132
