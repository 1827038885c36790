"""The GPU kernels: in the interpreter, with races detected, against the oracle; and compiled for a Hopper without one.

Run as a script, this file compiles cases ahead of time (see `main`), where JAX's CUDA plugin is installed.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.pallas_kernels import ragged_paged_attention as op
from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu, mosaic_gpu_common, mosaic_gpu_decode
from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_gpu_prefill as prefill
from jaxengine.pallas_kernels.ragged_paged_attention.cases import BOUNDS, CASES, Case, check, error, make_inputs, oracle

H100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
MESH = jax.sharding.AbstractMesh((), (), abstract_device=H100)
NUM_SMS = 6  # few, so that sequences are split and thread blocks have several tiles


def supported(case: Case) -> Case:
    """The case in dtypes that the kernels take."""
    dtype = "float16" if case.dtype == "float16" else "bfloat16"
    narrow = case.cache_dtype in ("float8_e4m3fn", "int8")
    return dataclasses.replace(case, dtype=dtype, cache_dtype=case.cache_dtype if narrow else dtype)


SUPPORTED = [supported(case) for case in CASES if case.name != "bfloat16_cache_float32_queries"]
BY_NAME = {case.name: case for case in SUPPORTED}
# The interpreter needs 5 to 15 s a case, most of it to compile; the others are marked slow.
DEFAULT = ("mixed", "several_tokens_a_decode", "mha_head_dim_80", "float8_cache", "everything")


def spec_of(case: Case) -> op.AttentionSpec:
    return op.AttentionSpec(
        case.num_heads, case.num_kv_heads, case.head_dim, case.page_size, case.dtype, case.cache_dtype
    )


@pytest.fixture
def run(interpret):
    """Calls the op in the interpreter; returns out of the real rows, and both caches."""
    return functools.partial(call_op, interpret)


def call_op(interpret, case: Case, inputs, *, max_query_len: int | None = None):
    width = op.cache_shapes(spec_of(case), 1, "mosaic_gpu")[0][-1]
    padding = ((0, 0),) * 3 + ((0, width - case.head_dim),)
    cache = tuple(jnp.pad(jnp.asarray(c).astype(case.cache_dtype), padding) for c in (inputs.k_cache, inputs.v_cache))
    numbers: Any = (inputs.kv_lens, inputs.query_starts, inputs.page_table, inputs.num_seqs, inputs.num_decodes)
    meta = op.AttentionMetadata(
        *(jnp.asarray(n, jnp.int32) for n in numbers), implementation="mosaic_gpu", max_query_len=max_query_len
    )
    arrays = {name: getattr(inputs, name) for name in ("sinks", "k_scale", "v_scale")}
    options: dict[str, Any] = {"scale": inputs.scale, "sliding_window": case.sliding_window, "soft_cap": case.soft_cap}
    options |= {name: None if array is None else jnp.asarray(array) for name, array in arrays.items()}
    call = functools.partial(op.ragged_paged_attention, **options)
    out, caches = interpret(call, *(jnp.asarray(x) for x in (inputs.q, inputs.k, inputs.v)), cache, meta)
    assert out.dtype == inputs.q.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    caches = [np.asarray(c, np.float32)[..., : case.head_dim] for c in caches]
    return np.asarray(out, np.float64)[: inputs.query_starts[-1]], *caches


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter needs; few multiprocessors."""
    monkeypatch.setattr(mosaic_gpu, "OPERANDS_IN_SMEM", True)
    monkeypatch.setattr(mosaic_gpu_common, "num_sms", lambda: NUM_SMS)


pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in DEFAULT else [pytest.mark.slow]) for c in SUPPORTED],
    ids=lambda c: c.name,
)
def test_matches_the_oracle(run, case: Case):
    check(case, run)


def test_a_step_of_decodes_alone(run):
    check(BY_NAME["decodes"], run, max_query_len=1)


def test_a_mutation_of_the_mask_is_noticed(run, monkeypatch):
    case = BY_NAME["mixed"]
    inputs = make_inputs(case)
    want, _, _ = oracle(case, inputs)
    original = mosaic_gpu_common.mask
    monkeypatch.setattr(mosaic_gpu_common, "mask", lambda t, x, q_pos, first: original(t, x, q_pos - 1, first))
    got, _, _ = run(case, inputs)
    assert error(got, want) > 2 * BOUNDS[case.dtype]


