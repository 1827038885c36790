"""Speed of ragged paged attention: `python -m jaxengine.pallas_kernels.ragged_paged_attention.bench [--json FILE]`.

Times one call of the op in a loop on the device, the write of the new keys and values included but where a case says
no. Bytes are what must move: keys and values in use, queries and outputs, once. Beside it stand, from the same run, a
large copy, a large matmul, cuDNN (which wants dense keys, or a pool of pages of its own, and writes none) and the
reference in plain JAX.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxengine.pallas_kernels import ragged_paged_attention as op

QUEUED = 5  # calls of a timed run that the host may prepare ahead of the device


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """`seqs` holds (new tokens, context before them, how many such sequences), decodes first.

    The reference is timed where `has_reference` says so: it is slow, and takes long to compile. Without `writes`, new
    keys and values are in their pages already, as in the engine's steps of models with rotary embeddings.
    """

    name: str
    seqs: tuple[tuple[int, int, int], ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    cache_dtype: str = "bfloat16"
    sliding_window: int | None = None
    has_reference: bool = False
    writes: bool = True

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """New tokens of each sequence, and those before them."""
        return [(new, old) for new, old, count in self.seqs for _ in range(count)]

    @property
    def num_bytes(self) -> int:
        """Keys and values in use, once; queries and outputs."""
        itemsize = jnp.dtype(self.cache_dtype).itemsize
        window = self.sliding_window
        tokens = sum(new + (old if window is None else min(old, window)) for new, old in self.lengths)
        rows = sum(new for new, _ in self.lengths)
        return 2 * tokens * self.num_kv_heads * self.head_dim * itemsize + 2 * 2 * rows * self.num_heads * self.head_dim

    @property
    def num_flops(self) -> int:
        """Of both products, for the keys that each row sees."""
        window = self.sliding_window or 1 << 40
        seen = sum(min(old + i + 1, window) for new, old in self.lengths for i in range(new))
        return 4 * seen * self.num_heads * self.head_dim


CASES = (
    BenchCase("decode 64 x 2048, page 16", ((1, 2047, 64),), has_reference=True),
    BenchCase("decode 64 x 2048, page 64", ((1, 2047, 64),), page_size=64),
    BenchCase("decode 8 x 16384", ((1, 16383, 8),)),
    BenchCase("decode 1 x 1024", ((1, 1023, 1),)),
    BenchCase("decode 16 x 1024", ((1, 1023, 16),)),
    BenchCase("decode ragged 64 x 64..4096", tuple((1, 64 * (i + 1) - 1, 1) for i in range(64))),
    BenchCase("decode 256 x 1024, H=64", ((1, 1023, 256),), head_dim=64),
    BenchCase("decode 64 x 2048, 16/8 heads", ((1, 2047, 64),), num_heads=16),
    BenchCase("4 tokens a decode 64 x 2048", ((4, 2044, 64),)),
    BenchCase("window 1024, decode 64 x 4096", ((1, 4095, 64),), sliding_window=1024),
    BenchCase("decode 64 x 2048, float8 cache", ((1, 2047, 64),), cache_dtype="float8_e4m3fn"),
    BenchCase("decode 64 x 2048, int8 cache", ((1, 2047, 64),), cache_dtype="int8"),
    BenchCase("prefill 4 x 4096", ((4096, 0, 4),), has_reference=True),
    BenchCase("prefill 4 x 4096, page 64", ((4096, 0, 4),), page_size=64),
    BenchCase("prefill 4 x 4096, no write", ((4096, 0, 4),), writes=False),
    BenchCase("prefill 4 x 4096, page 64, no write", ((4096, 0, 4),), page_size=64, writes=False),
    BenchCase("prefill 16 x 1024", ((1024, 0, 16),)),
    BenchCase("prefill 16 x 1024, no write", ((1024, 0, 16),), writes=False),
    BenchCase("prefill 4 x 4096, H=64", ((4096, 0, 4),), head_dim=64),
    BenchCase("prefill 2048 of 8192", ((2048, 6144, 1),)),
    BenchCase("mixed: 60 decodes x 2048", ((1, 2047, 60),)),
    BenchCase("mixed: a chunk of 2048", ((2048, 0, 1),)),
    BenchCase("mixed: both", ((1, 2047, 60), (2048, 0, 1)), has_reference=True),
)


def make_arguments(case: BenchCase, implementation: str, seed: int = 0):
    """Random queries, keys, values, cache and metadata of a case; pages in random order."""
    spec = op.AttentionSpec(
        case.num_heads, case.num_kv_heads, case.head_dim, case.page_size, "bfloat16", case.cache_dtype
    )
    rng = np.random.default_rng(seed)
    lens = np.array([new + old for new, old in case.lengths], np.int32)
    pages = -(-lens // case.page_size)
    table = np.zeros((len(lens), pages.max()), np.int32)
    ids = rng.permutation(pages.sum())
    for i, (end, count) in enumerate(zip(np.cumsum(pages), pages, strict=True)):
        table[i, :count] = ids[end - count : end]
    starts = np.cumsum([0] + [new for new, _ in case.lengths]).astype(np.int32)
    meta = op.AttentionMetadata(
        jnp.asarray(lens),
        jnp.asarray(starts),
        jnp.asarray(table),
        jnp.int32(len(lens)),
        jnp.int32(sum(new == 1 for new, _ in case.lengths)),
        implementation=implementation,
        max_query_len=max(new for new, _ in case.lengths),
    )
    keys = iter([jax.random.fold_in(jax.random.key(seed), i) for i in range(8)])
    num_tokens = int(starts[-1])

    def draw(heads: int) -> jax.Array:
        return jax.random.normal(next(keys), (num_tokens, heads, case.head_dim), jnp.bfloat16)

    def fill(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        values = jax.random.normal(key, shape, jnp.bfloat16)
        return (values * 30).astype(jnp.int8) if case.cache_dtype == "int8" else values.astype(case.cache_dtype)

    shapes = op.cache_shapes(spec, int(pages.sum()), implementation)
    cache = tuple(jax.jit(fill, static_argnums=1)(next(keys), shape) for shape in shapes)
    return draw(case.num_heads), draw(case.num_kv_heads), draw(case.num_kv_heads), cache, meta


def seconds(function: Callable, *args: Any, inner: int, repeats: int, queued: int = QUEUED) -> float:
    """Median time of one of `inner` calls in a compiled function that makes them; its first argument is donated.

    Each timed run queues several calls of the function, so that the host prepares the next while the device works.
    """
    carry, rest = args[0], args[1:]
    carry = jax.block_until_ready(function(carry, *rest))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(queued):
            carry = function(carry, *rest)
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - begin) / inner / queued)
    return statistics.median(times)


def repeat(step: Callable, inner: int) -> Callable:
    """`step(carry, *rest) -> carry`, `inner` times in one compiled call, unrolled: a loop costs some 10 us a turn."""
    step = jax.jit(step)

    def run(carry, *rest):
        for _ in range(inner):
            carry = step(carry, *rest)
        return carry

    return jax.jit(run, donate_argnums=0)


def time_op(case: BenchCase, implementation: str, *, inner: int, repeats: int, queued: int = QUEUED) -> float:
    """Seconds of one call of the op; the plan is made once, as in a step of many layers."""
    q, k, v, cache, meta = make_arguments(case, implementation)
    options: dict[str, Any] = {"scale": case.head_dim**-0.5, "sliding_window": case.sliding_window}
    if case.cache_dtype != "bfloat16":
        options |= {"k_scale": jnp.full(case.num_kv_heads, 0.03), "v_scale": jnp.full(case.num_kv_heads, 0.03)}

    def step(carry, k, v, meta):
        q, cache = carry  # each call's output is the next one's queries, so that none is dropped
        k, v = (k, v) if case.writes else (None, None)
        return op.ragged_paged_attention(q, k, v, cache, meta, **options)

    plan = jax.jit(
        lambda meta, cache: op.plan_attention(
            meta,
            num_tokens=q.shape[0],
            num_heads=case.num_heads,
            cache=cache,
            sliding_window=case.sliding_window,
        )
    )
    meta = plan(meta, cache) if implementation != "reference" else meta
    return seconds(repeat(step, inner), (q, cache), k, v, meta, inner=inner, repeats=repeats, queued=queued)


def time_cudnn(case: BenchCase, *, inner: int, repeats: int) -> float | None:
    """Seconds of cuDNN's attention on the same lengths, where it can: equal lengths, all decodes or no context."""
    kinds = set(case.lengths)
    if len(kinds) != 1 or case.sliding_window or case.cache_dtype != "bfloat16":
        return None
    ((new, old),) = kinds
    batch = len(case.lengths)
    if new > 1 and old:
        return None
    keys = iter([jax.random.fold_in(jax.random.key(1), i) for i in range(4)])
    length = new + old
    q = jax.random.normal(next(keys), (batch, new, case.num_heads, case.head_dim), jnp.bfloat16)
    if new > 1:
        k, v = (
            jax.random.normal(next(keys), (batch, length, case.num_kv_heads, case.head_dim), jnp.bfloat16)
            for _ in range(2)
        )
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return seconds(repeat(attend, inner), q, k, v, inner=inner, repeats=repeats)
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    pages = length // case.page_size
    shape = (batch * pages, case.page_size, case.num_kv_heads, case.head_dim)
    k, v = (jax.random.normal(next(keys), shape, jnp.bfloat16) for _ in range(2))
    table = jax.random.permutation(next(keys), batch * pages).reshape(batch, 1, pages, 1).astype(jnp.int32)
    ones, lens = jnp.ones(batch, jnp.int32), jnp.full(batch, length, jnp.int32)

    def attend(q, k, v, table):
        return paged_attention(q, k, v, ones, lens, table, table, scale=case.head_dim**-0.5, mask_type=MaskType.PADDING)

    return seconds(repeat(attend, inner), q, k, v, table, inner=inner, repeats=repeats)


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read and written, of a large copy."""
    n = 1 << 29
    step = repeat(lambda x, a: lax.optimization_barrier(a + x), 10)
    x, a = (jax.random.normal(jax.random.key(i), (n,), jnp.bfloat16) for i in range(2))
    return 3 * 2 * n / seconds(step, x, a, inner=10, repeats=repeats)


def matmul_rate(repeats: int) -> float:
    """Operations per second of a large bfloat16 matmul."""
    n = 8192
    x, w = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) / n**0.5 for i in range(2))
    return 2 * n**3 / seconds(repeat(lambda x, w: x @ w, 10), x, w, inner=10, repeats=repeats)


def measure(case: BenchCase, implementation: str, *, inner: int, repeats: int, reference: bool) -> dict[str, Any]:
    """One row of the table; an error stands in its place where a time would."""
    row: dict[str, Any] = {"case": case.name, "bytes": case.num_bytes, "flops": case.num_flops}
    runs: dict[str, Callable] = {
        "seconds": lambda: time_op(case, implementation, inner=inner, repeats=repeats),
        "cudnn_seconds": lambda: time_cudnn(case, inner=inner, repeats=repeats),
    }
    if reference and case.has_reference:
        runs["reference_seconds"] = lambda: time_op(case, "reference", inner=1, repeats=1, queued=1)
    for name, run in runs.items():
        try:
            row[name] = run()
        except Exception as error:  # one case that fails must not take the table with it
            row[name] = None
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def print_row(row: dict[str, Any], bandwidth: float, rate: float) -> None:
    """Prints a case's figures as a line of the table."""

    def microseconds(name: str) -> str:
        value = row.get(name)
        return f"{value * 1e6:9.1f}" if value else f"{'-':>9}"

    line = f"{row['case']:<36} {microseconds('seconds')}"
    if row.get("seconds"):
        moved, done = row["bytes"] / row["seconds"], row["flops"] / row["seconds"]
        line += f" {moved / 1e9:7.0f} {moved / bandwidth:6.0%} {done / 1e12:8.1f} {done / rate:6.0%}"
    else:
        line += " " * 31
    print(f"{line} {microseconds('cudnn_seconds')} {microseconds('reference_seconds')}", flush=True)
    for name, error in row.get("errors", {}).items():
        print(f"    {name}: {error}", flush=True)


