"""Cases of ragged paged attention, and a dense float64 oracle that shares no code with the implementations."""

import dataclasses

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `seqs` holds (new tokens, context before them) of each sequence, decodes first."""

    name: str
    seqs: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    cache_dtype: str = "float32"
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scales: bool = False
    shared_pages: bool = False
    empty_slots: int = 2
    padding_rows: int = 3
    scale: float | None = None


CASES = (
    Case("one_decode", ((1, 0),), empty_slots=0, padding_rows=0),
    Case("no_sequences", ()),  # a data-parallel shard without work
    Case("decodes", ((1, 5), (1, 63), (1, 64), (1, 200), (1, 0))),
    Case("more_decodes_than_a_group", tuple((1, 7 * i) for i in range(21))),
    Case("one_prefill", ((37, 0),)),
    Case("chunk_of_a_long_prompt", ((70, 130),)),
    Case("mixed", ((1, 40), (1, 129), (5, 0), (90, 17), (2, 60))),
    Case("several_tokens_a_decode", ((3, 90), (3, 17), (4, 300))),
    Case("gqa_9_over_3", ((1, 33), (20, 5)), num_heads=9, num_kv_heads=3),
    Case("mha_head_dim_80", ((1, 33), (20, 5)), num_heads=4, num_kv_heads=4, head_dim=80),
    Case("head_dim_96", ((1, 133), (20, 5)), num_heads=8, num_kv_heads=2, head_dim=96),
    Case("head_dim_256", ((1, 133), (50, 5)), num_heads=4, num_kv_heads=2, head_dim=256),
    Case("mqa_16", ((1, 33), (20, 5)), num_heads=16, num_kv_heads=1, head_dim=128),
    Case("pages_of_64", ((1, 150), (70, 10)), page_size=64),
    Case("pages_of_256", ((1, 300), (9, 250)), page_size=256),
    Case("window", ((1, 300), (1, 7), (100, 100)), sliding_window=48),
    Case("window_of_one", ((1, 30), (10, 3)), sliding_window=1),
    Case("soft_cap", ((1, 100), (30, 3)), soft_cap=5.0, scale=1.0),
    Case("sinks", ((1, 100), (30, 3), (1, 0)), sinks=True),
    Case("shared_pages", ((1, 64), (1, 64), (10, 48)), shared_pages=True),
    Case("bfloat16", ((1, 100), (40, 30)), dtype="bfloat16", cache_dtype="bfloat16"),
    Case("bfloat16_cache_float32_queries", ((1, 100), (40, 30)), cache_dtype="bfloat16"),
    Case("float16", ((1, 100), (40, 30)), dtype="float16", cache_dtype="float16"),
    Case("float8_cache", ((1, 100), (40, 30)), cache_dtype="float8_e4m3fn", scales=True),
    Case("int8_cache", ((1, 100), (40, 30)), cache_dtype="int8", scales=True),
    Case("everything", ((1, 99), (33, 70)), sliding_window=50, soft_cap=20.0, sinks=True, num_heads=6),
)

# Relative error allowed, ||out - ref|| / ||ref||: rounding of inputs is in the reference too, so this is the output's.
BOUNDS = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 5e-3}


@dataclasses.dataclass
class Inputs:
    """Arguments of the op, as arrays of NumPy."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_cache: np.ndarray  # [P, K, page, H] float32 values representable in the cache dtype; junk where unused
    v_cache: np.ndarray
    kv_lens: np.ndarray
    query_starts: np.ndarray
    page_table: np.ndarray
    num_seqs: int
    num_decodes: int
    sinks: np.ndarray | None
    k_scale: np.ndarray | None
    v_scale: np.ndarray | None
    scale: float


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draws normal inputs. Every page slot that no sequence owns holds NaN, or 127 in a cache of integers."""
    rng = np.random.default_rng(seed)
    dtype, cache_dtype = (np.dtype(getattr(ml_dtypes, d, d)) for d in (case.dtype, case.cache_dtype))
    num_seqs = len(case.seqs)
    num_slots = num_seqs + case.empty_slots
    lens = [new + old for new, old in case.seqs]
    pages = [-(-n // case.page_size) for n in lens]
    width = max(pages, default=0) + 1
    num_pages = sum(pages) + 5
    ids = rng.permutation(num_pages)
    table = rng.integers(0, num_pages, (num_slots, width)).astype(np.int32)  # junk past the end is allowed
    used = 0
    for s, n in enumerate(pages):
        table[s, :n] = ids[used : used + n]
        used += n
    if case.shared_pages:  # the whole pages of the context before the new tokens are one copy
        shared = min(old for _, old in case.seqs) // case.page_size
        table[:num_seqs, :shared] = table[0, :shared]
    shape = (num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    k_cache, v_cache = (np.full(shape, 127 if cache_dtype.kind == "i" else np.nan, np.float32) for _ in range(2))
    is_drawn = set()
    spread = 40 if cache_dtype.kind == "i" else 1
    for s, (_, old) in enumerate(case.seqs):
        for p in range(old):
            page, offset = table[s, p // case.page_size], p % case.page_size
            if (page, offset) in is_drawn:  # a shared page
                continue
            is_drawn.add((page, offset))
            for cache in (k_cache, v_cache):
                drawn = _cached(spread * rng.normal(size=(case.num_kv_heads, case.head_dim)), cache_dtype)
                cache[page, :, offset] = drawn.astype(np.float32)
    starts = np.cumsum([0] + [new for new, _ in case.seqs])
    rows = int(starts[-1]) + case.padding_rows

    def draw(heads):
        return rng.normal(size=(rows, heads, case.head_dim)).astype(dtype)

    low, high = (0.02, 0.05) if case.cache_dtype == "int8" else (0.5, 2)

    return Inputs(
        q=draw(case.num_heads),
        k=draw(case.num_kv_heads),
        v=draw(case.num_kv_heads),
        k_cache=k_cache,
        v_cache=v_cache,
        kv_lens=np.array(lens + [12345] * case.empty_slots, np.int32),
        query_starts=np.concatenate([starts, np.full(case.empty_slots, starts[-1])]).astype(np.int32),
        page_table=table,
        num_seqs=num_seqs,
        num_decodes=next((i for i, (new, _) in enumerate(case.seqs) if new != 1), num_seqs),
        sinks=rng.normal(size=case.num_heads).astype(np.float32) if case.sinks else None,
        k_scale=rng.uniform(low, high, case.num_kv_heads).astype(np.float32) if case.scales else None,
        v_scale=rng.uniform(low, high, case.num_kv_heads).astype(np.float32) if case.scales else None,
        scale=case.head_dim**-0.5 if case.scale is None else case.scale,
    )


def _cached(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float values as the cache's dtype; integers are rounded, and drawn over their whole range."""
    if dtype.kind == "i":
        return np.clip(np.rint(values), -128, 127).astype(dtype)
    return values.astype(dtype)


