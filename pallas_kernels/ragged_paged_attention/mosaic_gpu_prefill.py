"""Chunks of prompts on Hopper: sequences with more new tokens than a tile of the decode kernel holds.

Persistent clusters of two thread blocks, one a multiprocessor, go through a list of tiles, longest first, in the order
of a snake, so that all finish together. Each thread block brings half of a tile's keys and values to both (multicast).
In each, single warps of one warpgroup bring in pages and the next tile's queries by TMA, some blocks ahead and across
the borders of tiles; each of the other warpgroups computes 64 rows, the queries of one head for 64 tokens (a unit), so
that they come and their outputs leave in one copy each. They take turns at the tensor cores: one multiplies while the
other takes its softmax (FlashAttention-3, arXiv 2407.08608).
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu_common as common
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_gpu_common import I32, ROWS, Tile, across

# Columns of `items`. A tile is as many consecutive units of a sequence as a cluster's warpgroups compute. Unit u is
# head u % G of the query group for 64 tokens, the (u // G)-th such, counted from the last multiple of 8 up to the
# sequence's first new one.
SEQ, FIRST_UNIT, QUERY_START, QUERY_END, FIRST_BLOCK, NUM_BLOCKS, KV_LEN = range(7)

CLUSTER = 2  # thread blocks that share keys and values
ALIGNMENT = 8  # of the token at which a copy between memory and the layout of wgmma's operands begins


def warpgroups(head_dim: int) -> int:
    """Warpgroups that compute: with wide heads the queries of two leave no room for keys."""
    return 2 if head_dim <= 128 else 1


def num_stages(tile: Tile) -> dict[str, int]:
    """Blocks of keys and of values in flight; keys first, since a tile begins with them."""
    wgs = warpgroups(tile.head_dim)
    buffers = 3 if tile.head_dim > 128 else 2  # of queries and outputs; what only the interpreter has needs no room
    left = common.SMEM_BYTES - buffers * wgs * ROWS * tile.head_dim * 2
    if tile.is_narrow:
        left -= wgs * tile.block_kv * tile.head_dim * 2
    blocks = left // (tile.block_kv * tile.head_dim * tile.cache_dtype.itemsize)
    return {"k": min(4, (blocks + 1) // 2), "v": min(4, blocks // 2)}


def attend(q, cache, out_ref, table, items, num_items, tile: Tile, *, sinks, scales):
    """Attention of the tiles in `items`.

    Args:
      q: [T, N, H].
      cache: K and V pages, [P, K, page, H].
      out_ref: mutable [T, N, H].
      table: i32[S, P].
      items: i32[I, 7], tiles in descending order of their blocks; see the columns above.
      num_items: i32[1], how many of them are real.
      sinks: f32[K, 64] in units of log 2, of which the first G are those of a KV head's query heads, or None.
      scales: f32[2, K] of keys and values, or None.
    """
    k_pages, v_pages = cache

    def prefill_attention(*refs, **scratch):
        _kernel(refs, scratch, tile, k_pages.shape[1])

    kernel = plgpu.kernel(
        prefill_attention,
        grid=(max(common.num_sms() // CLUSTER, 1),),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=warpgroups(tile.head_dim) + 1,
        thread_name="wg",
        scratch_types=_scratch(tile),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    optional = (x for x in (scales, sinks) if x is not None)
    kernel(q, k_pages, v_pages, table, items, num_items, *optional, out_ref)


def _scratch(tile: Tile) -> dict:
    stages, wgs = num_stages(tile), warpgroups(tile.head_dim)
    if stages["v"] < 1:
        raise NotImplementedError(f"head_dim {tile.head_dim}: no room for a block of keys in shared memory")
    rows, block = (wgs, ROWS, tile.head_dim), (tile.block_kv, tile.head_dim)
    scratch: dict[str, Any] = {
        "q": tile.smem(rows, tile.dtype),
        "out": plgpu.RefUnion(tile.smem(rows, tile.dtype), plgpu.SMEM(rows, tile.dtype)),
        "q_full": plgpu.Barrier(num_barriers=wgs),
        "q_free": plgpu.Barrier(num_barriers=wgs),
        "turn": plgpu.Barrier(num_barriers=wgs),
        "tail": plgpu.Barrier(num_arrivals=wgs),
    }
    for name, count in stages.items():
        scratch[name] = tile.smem((count, *block), tile.cache_dtype)
        scratch[f"{name}_full"] = plgpu.Barrier(num_arrivals=common.block_copies(tile), num_barriers=count)
        scratch[f"{name}_free"] = plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=wgs, num_barriers=count)
    if tile.queries_in_smem:
        scratch["q_operand"] = tile.smem(rows, tile.compute_dtype)
    if tile.operands_in_smem:
        scratch["p_operand"] = tile.smem((wgs, ROWS, tile.block_kv), tile.compute_dtype)
    if tile.is_narrow:
        scratch["wide"] = tile.smem((wgs, *block), tile.compute_dtype)
    return scratch


def _kernel(refs, scratch, tile: Tile, num_kv_heads: int):
    q_ref, k_ref, v_ref, table_ref, items_ref, num_items_ref, *optional, out_ref = refs
    scales_ref, sinks_ref = common.split_optional(tile, optional)
    wgs = warpgroups(tile.head_dim)
    wg, block = lax.axis_index("wg"), lax.axis_index("block")
    cluster, num_clusters = lax.axis_index("cluster"), lax.axis_size("cluster")
    num_work = num_items_ref[0] * num_kv_heads

    def work(n):
        """The n-th piece of work of this cluster: item and KV head."""
        column = jnp.where(lax.rem(n, I32(2)) == 0, cluster, num_clusters - 1 - cluster)
        index = n * num_clusters + column
        item = jnp.minimum(lax.div(index, I32(num_kv_heads)), items_ref.shape[0] - 1)
        return item, lax.rem(index, I32(num_kv_heads)), index < num_work

    rounds = lax.div(num_work + num_clusters - 1, I32(num_clusters))

    @pl.when(wg < wgs)
    def _():
        if wgs == 2:  # two warpgroups have 255 a thread from the start
            plgpu.set_max_registers(240, action="increase")
        consumer = _Consumer(tile, wg, wgs, block, scratch, scales_ref, sinks_ref, items_ref, out_ref)
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
            plgpu.set_max_registers(24, action="decrease")
        producer = _Producer(tile, wgs, block, scratch, table_ref, items_ref, work, rounds)

        # By single warps: four would do all the arithmetic of a copy four times, beside those that compute.
        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(lambda: producer.bring_blocks("k", k_ref))
            pl.when(warp == 1)(lambda: producer.bring_blocks("v", v_ref))
            pl.when(warp == 2)(lambda: producer.bring_queries(q_ref))


class _Item:
    """A row of `items`, read once: compilers read again after each barrier, and nothing hides a read between tiles."""

    def __init__(self, tile: Tile, items_ref, item):
        self.seq = items_ref[item, SEQ]
        self.first_unit = items_ref[item, FIRST_UNIT]
        self.query_start, self.query_end = items_ref[item, QUERY_START], items_ref[item, QUERY_END]
        self.first_block, self.num_blocks = items_ref[item, FIRST_BLOCK], items_ref[item, NUM_BLOCKS]
        self.kv_len = items_ref[item, KV_LEN]
        self.tile = tile

    def unit(self, nth):
        """First token in the batch, and head of the query group, of the tile's n-th unit."""
        unit, group = self.first_unit + nth, I32(self.tile.group)
        eights = lax.div(self.query_start, I32(ALIGNMENT)) + lax.div(unit, group) * (ROWS // ALIGNMENT)
        return eights * ALIGNMENT, lax.rem(unit, group)


class _Producer:
    """Warps that bring in what a thread block computes with, tile after tile."""

    def __init__(self, tile: Tile, wgs: int, block, scratch, table_ref, items_ref, work, rounds):
        self.tile, self.wgs, self.block, self.scratch = tile, wgs, block, scratch
        self.table_ref, self.items_ref, self.work, self.rounds = table_ref, items_ref, work, rounds

    def bring_queries(self, q_ref):
        tile, wgs, scratch, items_ref = self.tile, self.wgs, self.scratch, self.items_ref

        def one_tile(n, tiles):
            item, head, is_real = self.work(n)

            @pl.when(is_real)
            def _():
                row = _Item(tile, items_ref, item)
                for w in range(wgs):
                    common.wait_when(n > 0, scratch["q_free"].at[w])
                    token, in_group = row.unit(self.block * wgs + w)
                    source = q_ref.at[pl.ds(token, ROWS), head * tile.group + in_group]
                    plgpu.copy_gmem_to_smem(source, scratch["q"].at[w], scratch["q_full"].at[w])

            return tiles + is_real.astype(I32)

        tiles = lax.fori_loop(I32(0), self.rounds, one_tile, I32(0))
        for w in range(wgs):  # every phase of a barrier must be observed
            common.wait_when(tiles > 0, scratch["q_free"].at[w])

    def bring_blocks(self, name: str, pages_ref):
        """Keys or values of the tiles' blocks, each thread block of the cluster its part for all."""
        tile, items_ref = self.tile, self.items_ref
        ring, full, free = (self.scratch[key] for key in (name, f"{name}_full", f"{name}_free"))
        stages = num_stages(tile)[name]

        def one_tile(n, done):
            item, head, is_real = self.work(n)
            row = _Item(tile, items_ref, item)
            seq, first, count = row.seq, row.first_block, jnp.where(is_real, row.num_blocks, 0)
            last_page = lax.div(row.kv_len - 1, I32(tile.page_size))

            def one_block(i, page_ids):
                slot = lax.rem(done + i, I32(stages))
                next_ids = common.block_pages(tile, self.table_ref, seq, last_page, first + i + 1)
                common.wait_when(done + i >= stages, free.at[slot])
                target = ring.at[slot], full.at[slot]
                common.copy_block(tile, pages_ref, *target, page_ids, first + i, head, collective_axes="block")
                return next_ids

            page_ids = common.block_pages(tile, self.table_ref, seq, last_page, first)
            lax.fori_loop(I32(0), count, one_block, page_ids)
            return done + count

        done = lax.fori_loop(I32(0), self.rounds, one_tile, I32(0))
        for i in range(stages):  # every phase of a barrier must be observed
            common.wait_when(i < done, free.at[i])


class _Consumer:
    """A warpgroup that computes one tile after the other, while the kernel is traced."""

    def __init__(self, tile: Tile, wg, wgs: int, block, scratch, scales_ref, sinks_ref, items_ref, out_ref):
        self.tile, self.wg, self.wgs, self.scratch = tile, wg, wgs, scratch
        self.nth = block * wgs + wg
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
        tile, scratch, wg = self.tile, self.scratch, self.wg
        row = _Item(tile, self.items_ref, item)
        first_block, count, kv_len = row.first_block, row.num_blocks, row.kv_len
        behind = kv_len - row.query_end  # from a token's place in the batch to its position
        token, in_group = row.unit(self.nth)
        k_scale, v_scale = (self.scales_ref[i, head] if tile.quantized else 1.0 for i in (0, 1))

        plgpu.barrier_wait(scratch["q_full"].at[wg])
        operand = scratch["q_operand"].at[wg] if tile.queries_in_smem else None
        q = common.query_operand(tile, scratch["q"].at[wg], operand)
        plgpu.barrier_arrive(scratch["q_free"].at[wg])
        q_pos = behind + token + plgpu.broadcasted_iota(I32, (ROWS,), 0, layout=common.row_layout())

        def one_block(i, carry, *, masked: bool):
            k_slot, v_slot = (lax.rem(done + i, I32(num)) for num in num_stages(tile).values())
            first_key = (first_block + i) * tile.block_kv
            k, v = scratch["k"].at[k_slot], scratch["v"].at[v_slot]
            valid = kv_len - first_key
            plgpu.barrier_wait(scratch["k_full"].at[k_slot])
            if tile.is_narrow:
                k = common.widen(tile, k, scratch["wide"].at[wg])
            scores = common.matmul(q, k.transpose((1, 0)))
            self.hand_over()
            plgpu.barrier_arrive(scratch["k_free"].at[k_slot])
            logits, factor = common.to_logits(tile, scores, k_scale)
            if masked:
                logits = common.mask(tile, logits, q_pos, first_key)
            operand = scratch["p_operand"].at[wg] if tile.operands_in_smem else None
            carry, p = common.softmax_step(tile, carry, logits, factor, operand)
            plgpu.barrier_wait(scratch["v_full"].at[v_slot])
            if tile.is_narrow:
                v = common.widen(tile, v, scratch["wide"].at[wg])
            if masked:
                self._zero_tail(v, valid)
            self.take_turn()
            carry = common.add_values(tile, carry, p, v)
            plgpu.barrier_arrive(scratch["v_free"].at[v_slot])
            return carry

        # Blocks that every row of a tile sees whole need no mask. With a window there are few such.
        whole = I32(0)
        if tile.sliding_window is None:
            first = jnp.maximum(row.unit(0)[0], row.query_start)
            whole = lax.div(behind + first + 1, I32(tile.block_kv)) - first_block
            whole = jnp.clip(whole, 0, count)
        self.take_turn()
        carry = common.start(tile)
        if tile.sliding_window is None:
            carry = lax.fori_loop(I32(0), whole, lambda i, c: one_block(i, c, masked=False), carry)
        carry = lax.fori_loop(whole, count, lambda i, c: one_block(i, c, masked=True), carry)
        self.hand_over()
        self._finish(carry, row, token, head, in_group, v_scale)
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

    def _finish(self, carry, row, token, head, in_group, v_scale):
        tile = self.tile
        if self.sinks_ref is not None:
            carry = common.add_sink(carry, self.sinks_ref[head, in_group])
        acc, _, total = carry
        begin = jnp.maximum(row.query_start - token, 0)
        end = jnp.minimum(row.query_end - token, ROWS)
        target = self.out_ref.at[:, head * tile.group + in_group]
        plgpu.wait_smem_to_gmem(0)  # of the tile before
        rows = (acc * across(v_scale / total, acc.shape)).astype(tile.dtype)
        whole, by_row = (ref.at[self.wg] for ref in self.scratch["out"])
        is_whole = end - begin == ROWS

        @pl.when(is_whole)
        def _():
            whole[...] = rows
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(whole, target.at[pl.ds(token, ROWS)])

        @pl.when(jnp.logical_not(is_whole))
        def _():
            by_row[...] = rows
            plgpu.commit_smem()

            def store(i, _):
                plgpu.copy_smem_to_gmem(by_row.at[pl.ds(i, 1)], target.at[pl.ds(token + i, 1)])

            lax.fori_loop(begin, end, store, None)
