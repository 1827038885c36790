"""Chunks of prompts on Hopper: sequences with more new tokens than one tile holds.

One persistent thread block a multiprocessor goes through a list of tiles, longest first, in the order of a snake, so
that all finish together. One warpgroup brings in pages and the next tile's queries by TMA, some blocks ahead and across
the borders of tiles; each of the others computes 64 rows. They take turns at the tensor cores: one multiplies while the
other takes its softmax (FlashAttention-3, arXiv 2407.08608).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu_common as common
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_gpu_common import I32, ROWS, Tile, across

# Columns of `items`.
SEQ, FIRST_TOKEN, NUM_TOKENS, FIRST_POS, FIRST_BLOCK, NUM_BLOCKS, KV_LEN = range(7)


def warpgroups(head_dim: int) -> int:
    """Warpgroups that compute: with wide heads the queries of two leave no room for keys."""
    return 2 if head_dim <= 128 else 1


def num_stages(tile: Tile) -> int:
    """Blocks of keys and values in flight."""
    wgs = warpgroups(tile.head_dim)
    left = common.SMEM_BYTES - 3 * wgs * ROWS * tile.head_dim * 2
    if tile.operands_in_smem:
        left -= wgs * ROWS * tile.block_kv * 2
    if tile.is_narrow:
        left -= wgs * tile.block_kv * tile.head_dim * 2
    return min(4, left // (2 * tile.block_kv * tile.head_dim * tile.cache_dtype.itemsize))


def attend(q, cache, out_ref, table, items, num_items, tile: Tile, *, sinks, scales):
    """Attention of the tiles in `items`.

    Args:
      q: [T, N, H].
      cache: K and V pages, [P, K, page, H].
      out_ref: mutable [T, N, H].
      table: i32[S, P].
      items: i32[I, 7], tiles in descending order of their blocks; see the columns above.
      num_items: i32[1], how many of them are real.
      sinks: f32[K, 64] in units of log 2, by row of a tile, or None.
      scales: f32[2, K] of keys and values, or None.
    """
    k_pages, v_pages = cache

    def prefill_attention(*refs, **scratch):
        _kernel(refs, scratch, tile, k_pages.shape[1])

    kernel = plgpu.kernel(
        prefill_attention,
        grid=(common.num_sms(),),
        grid_names=("block",),
        num_threads=warpgroups(tile.head_dim) + 1,
        thread_name="wg",
        scratch_types=_scratch(tile),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    optional = (x for x in (scales, sinks) if x is not None)
    kernel(q, k_pages, v_pages, table, items, num_items, *optional, out_ref)


def _scratch(tile: Tile) -> dict:
    stages, wgs = num_stages(tile), warpgroups(tile.head_dim)
    if stages < 1:
        raise NotImplementedError(f"head_dim {tile.head_dim}: no room for a block of keys in shared memory")
    rows, block = (wgs, ROWS, tile.head_dim), (tile.block_kv, tile.head_dim)
    ring = tile.smem((stages, *block), tile.cache_dtype)
    full = plgpu.Barrier(num_arrivals=common.block_copies(tile), num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    scratch = {
        "q_raw": plgpu.SMEM(rows, tile.dtype),
        "q_operand": tile.smem(rows, tile.compute_dtype),
        "out": plgpu.SMEM(rows, tile.dtype),
        "k": ring,
        "v": ring,
        "q_full": plgpu.Barrier(num_arrivals=common.query_copies(tile), num_barriers=wgs),
        "q_free": plgpu.Barrier(num_barriers=wgs),
        "k_full": full,
        "v_full": full,
        "k_free": free,
        "v_free": free,
        "turn": plgpu.Barrier(num_barriers=wgs),
        "tail": plgpu.Barrier(num_arrivals=wgs),
    }
    if tile.operands_in_smem:
        scratch["p_operand"] = tile.smem((wgs, ROWS, tile.block_kv), tile.compute_dtype)
    if tile.is_narrow:
        scratch["wide"] = tile.smem((wgs, *block), tile.compute_dtype)
    return scratch


def _kernel(refs, scratch, tile: Tile, num_kv_heads: int):
    q_ref, k_ref, v_ref, table_ref, items_ref, num_items_ref, *optional, out_ref = refs
    scales_ref, sinks_ref = common.split_optional(tile, optional)
    wgs = warpgroups(tile.head_dim)
    wg, block, num_blocks = lax.axis_index("wg"), lax.axis_index("block"), lax.axis_size("block")
    num_work = num_items_ref[0] * num_kv_heads

    def work(n):
        """The n-th piece of work of this thread block: item and KV head."""
        column = jnp.where(lax.rem(n, I32(2)) == 0, block, num_blocks - 1 - block)
        index = n * num_blocks + column
        item = jnp.minimum(lax.div(index, I32(num_kv_heads)), items_ref.shape[0] - 1)
        return item, lax.rem(index, I32(num_kv_heads)), index < num_work

    rounds = lax.div(num_work + num_blocks - 1, I32(num_blocks))

    @pl.when(wg < wgs)
    def _():
        if wgs == 2:  # two warpgroups have 255 a thread from the start
            plgpu.set_max_registers(232, action="increase")
        consumer = _Consumer(tile, wg, wgs, scratch, scales_ref, sinks_ref, items_ref, out_ref)
        consumer.hand_over_first_turn()

        def one_tile(n, done):
            item, head, is_real = work(n)
            return lax.cond(is_real, lambda: consumer.attend(item, head, done), lambda: done)

        lax.fori_loop(I32(0), rounds, one_tile, I32(0))
        consumer.take_last_turn()
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == wgs)
    def _():
        if wgs == 2:
            plgpu.set_max_registers(40, action="decrease")
        stages = num_stages(tile)

        def load_queries(n, item, head):
            for w in range(wgs):
                common.wait_when(n > 0, scratch["q_free"].at[w])
                first = items_ref[item, FIRST_TOKEN] + w * tile.tokens
                common.load_queries(tile, q_ref, first, head, scratch["q_raw"].at[w], scratch["q_full"].at[w])

        def one_tile(n, done):
            item, head, is_real = work(n)
            seq = items_ref[item, SEQ]
            first, count = items_ref[item, FIRST_BLOCK], jnp.where(is_real, items_ref[item, NUM_BLOCKS], 0)
            last_page = lax.div(items_ref[item, KV_LEN] - 1, I32(tile.page_size))

            @pl.when(is_real)
            def _():
                load_queries(n, item, head)

            def one_block(i, page_ids):
                slot = lax.rem(done + i, I32(stages))
                next_ids = common.block_pages(tile, table_ref, seq, last_page, first + i + 1)
                for name, pages_ref in (("k", k_ref), ("v", v_ref)):
                    common.wait_when(done + i >= stages, scratch[f"{name}_free"].at[slot])
                    target, barrier = scratch[name].at[slot], scratch[f"{name}_full"].at[slot]
                    common.copy_block(tile, pages_ref, target, barrier, page_ids, first + i, head)
                return next_ids

            page_ids = common.block_pages(tile, table_ref, seq, last_page, first)
            lax.fori_loop(I32(0), count, one_block, page_ids)
            return done + count

        done = lax.fori_loop(I32(0), rounds, one_tile, I32(0))
        for i in range(stages):  # every phase of a barrier must be observed
            common.wait_when(i < done, scratch["k_free"].at[i])
            common.wait_when(i < done, scratch["v_free"].at[i])
        for w in range(wgs):
            common.wait_when(done > 0, scratch["q_free"].at[w])


class _Consumer:
    """A warpgroup that computes one tile after the other, while the kernel is traced."""

    def __init__(self, tile: Tile, wg, wgs: int, scratch, scales_ref, sinks_ref, items_ref, out_ref):
        self.tile, self.wg, self.wgs, self.scratch = tile, wg, wgs, scratch
        self.scales_ref, self.sinks_ref, self.items_ref, self.out_ref = scales_ref, sinks_ref, items_ref, out_ref

    # Turns at the tensor cores: a warpgroup waits until the other hands over.

    def take_turn(self):
        if self.wgs == 2:
            plgpu.barrier_wait(self.scratch["turn"].at[self.wg])

    def hand_over(self):
        if self.wgs == 2:
            plgpu.barrier_arrive(self.scratch["turn"].at[1 - self.wg])

    def hand_over_first_turn(self):
        if self.wgs == 2:
            pl.when(self.wg == 1)(self.hand_over)

    def take_last_turn(self):
        if self.wgs == 2:
            pl.when(self.wg == 0)(self.take_turn)

    def attend(self, item, head, done):
        """Computes one tile; `done` counts the blocks of keys before it. Returns the count after it."""
        tile, scratch, wg, items_ref = self.tile, self.scratch, self.wg, self.items_ref
        first_block, count = items_ref[item, FIRST_BLOCK], items_ref[item, NUM_BLOCKS]
        kv_len = items_ref[item, KV_LEN]
        offset = wg * tile.tokens
        first_pos = items_ref[item, FIRST_POS] + offset
        k_scale, v_scale = (self.scales_ref[i, head] if tile.quantized else 1.0 for i in (0, 1))

        plgpu.barrier_wait(scratch["q_full"].at[wg])
        q = common.query_operand(tile, scratch["q_raw"].at[wg], scratch["q_operand"].at[wg])
        plgpu.barrier_arrive(scratch["q_free"].at[wg])
        q_pos = first_pos + common.row_tokens(tile)

        def one_block(i, carry, *, masked: bool):
            slot = lax.rem(done + i, I32(num_stages(tile)))
            first_key = (first_block + i) * tile.block_kv
            k, v = scratch["k"].at[slot], scratch["v"].at[slot]
            valid = kv_len - first_key
            plgpu.barrier_wait(scratch["k_full"].at[slot])
            if tile.is_narrow:
                k = common.widen(tile, k, scratch["wide"].at[wg])
            scores = common.matmul(q, k.transpose((1, 0)))
            self.hand_over()
            plgpu.barrier_arrive(scratch["k_free"].at[slot])
            logits, factor = common.to_logits(tile, scores, k_scale)
            if masked:
                logits = common.mask(tile, logits, q_pos, first_key)
            operand = scratch["p_operand"].at[wg] if tile.operands_in_smem else None
            carry, p = common.softmax_step(tile, carry, logits, factor, operand)
            plgpu.barrier_wait(scratch["v_full"].at[slot])
            if tile.is_narrow:
                v = common.widen(tile, v, scratch["wide"].at[wg])
            if masked:
                self._zero_tail(v, valid)
            self.take_turn()
            carry = common.add_values(tile, carry, p, v)
            plgpu.barrier_arrive(scratch["v_free"].at[slot])
            return carry

        # Blocks that every row of both warpgroups sees whole need no mask. With a window there are few such.
        whole = I32(0)
        if tile.sliding_window is None:
            whole = lax.div(items_ref[item, FIRST_POS] + 1, I32(tile.block_kv)) - first_block
            whole = jnp.clip(whole, 0, count)
        self.take_turn()
        carry = common.start(tile)
        if tile.sliding_window is None:
            carry = lax.fori_loop(I32(0), whole, lambda i, c: one_block(i, c, masked=False), carry)
        carry = lax.fori_loop(whole, count, lambda i, c: one_block(i, c, masked=True), carry)
        self.hand_over()
        self._finish(carry, item, head, v_scale)
        return done + count

    def _zero_tail(self, v, valid):
        """Clears values past the end of the sequence: what is shared, each warpgroup in part, and all wait for all."""
        tile = self.tile
        if tile.is_narrow:  # each has its own
            pl.when(valid < tile.block_kv)(lambda: common.zero_tail(tile, v, valid))
            return

        @pl.when(valid < tile.block_kv)
        def _():
            rows = tile.block_kv // self.wgs
            first = pl.multiple_of(self.wg * rows, rows)
            common.zero_tail(tile, v.at[pl.ds(first, rows)], valid - first)
            plgpu.barrier_arrive(self.scratch["tail"])
            plgpu.barrier_wait(self.scratch["tail"])

    def _finish(self, carry, item, head, v_scale):
        tile, items_ref, out = self.tile, self.items_ref, self.scratch["out"].at[self.wg]
        if self.sinks_ref is not None:
            sink = plgpu.load(self.sinks_ref.at[head], layout=common.row_layout(), optimized=False)
            carry = common.add_sink(carry, sink)
        acc, _, total = carry
        plgpu.wait_smem_to_gmem(0)  # of the tile before
        out[...] = (acc * across(v_scale / total, acc.shape)).astype(tile.dtype)
        plgpu.commit_smem()
        offset = self.wg * tile.tokens
        count = jnp.clip(items_ref[item, NUM_TOKENS] - offset, 0, tile.tokens)
        common.store_rows(tile, out, self.out_ref, items_ref[item, FIRST_TOKEN] + offset, count, head)