def error(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||; 0 for nothing."""
    if not want.size:
        return 0.0
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(case: Case, run, **options) -> None:
    """Fails unless `run(case, inputs, **options)` gives what the oracle does: out within bounds, both caches exactly.

    Where nothing was written, NaN stays NaN.
    """
    inputs = make_inputs(case)
    want, want_k, want_v = oracle(case, inputs)
    got, got_k, got_v = run(case, inputs, **options)
    assert error(got, want) < BOUNDS[case.dtype]
    np.testing.assert_array_equal(got_k, want_k)
    np.testing.assert_array_equal(got_v, want_v)


def oracle(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense attention in float64, one sequence after the other.

    Returns:
      out [T, N, H] of the rows that belong to a sequence, and both caches after the write.
    """
    cache_dtype = np.dtype(getattr(ml_dtypes, case.cache_dtype, case.cache_dtype))
    caches = []
    for cache, new, scales in (
        (inputs.k_cache.copy(), inputs.k, inputs.k_scale),
        (inputs.v_cache.copy(), inputs.v, inputs.v_scale),
    ):
        values = new.astype(np.float32) / (1 if scales is None else scales[:, None])
        values = _cached(values, cache_dtype).astype(np.float32)
        for s in range(inputs.num_seqs):
            start, end = inputs.query_starts[s], inputs.query_starts[s + 1]
            for row in range(start, end):
                p = inputs.kv_lens[s] - end + row
                cache[inputs.page_table[s, p // case.page_size], :, p % case.page_size] = values[row]
        caches.append(cache)
    out = np.zeros(inputs.q.shape, np.float64)
    group = case.num_heads // case.num_kv_heads
    for s in range(inputs.num_seqs):
        start, end, n = inputs.query_starts[s], inputs.query_starts[s + 1], inputs.kv_lens[s]
        dense = []
        for cache, scales in zip(caches, (inputs.k_scale, inputs.v_scale), strict=True):
            flat = np.concatenate([cache[p] for p in inputs.page_table[s]], axis=1)[:, :n].astype(np.float64)
            dense.append(flat if scales is None else flat * scales[:, None, None])  # [K, n, H]
        for row in range(start, end):
            position = n - end + row
            first = 0 if case.sliding_window is None else max(position - case.sliding_window + 1, 0)
            for head in range(case.num_heads):
                keys, values = (d[head // group, first : position + 1] for d in dense)
                logits = keys @ inputs.q[row, head].astype(np.float64) * inputs.scale
                if case.soft_cap is not None:
                    logits = case.soft_cap * np.tanh(logits / case.soft_cap)
                sink = -np.inf if inputs.sinks is None else float(inputs.sinks[head])
                top = max(logits.max(), sink)
                weights = np.exp(logits - top)
                out[row, head] = weights @ values / (weights.sum() + np.exp(sink - top))
    return out[: inputs.query_starts[-1]], caches[0], caches[1]
