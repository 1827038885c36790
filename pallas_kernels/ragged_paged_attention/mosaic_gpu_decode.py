"""Decodes on Hopper: sequences whose new tokens fit one tile of 64 rows.

Reading the cache is what takes time, so the blocks of keys of all sequences are laid end to end and cut into equal
runs, one for each thread block (the idea of Stream-K, arXiv 2301.03598): all finish together, whatever the lengths. A
warpgroup brings pages in by TMA, some blocks ahead; each of the others owns one KV head. A sequence that lies in one
run is finished there; pieces of the others go to scratch memory, and a second, small kernel merges them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu_common as common
from jaxengine.pallas_kernels.ragged_paged_attention.mosaic_gpu_common import F32, I32, ROWS, Tile, across

# Columns of `seqs`.
SEQ, BEGIN, END, FIRST_BLOCK, KV_LEN, FIRST_TOKEN, NUM_TOKENS = range(7)
# Columns of `runs`.
RUN_BEGIN, RUN_END, FIRST_SEQ, LAST_SEQ, MERGE_SEQ, MERGE_END, NUM_ROWS = range(7)

# Pieces that the merge loads at once.
MERGE_UNROLL = 2


def heads_a_block(num_kv_heads: int, head_dim: int) -> int:
    """KV heads that a thread block handles, one for each computing warpgroup."""
    return 2 if num_kv_heads % 2 == 0 and head_dim <= 128 else 1


def rows_in_use(tile: Tile) -> int:
    """Rows of a tile that queries may stand in."""
    return min(ROWS, -(-min(tile.max_query_len, tile.tokens) * tile.group // 8) * 8)


def num_stages(tile: Tile, heads: int) -> int:
    """Blocks of keys and values in flight."""
    rows = 3 if tile.queries_in_smem else 2
    left = common.SMEM_BYTES - heads * ROWS * tile.head_dim * 2 * rows
    if tile.operands_in_smem:
        left -= heads * ROWS * tile.block_kv * 2
    if tile.is_narrow:
        left -= heads * tile.block_kv * tile.head_dim * 2
    return min(6, left // (2 * heads * tile.block_kv * tile.head_dim * tile.cache_dtype.itemsize))


def attend(q, cache, table, seqs, runs, tile: Tile, *, sinks, scales):
    """Attention of the sequences in `seqs`: makes a mutable [T, N, H], with zeros in the rows of the padding.

    Args:
      q: [T, N, H].
      cache: K and V pages, [P, K, page, H].
      table: i32[S, P].
      seqs: i32[S, 7], the sequences to do, end to end; see the columns above.
      runs: i32[R, 7], what each run of blocks covers.
      sinks: f32[K, 64] in units of log 2, by row of a tile, or None.
      scales: f32[2, K] of keys and values, or None.
    """
    k_pages, v_pages = cache
    num_kv_heads, num_runs = k_pages.shape[1], runs.shape[0]
    heads = heads_a_block(num_kv_heads, tile.head_dim)
    stages = num_stages(tile, heads)
    pieces = (num_runs, 2, num_kv_heads, ROWS)

    def decode_attention(*refs, **scratch):
        _kernel(refs, scratch, tile, heads, stages)

    kernel = plgpu.kernel(
        decode_attention,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, tile.dtype),
            jax.ShapeDtypeStruct((*pieces, tile.head_dim), tile.dtype),
            jax.ShapeDtypeStruct(pieces, F32),
        ),
        grid=(num_kv_heads // heads, num_runs),
        grid_names=("heads", "run"),
        num_threads=heads + 1,
        thread_name="wg",
        scratch_types=_scratch(tile, heads, stages),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    optional = (x for x in (scales, sinks) if x is not None)
    out, piece, lse = kernel(q, k_pages, v_pages, table, seqs, runs, *optional)
    out_ref = jax.new_ref(out)
    _merge(piece, lse, seqs, runs, out_ref, tile)
    return out_ref


def _scratch(tile: Tile, heads: int, stages: int) -> dict:
    rows, block = (heads, ROWS, tile.head_dim), (heads, tile.block_kv, tile.head_dim)
    ring = tile.smem((stages, *block), tile.cache_dtype)
    full = plgpu.Barrier(num_arrivals=common.block_copies(tile) * heads, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=heads, num_barriers=stages)
    scratch = {
        "q_raw": plgpu.SMEM(rows, tile.dtype),
        "out": plgpu.SMEM(rows, tile.dtype),
        "k": ring,
        "v": ring,
        "q_full": plgpu.Barrier(num_arrivals=common.query_copies(tile), num_barriers=heads),
        "k_full": full,
        "v_full": full,
        "k_free": free,
        "v_free": free,
    }
    if tile.queries_in_smem:
        scratch["q_operand"] = tile.smem(rows, tile.compute_dtype)
    if tile.operands_in_smem:
        scratch["p_operand"] = tile.smem((heads, ROWS, tile.block_kv), tile.compute_dtype)
    if tile.is_narrow:
        scratch["wide"] = tile.smem(block, tile.compute_dtype)
    return scratch


def _kernel(refs, scratch, tile: Tile, heads: int, stages: int):
    q_ref, k_ref, v_ref, table_ref, seqs_ref, runs_ref, *optional, out_ref, piece_ref, lse_ref = refs
    scales_ref, sinks_ref = common.split_optional(tile, optional)
    run, group_of_heads, wg = (lax.axis_index(name) for name in ("run", "heads", "wg"))
    run_begin, run_end = runs_ref[run, RUN_BEGIN], runs_ref[run, RUN_END]
    first, last = runs_ref[run, FIRST_SEQ], runs_ref[run, LAST_SEQ]

    def piece_of(seq):
        """The part of a sequence that lies in this run: its first block, and how many."""
        begin = jnp.maximum(seqs_ref[seq, BEGIN], run_begin)
        count = jnp.minimum(seqs_ref[seq, END], run_end) - begin
        return begin - seqs_ref[seq, BEGIN] + seqs_ref[seq, FIRST_BLOCK], count

    @pl.when(wg < heads)
    def _():
        if heads == 2:
            plgpu.set_max_registers(216, action="increase")
        head = group_of_heads * heads + wg
        own = {
            name: scratch[name].at[wg] for name in ("q_raw", "out", "q_operand", "p_operand", "wide") if name in scratch
        }
        out = own["out"]
        k_scale, v_scale = (scales_ref[i, head] if tile.quantized else 1.0 for i in (0, 1))

        def load_queries(seq):
            first_token = seqs_ref[seq, FIRST_TOKEN]
            common.load_queries(tile, q_ref, first_token, head, own["q_raw"], scratch["q_full"].at[wg])

        def one_sequence(seq, done):
            block, count = piece_of(seq)
            kv_len, num_tokens = seqs_ref[seq, KV_LEN], seqs_ref[seq, NUM_TOKENS]
            plgpu.barrier_wait(scratch["q_full"].at[wg])
            q = common.query_operand(tile, own["q_raw"], own.get("q_operand"))
            q_pos = kv_len - num_tokens + common.row_tokens(tile)

            @pl.when(seq + 1 < last)
            def _():
                plgpu.commit_smem()  # all have read the queries: the next ones may come
                load_queries(seq + 1)

            def one_block(i, carry):
                slot = lax.rem(done + i, I32(stages))
                first_key = (block + i) * tile.block_kv
                k, v = scratch["k"].at[slot, wg], scratch["v"].at[slot, wg]
                valid = kv_len - first_key
                plgpu.barrier_wait(scratch["k_full"].at[slot])
                if tile.is_narrow:
                    k = common.widen(tile, k, own["wide"])
                scores = common.matmul(q, k.transpose((1, 0)))
                plgpu.barrier_arrive(scratch["k_free"].at[slot])
                logits, factor = common.to_logits(tile, scores, k_scale)
                logits = common.mask(tile, logits, q_pos, first_key)
                carry, p = common.softmax_step(tile, carry, logits, factor, own.get("p_operand"))
                plgpu.barrier_wait(scratch["v_full"].at[slot])

                if tile.is_narrow:
                    v = common.widen(tile, v, own["wide"])
                pl.when(valid < tile.block_kv)(lambda: common.zero_tail(tile, v, valid))
                carry = common.add_values(tile, carry, p, v)
                plgpu.barrier_arrive(scratch["v_free"].at[slot])
                return carry

            carry = lax.fori_loop(I32(0), count, one_block, common.start(tile))
            is_begun = seqs_ref[seq, BEGIN] >= run_begin
            is_whole = is_begun & (seqs_ref[seq, END] <= run_end)
            if sinks_ref is not None:  # counted once, where the sequence begins
                sink = plgpu.load(sinks_ref.at[head], layout=common.row_layout(), optimized=False)
                carry = common.add_sink(carry, sink + jnp.where(is_begun, 0.0, common.MASKED))
            acc, top, total = carry
            plgpu.wait_smem_to_gmem(0)  # of the sequence before
            out[...] = (acc * across(v_scale / total, acc.shape)).astype(tile.dtype)
            plgpu.commit_smem()

            @pl.when(is_whole)
            def _():
                common.store_rows(tile, out, out_ref, seqs_ref[seq, FIRST_TOKEN], num_tokens, head)

            @pl.when(jnp.logical_not(is_whole))
            def _():
                place = is_begun.astype(I32)
                used = rows_in_use(tile)
                plgpu.copy_smem_to_gmem(out.at[pl.ds(0, used)], piece_ref.at[run, place, head, pl.ds(0, used)])
                lse_ref[run, place, head] = top + jnp.log2(total)

            return done + count

        pl.when(first < last)(lambda: load_queries(first))
        lax.fori_loop(first, last, one_sequence, I32(0))
        plgpu.wait_smem_to_gmem(0)
        _zero_padding(tile, out, out_ref, runs_ref[run, NUM_ROWS] + run, runs_ref.shape[0], head)

    @pl.when(wg == heads)
    def _():
        if heads == 2:
            plgpu.set_max_registers(72, action="decrease")

        def one_sequence(seq, done):
            block, count = piece_of(seq)
            row = seqs_ref[seq, SEQ]
            last_page = lax.div(seqs_ref[seq, KV_LEN] - 1, I32(tile.page_size))

            def one_block(i, page_ids):
                slot = lax.rem(done + i, I32(stages))
                next_ids = common.block_pages(tile, table_ref, row, last_page, block + i + 1)
                for name, pages_ref in (("k", k_ref), ("v", v_ref)):
                    common.wait_when(done + i >= stages, scratch[f"{name}_free"].at[slot])
                    for h in range(heads):
                        target, barrier = scratch[name].at[slot, h], scratch[f"{name}_full"].at[slot]
                        kv_head = group_of_heads * heads + h
                        common.copy_block(tile, pages_ref, target, barrier, page_ids, block + i, kv_head)
                return next_ids

            page_ids = common.block_pages(tile, table_ref, row, last_page, block)
            lax.fori_loop(I32(0), count, one_block, page_ids)
            return done + count

        done = lax.fori_loop(first, last, one_sequence, I32(0))
        for i in range(stages):  # every phase of a barrier must be observed
            common.wait_when(i < done, scratch["k_free"].at[i])
            common.wait_when(i < done, scratch["v_free"].at[i])


def _zero_padding(tile: Tile, zeros, out_ref, first, step: int, head):
    """Clears rows `first`, `first + step`, ... of [T, N, H]."""
    num_rows = out_ref.shape[0]

    @pl.when(first < num_rows)
    def _():
        zeros[...] = plgpu.layout_cast(jnp.zeros(zeros.shape, zeros.dtype), plgpu.Layout.WGMMA)
        plgpu.commit_smem()

        def clear(i, _):
            rows = out_ref.at[first + i * step, pl.ds(head * tile.group, tile.group)]
            plgpu.copy_smem_to_gmem(zeros.at[pl.ds(0, tile.group)], rows)

        lax.fori_loop(I32(0), lax.div(num_rows - first + I32(step - 1), I32(step)), clear, None)
        plgpu.wait_smem_to_gmem(0)


def _merge(piece, lse, seqs, runs, out_ref, tile: Tile):
    """Adds up the pieces of the sequences that lie in several runs."""
    num_runs, _, num_kv_heads, _ = lse.shape
    used = rows_in_use(tile)

    def merge_pieces(piece_ref, lse_ref, seqs_ref, runs_ref, out_ref, raw, pieces, barrier):
        run, head = lax.axis_index("run"), lax.axis_index("head")
        seq = runs_ref[run, MERGE_SEQ]

        @pl.when(seq >= 0)
        def _():
            end = runs_ref[run, MERGE_END]

            def add(i, carry):
                first = run + i * MERGE_UNROLL
                for u in range(MERGE_UNROLL):  # what is past the end comes from the last piece, and has no weight
                    r, place = jnp.minimum(first + u, end - 1), (first + u == run).astype(I32)
                    piece = piece_ref.at[r, place, head, pl.ds(0, used)]
                    plgpu.copy_gmem_to_smem(piece, pieces.at[u, pl.ds(0, used)], barrier)
                plgpu.barrier_wait(barrier)
                acc, top, total = carry
                for u in range(MERGE_UNROLL):
                    r, place = jnp.minimum(first + u, end - 1), (first + u == run).astype(I32)
                    lse = plgpu.load(lse_ref.at[r, place, head], layout=common.row_layout(), optimized=False)
                    lse = lse + jnp.where(first + u < end, 0.0, common.MASKED)
                    rows = plgpu.layout_cast(pieces[u], plgpu.Layout.WGMMA)
                    new_top = jnp.maximum(top, lse)
                    shrink, weight = jnp.exp2(top - new_top), jnp.exp2(lse - new_top)
                    acc = acc * across(shrink, acc.shape) + rows.astype(F32) * across(weight, acc.shape)
                    top, total = new_top, total * shrink + weight
                plgpu.commit_smem()  # all have read the pieces: the next ones may come
                return acc, top, total

            count = lax.div(end - run + I32(MERGE_UNROLL - 1), I32(MERGE_UNROLL))
            acc, _, total = lax.fori_loop(I32(0), count, add, common.start(tile))
            raw[...] = (acc / across(total, acc.shape)).astype(tile.dtype)
            plgpu.commit_smem()
            common.store_rows(tile, raw, out_ref, seqs_ref[seq, FIRST_TOKEN], seqs_ref[seq, NUM_TOKENS], head)
            plgpu.wait_smem_to_gmem(0)

    plgpu.kernel(
        merge_pieces,
        grid=(num_kv_heads, num_runs),
        grid_names=("head", "run"),
        scratch_types=[
            plgpu.SMEM((ROWS, tile.head_dim), tile.dtype),
            plgpu.SMEM((MERGE_UNROLL, ROWS, tile.head_dim), tile.dtype),
            plgpu.Barrier(num_arrivals=MERGE_UNROLL),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(piece, lse, seqs, runs, out_ref)