def main() -> None:
    """Runs the cases that the arguments choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--implementation", default=None, help="default: the platform's kernel")
    parser.add_argument("--inner", type=int, default=20, help="calls in one timed run")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs, of which the median counts")
    parser.add_argument("--no-reference", action="store_true", help="skip the reference, which is slow")
    args = parser.parse_args()
    spec = op.AttentionSpec(32, 8, 128, 16, "bfloat16", "bfloat16")
    implementation = args.implementation or op.choose_implementation(spec)
    device = jax.devices()[0]
    bandwidth, rate = copy_bandwidth(args.repeats), matmul_rate(args.repeats)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(f"{implementation} on {device.device_kind}, jax {jax.__version__}, {today}")
    print(f"copy {bandwidth / 1e9:.0f} GB/s, matmul {rate / 1e12:.0f} TFLOP/s")
    print(f"{'case':<36} {'us':>9} {'GB/s':>7} {'copy':>6} {'TFLOP/s':>8} {'matmul':>6} {'cuDNN us':>9} {'ref us':>9}")
    rows = []
    for case in CASES:
        if args.only in case.name and (case.writes or implementation == "mosaic_gpu"):
            row = measure(case, implementation, inner=args.inner, repeats=args.repeats, reference=not args.no_reference)
            print_row(row, bandwidth, rate)
            rows.append(row)
    if args.json:
        result = {
            "implementation": implementation,
            "device": device.device_kind,
            "jax": jax.__version__,
            "date": today,
            "copy_bytes_per_second": bandwidth,
            "matmul_flops_per_second": rate,
            "rows": rows,
        }
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