def draw_metadata(rng, num_slots: int, num_tokens: int) -> op.AttentionMetadata:
    """Random lengths of random sequences; what is past them is junk."""
    num_seqs = int(rng.integers(0, num_slots + 1))
    new = np.where(rng.random(num_seqs) < 0.5, 1, rng.integers(1, 120, num_seqs))
    new = new[: np.searchsorted(np.cumsum(new), num_tokens, side="right")]
    old = rng.integers(0, 700, len(new))
    starts = np.cumsum([0, *new])
    starts = np.concatenate([starts, np.full(num_slots - len(new), starts[-1])])
    lens = np.concatenate([new + old, rng.integers(0, 9999, num_slots - len(new))])
    i32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    table = np.zeros((num_slots, 64))
    return op.AttentionMetadata(i32(lens), i32(starts), i32(table), i32(len(new)), i32(0))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("seed", range(8))
def test_plans_hold_every_block_once(seed, window):
    """Each key that a new token may see is in exactly one run (decodes) or in its tile (chunks)."""
    rng = np.random.default_rng(seed)
    meta = draw_metadata(rng, num_slots=12, num_tokens=512)
    cache = (jax.ShapeDtypeStruct((99, 2, 16, 64), jnp.bfloat16),) * 2
    plan = mosaic_gpu.make_plan(meta, num_tokens=512, num_heads=8, cache=cache, sliding_window=window)
    lens, starts, num_seqs = np.asarray(meta.kv_lens), np.asarray(meta.query_starts), int(meta.num_seqs)
    block, group = mosaic_gpu.decode_block(64), 4
    short = [s for s in range(num_seqs) if starts[s + 1] - starts[s] <= 64 // group]
    seqs, runs = np.asarray(plan.decode_seqs), np.asarray(plan.decode_runs)
    assert list(seqs[: len(short), mosaic_gpu_decode.SEQ]) == short
    seen: dict[int, list[int]] = {s: [] for s in short}
    sizes = []
    for low, high, first, last, *_ in runs:
        sizes.append(high - low)
        for row in seqs[first:last]:
            begin, end = max(row[1], low), min(row[2], high)
            assert begin < end
            seen[row[0]] += range(begin - row[1] + row[3], end - row[1] + row[3])
    if short:
        assert max(sizes) - min(size for size in sizes if size) <= 1
    for s in short:
        first = 0 if window is None else max(lens[s] - (starts[s + 1] - starts[s]) - window + 1, 0) // block
        assert seen[s] == list(range(first, -(-lens[s] // block)))
    # A sequence in several runs is merged by the one where it begins, up to the last that holds a part of it.
    merged = {int(seqs[run[4], 0]): (r, int(run[5])) for r, run in enumerate(runs) if run[4] >= 0}
    for i, s in enumerate(short):
        holders = [r for r, run in enumerate(runs) if run[2] <= i < run[3]]
        assert merged.get(s) == ((holders[0], holders[-1] + 1) if len(holders) > 1 else None)

    items = np.asarray(plan.prefill_items)[: int(plan.num_prefill_items[0])]
    assert (np.diff(items[:, prefill.NUM_BLOCKS]) <= 0).all()
    rows = []  # (token, head of the group)
    for s, first_unit, start, end, first_block, num_blocks, kv_len in items:
        assert (start, end, kv_len) == (starts[s], starts[s + 1], lens[s])
        units = range(first_unit, first_unit + 2 * prefill.CLUSTER)
        begins = [start // 8 * 8 + unit // group * 64 for unit in units]
        rows += [
            (token, unit % group)
            for unit, begin in zip(units, begins, strict=True)
            for token in range(max(begin, start), min(begin + 64, end))
        ]
        first, last = max(begins[0], start), min(begins[-1] + 64, end) - 1  # tokens of the tile
        low = 0 if window is None else max(kv_len - end + first - window + 1, 0)
        assert first_block * 128 <= low < (first_block + 1) * 128
        assert (first_block + num_blocks - 1) * 128 <= kv_len - end + last < (first_block + num_blocks) * 128
    long = [s for s in range(num_seqs) if s not in short]
    assert sorted(rows) == [(t, g) for s in long for t in range(starts[s], starts[s + 1]) for g in range(group)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "float32"}, "queries in float32"),
        ({"cache_dtype": "float32"}, "a cache in float32"),
        ({"head_dim": 288}, "head_dim 288"),
        ({"num_heads": 34, "num_kv_heads": 2}, "34 query heads for 2"),
        ({"page_size": 8}, "page_size 8"),
        ({"cache_dtype": "int8", "num_kv_heads": 1}, "a cache in int8 with 1 KV heads of 64"),
        (
            {"cache_dtype": "float8_e4m3fn", "num_heads": 9, "num_kv_heads": 3},
            "a cache in float8_e4m3fn with 3 KV heads of 64",
        ),
    ],
)
def test_what_is_unsupported_is_named(change, named, caplog):
    spec = op.AttentionSpec(8, 2, 64, 16, "bfloat16", "bfloat16")
    assert op.choose_implementation(spec, "gpu") == "mosaic_gpu"
    bad = dataclasses.replace(spec, **change)
    with pytest.raises(NotImplementedError, match=named):
        op.make_cache(bad, 4, "mosaic_gpu")
    assert op.choose_implementation(bad, "gpu") == "reference"
    assert named in caplog.text
    with pytest.raises(ValueError, match=f"'mosaic_gpu' does not support {named}"):
        op.choose_implementation(bad, "gpu", "mosaic_gpu")
    with pytest.raises(ValueError, match="'mosaic_gpu': does not run on a cpu"):
        op.choose_implementation(spec, "cpu", "mosaic_gpu")


def test_head_dims_are_padded_only_where_tma_needs_it():
    assert [mosaic_gpu.padded_head_dim(h) for h in (16, 64, 80, 96, 128, 256)] == [64, 64, 128, 128, 128, 256]


# H100 SXM as XLA's GpuTargetConfigProto.
TARGET = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0" }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
REAL = Case("llama_8b", ((1, 2047),) * 8, 32, 8, 128, dtype="bfloat16", cache_dtype="bfloat16")
WIDE = dataclasses.replace(REAL, name="head_dim_256", head_dim=256, num_heads=8, num_kv_heads=4)
COMPILED = [REAL, WIDE, *(BY_NAME[n] for n in ("gqa_9_over_3", "mha_head_dim_80", "int8_cache", "everything"))]


def compile_case(case: Case) -> dict[str, Any]:
    """Compiles the op for an H100; returns what the compiler says of memory."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=TARGET)
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(topology.devices), ("x",)), jax.P())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    num_pages, num_slots, num_tokens = 4096, 16, 256
    cache = tuple(
        shape(s, jnp.dtype(case.cache_dtype)) for s in op.cache_shapes(spec_of(case), num_pages, "mosaic_gpu")
    )
    numbers: Any = [shape(s, jnp.int32) for s in ((num_slots,), (num_slots + 1,), (num_slots, 128), (), ())]
    meta = op.AttentionMetadata(*numbers, implementation="mosaic_gpu")
    new = shape((num_tokens, case.num_kv_heads, case.head_dim), jnp.dtype(case.dtype))
    q = shape((num_tokens, case.num_heads, case.head_dim), jnp.dtype(case.dtype))
    arrays: dict[str, Any] = {}
    if case.sinks:
        arrays["sinks"] = shape((case.num_heads,), jnp.float32)
    if case.scales:
        arrays |= {name: shape((case.num_kv_heads,), jnp.float32) for name in ("k_scale", "v_scale")}

    def call(q, k, v, cache, meta, arrays):
        options = {"sliding_window": case.sliding_window, "soft_cap": case.soft_cap}
        return op.ragged_paged_attention(q, k, v, cache, meta, scale=case.head_dim**-0.5, **options, **arrays)

    with jax.sharding.use_abstract_mesh(MESH):
        traced = jax.jit(call, donate_argnums=3).trace(q, new, new, cache, meta, arrays)
        memory = traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    assert memory is not None
    num_bytes = sum(int(np.prod(c.shape)) * c.dtype.itemsize for c in cache)
    return {
        "case": case.name,
        "cache_bytes": num_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def main() -> None:
    """Prints a line of JSON for each case."""
    for case in COMPILED:
        print(json.dumps(compile_case(case)), flush=True)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin[with-cuda] (no GPU)"
)
def test_compiles_for_a_gpu_in_place(record_property):
    """No copy of the cache: the donated pages are the output's, and what else is needed is far smaller."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["case"] for row in rows] == [case.name for case in COMPILED]
    for row in rows:
        record_property(row["case"], row)
        # float8 and 16-bit pages are aliased whole; what is aliased beside them is small.
        assert row["aliased_bytes"] >= row["cache_bytes"]
        assert row["temporary_bytes"] < row["cache_bytes"] / 2


if __name__ == "__main__":
    main()
