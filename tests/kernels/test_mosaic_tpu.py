"""The TPU kernel: in the interpreter, with races detected, against the oracle; and compiled for real TPUs without one.

Run as a script, this file compiles cases ahead of time (see `main`): libtpu reads its settings before jax starts.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxengine.pallas_kernels import ragged_paged_attention as op
from jaxengine.pallas_kernels.ragged_paged_attention import mosaic_tpu, mosaic_tpu_kernel, mosaic_tpu_plan
from jaxengine.pallas_kernels.ragged_paged_attention.cases import BOUNDS, CASES, Case, check, error, make_inputs, oracle

SUPPORTED = [case for case in CASES if "float16" not in (case.dtype, case.cache_dtype)]
BY_NAME = {case.name: case for case in CASES}
# The interpreter needs 3 to 6 s a case, most of it to compile: these are in the default run by other means.
SLOW = {
    "gqa_9_over_3",
    "window",
    "one_decode",
    "no_sequences",
    "decodes",
    "more_decodes_than_a_group",
    "one_prefill",
    "chunk_of_a_long_prompt",
}
SLOW |= {
    "head_dim_96",
    "head_dim_256",
    "pages_of_64",
    "window_of_one",
    "soft_cap",
    "sinks",
    "shared_pages",
    "bfloat16_cache_float32_queries",
}
# More than one row of page ids a sequence, and a window that starts in the second row.
LONG = Case("long", ((1, 2100), (1, 4200), (3, 2300)), num_heads=2, num_kv_heads=1)
# Compiled for a TPU in the default run: odd groups and head dims, a packed cache, and everything else at once.
COMPILED = ("gqa_9_over_3", "mha_head_dim_80", "float8_cache", "everything")


def spec_of(case: Case) -> op.AttentionSpec:
    return op.AttentionSpec(
        case.num_heads, case.num_kv_heads, case.head_dim, case.page_size, case.dtype, case.cache_dtype
    )


def metadata(*fields: Any, max_query_len: int | None = None) -> op.AttentionMetadata:
    return op.AttentionMetadata(*fields, implementation="mosaic_tpu", max_query_len=max_query_len)


def half_width(case: Case) -> int:
    return 64 if case.head_dim <= 64 else -(-case.head_dim // 128) * 128


def to_layout(case: Case, inputs) -> tuple[jax.Array, ...]:
    """Keys and values [P, K, page, H] side by side; lanes of the padding hold 0."""
    padding = ((0, 0),) * 3 + ((0, half_width(case) - case.head_dim),)
    halves = [jnp.pad(jnp.asarray(c).astype(case.cache_dtype), padding) for c in (inputs.k_cache, inputs.v_cache)]
    return (jnp.concatenate(halves, axis=-1),)


def from_layout(case: Case, cache: tuple[jax.Array, ...]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.asarray(cache[0].astype(jnp.float32))
    return rows[..., : case.head_dim], rows[..., half_width(case) :][..., : case.head_dim]


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that the tests' short sequences take many of them."""

    def blocks(num_kv_heads: int, *_) -> mosaic_tpu_plan.Blocks:
        return mosaic_tpu_plan.Blocks(pages=2, chunks=4, rows=32, heads=2 - num_kv_heads % 2)

    monkeypatch.setattr(mosaic_tpu, "heuristic_blocks", blocks)


def run(case: Case, inputs, *, layers: int = 1, planned: bool = False, max_query_len: int | None = None):
    """Calls the op in the interpreter; fails if it finds a race.

    Args:
      layers: the cache gets that many times as many pages, of which the last part is used.
      planned: makes the plan outside of the op.
      max_query_len: of the metadata.

    Returns:
      out of the real rows, and the keys' and values' pages in float32.
    """
    (empty,) = cache = to_layout(case, inputs)
    cache = (jnp.concatenate([jnp.full_like(empty, 1)] * (layers - 1) + [*cache]),)
    fields = (inputs.kv_lens, inputs.query_starts, inputs.page_table, inputs.num_seqs, inputs.num_decodes)
    meta = metadata(*(jnp.asarray(f, jnp.int32) for f in fields), max_query_len=max_query_len)
    optional = {name: getattr(inputs, name) for name in ("sinks", "k_scale", "v_scale")}
    options: dict[str, Any] = {
        "scale": inputs.scale,
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
    } | {name: None if value is None else jnp.asarray(value) for name, value in optional.items()}

    def call(q, k, v, cache, meta):
        if planned:
            meta = op.plan_attention(meta, num_tokens=q.shape[0], num_heads=q.shape[1], cache=cache)
        if layers > 1:
            meta = op.shift_pages(meta, jnp.int32((layers - 1) * empty.shape[0]))
        return op.ragged_paged_attention(q, k, v, cache, meta, **options)

    jitted = jax.jit(call, donate_argnums=3)
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            out, cache = jitted(*(jnp.asarray(x) for x in (inputs.q, inputs.k, inputs.v)), cache, meta)
            out.block_until_ready()
        assert not found_races()
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert out.dtype == inputs.q.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    k_pages, v_pages = from_layout(case, cache)
    start = (layers - 1) * empty.shape[0]
    np.testing.assert_array_equal(k_pages[:start], 1)  # other layers' pages
    return np.asarray(out, np.float64)[: inputs.query_starts[-1]], k_pages[start:], v_pages[start:]


def found_races() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return bool(getattr(getattr(interpret_pallas_call, "races", None), "races_found", False))


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if c.name in SLOW else []) for c in SUPPORTED],
    ids=lambda c: c.name,
)
def test_matches_the_oracle(case: Case, monkeypatch):
    small_blocks(monkeypatch)
    check(case, run)


@pytest.mark.slow
@pytest.mark.parametrize("case", SUPPORTED, ids=lambda c: c.name)
def test_matches_the_oracle_in_blocks_of_the_heuristic(case: Case):
    check(case, run)


def test_several_rows_of_page_ids():
    check(dataclasses.replace(LONG, sliding_window=100), run)


@pytest.mark.slow
def test_several_rows_of_page_ids_from_the_first_on():
    check(LONG, run)


def test_a_plan_made_once_serves_the_layers_of_one_array():
    check(BY_NAME["mixed"], run, layers=2, planned=True)


def test_a_step_of_decodes_alone():
    check(BY_NAME["decodes"], run, max_query_len=1)


def test_no_sequence_at_all():
    inputs = make_inputs(BY_NAME["one_decode"])
    inputs.num_seqs = inputs.num_decodes = 0
    inputs.query_starts[:] = 0
    out, k_pages, v_pages = run(BY_NAME["one_decode"], inputs)
    assert out.shape[0] == 0
    assert np.isnan(k_pages).all()
    assert np.isnan(v_pages).all()


def test_a_mutation_of_the_mask_is_noticed(monkeypatch):
    case = BY_NAME["several_tokens_a_decode"]
    inputs = make_inputs(case)
    original = mosaic_tpu_kernel._mask

    def off_by_one(static, scores, position):
        return original(static, scores, position - 1)

    monkeypatch.setattr(mosaic_tpu_kernel, "_mask", off_by_one)
    got, _, _ = run(case, inputs)
    assert error(got, oracle(case, inputs)[0]) > 1e-2


def test_page_ids_out_of_range_are_harmless():
    """What lies past a sequence's end in the page table is never used."""
    case = BY_NAME["shared_pages"]
    inputs = make_inputs(case)
    want, _, _ = oracle(case, inputs)
    for row, kv_len in zip(inputs.page_table, inputs.kv_lens, strict=True):
        row[-(-kv_len // case.page_size) :] = 2**30
    inputs.page_table[inputs.num_seqs :] = -(2**30)
    got, _, _ = run(case, inputs)
    assert error(got, want) < BOUNDS[case.dtype]


def draw_metadata(rng, num_slots: int, num_tokens: int, width: int, page_size: int) -> op.AttentionMetadata:
    """Metadata of 0 to `num_slots` sequences with 0 to `num_tokens` new tokens each, in numpy."""
    num_seqs = int(rng.integers(0, num_slots + 1))
    bounds = np.sort(rng.integers(0, num_tokens + 1, num_slots + 1))
    starts = bounds - bounds[0]
    starts[num_seqs:] = starts[num_seqs]
    kv_lens = np.full(num_slots, 12345)
    kv_lens[:num_seqs] = np.diff(starts)[:num_seqs] + rng.integers(0, width * page_size - num_tokens, num_seqs)
    table = rng.permutation(num_slots * width).reshape(num_slots, width)
    return metadata(*(np.asarray(x, np.int32) for x in (kv_lens, starts, table, num_seqs, 0)))


def test_plans_hold_every_new_token_once():
    num_slots, num_tokens, page_size, width, group_size, chunks = 7, 120, 32, 9, 3, 2
    plan_step = jax.jit(
        functools.partial(
            mosaic_tpu_plan.plan_step,
            num_tokens=num_tokens,
            group_size=group_size,
            num_pages=num_slots * width,
            page_size=page_size,
            granule=16,
            chunks=chunks,
        )
    )
    per_chunk = mosaic_tpu_plan.tokens_of_chunk(group_size)
    rng = np.random.default_rng(0)
    for _ in range(40):
        meta = draw_metadata(rng, num_slots, num_tokens, width, page_size)
        plan = jax.tree.map(np.asarray, plan_step(meta))
        want_places, want_positions = {}, {}
        for s in range(int(meta.num_seqs)):
            for row in range(meta.query_starts[s], meta.query_starts[s + 1]):
                position = meta.kv_lens[s] - meta.query_starts[s + 1] + row
                want_positions[row] = (s, position)
                want_places[row] = (meta.page_table[s, position // page_size], position % page_size)

        places, positions = {}, {}
        for page, offset, first, end, row in plan.granules.reshape(5, -1).T[: plan.counts[1]]:
            assert 0 <= first < end <= 16
            for slot in range(first, end):
                assert row + slot not in places
                places[row + slot] = (page, offset + slot)
        for seq, row, num_chunks, position, end in plan.units.reshape(5, -1).T[: plan.counts[0]]:
            assert 1 <= num_chunks <= chunks
            assert (num_chunks - 1) * per_chunk < end - position <= num_chunks * per_chunk
            for i in range(end - position):
                assert row + i not in positions
                positions[row + i] = (seq, position + i)
        assert places == want_places
        assert positions == want_positions
        assert list(positions) == sorted(positions)
        assert plan.num_rows == len(positions)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "float16"}, "queries in float16"),
        ({"cache_dtype": "float16"}, "a cache in float16"),
        ({"page_size": 24}, "page_size=24"),
        ({"head_dim": 512}, "head_dim=512"),
        ({"num_heads": 64}, "32 query heads a KV head"),
        ({"num_heads": 64, "num_kv_heads": 64, "head_dim": 256, "page_size": 256}, "pages of 16777216 bytes"),
    ],
)
def test_what_is_unsupported_is_named(change, named):
    spec = dataclasses.replace(op.AttentionSpec(8, 2, 128, 16, "bfloat16", "bfloat16"), **change)
    with pytest.raises(NotImplementedError, match=named):
        op.cache_shapes(spec, 4, "mosaic_tpu")


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 32, 64])
def test_blocks_divide_what_they_must(num_kv_heads, itemsize):
    for page_size in (16, 64, 256):
        for width in (128, 256, 512):
            blocks = mosaic_tpu.heuristic_blocks(num_kv_heads, page_size, width, itemsize)
            assert 128 % blocks.pages == 0
            assert blocks.chunks * 16 % blocks.rows == 0
            assert num_kv_heads % blocks.heads == 0


def test_tuning_files_replace_the_heuristic():
    pages = jnp.zeros((1, 8, 16, 256), jnp.bfloat16)

    def blocks(device_kind: str, max_query_len: int | None) -> mosaic_tpu_plan.Blocks:
        device = jax.sharding.AbstractDevice(device_kind=device_kind, platform="tpu", num_cores=1)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            return mosaic_tpu._blocks(32, pages, max_query_len)

    assert blocks("TPU v6 lite", None) == mosaic_tpu_plan.Blocks(pages=64, chunks=16, rows=256, heads=8)
    assert blocks("TPU of no file", None) == mosaic_tpu.heuristic_blocks(8, 16, 256, 2)
    # Units of one chunk are all that a step of decodes needs.
    assert blocks("TPU of no file", 1).chunks == 1


TUNING = sorted((Path(mosaic_tpu.__file__).parents[1] / "tuning").glob("tpu*/ragged_paged_attention.json"))


@pytest.mark.parametrize("file", TUNING, ids=lambda file: file.parent.name)
def test_tuning_files_hold_possible_blocks(file):
    tuning = json.loads(file.read_text())
    assert set(tuning) == {"source", "blocks"}
    for key, blocks in tuning["blocks"].items():
        num_kv_heads = int(key.split("/")[1].split()[0])
        blocks = mosaic_tpu_plan.Blocks(**blocks)
        assert 128 % blocks.pages == 0
        assert blocks.chunks * 16 % blocks.rows == 0
        assert num_kv_heads % blocks.heads == 0


# Ahead of time


def compile_case(case: Case, topology: str, num_pages: int) -> dict[str, Any]:
    """Compiles a case's shapes for a TPU; returns the compiler's estimates."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = make_inputs(case)
    cache = tuple(array(case.cache_dtype, *s) for s in op.cache_shapes(spec_of(case), num_pages, "mosaic_tpu"))
    fields = (inputs.kv_lens, inputs.query_starts, inputs.page_table, np.int32(0), np.int32(0))
    meta = metadata(*(array("int32", *f.shape) for f in fields))
    optional = {name: getattr(inputs, name) for name in ("sinks", "k_scale", "v_scale")}
    optional = {name: array("float32", *value.shape) for name, value in optional.items() if value is not None}
    call = functools.partial(
        op.ragged_paged_attention, scale=inputs.scale, sliding_window=case.sliding_window, soft_cap=case.soft_cap
    )
    new = [array(case.dtype, *x.shape) for x in (inputs.q, inputs.k, inputs.v)]
    start = time.monotonic()
    compiled = jax.jit(call, donate_argnums=3).lower(*new, cache, meta, **optional).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    assert memory is not None
    seconds = cost.get("optimal_seconds", -1)  # less than 0 where an operation has no estimate
    return {
        "case": case.name,
        "cache_bytes": sum(c.size * c.dtype.itemsize for c in cache),
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "estimated_us": 1e6 * seconds if seconds > 0 else None,
        "compile_s": time.monotonic() - start,
    }


def real_case() -> Case:
    """Llama 3 8B: 24 decodes at 2047 tokens, and a chunk of 256 tokens."""
    shape = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "cache_dtype": "bfloat16"}
    return Case("llama3_8b", ((1, 2047),) * 24 + ((256, 1024),), **shape)


def main(topology: str, names: list[str]) -> None:
    """Compiles cases for `topology`, and prints a line of JSON for each."""
    for name in names:
        case = real_case() if name == "llama3_8b" else BY_NAME[name]
        print(json.dumps(compile_case(case, topology, 2**14)), flush=True)


def compile_for(compile_for_tpu, topology: str, names, record_property) -> None:
    lines = compile_for_tpu(__file__, topology, *names)
    assert [line["case"] for line in lines] == list(names)
    for line in lines:
        print(topology, line)
        record_property(f"{topology} {line['case']}", line)
        # In place: the donated cache is the result, and no copy of it is among the temporaries.
        assert line["alias_bytes"] == line["cache_bytes"]
        assert line["temp_bytes"] < line["cache_bytes"] / 10


def test_compiles_for_a_tpu_in_place(compile_for_tpu, record_property):
    compile_for(compile_for_tpu, "v6e:2x2", [*COMPILED, "llama3_8b"], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_compiles_for_other_tpus_in_place(compile_for_tpu, topology, record_property):
    compile_for(compile_for_tpu, topology, [*COMPILED, "int8_cache", "bfloat16", "llama3_8b"], record_property)


@pytest.mark.slow
def test_every_case_compiles_for_a_tpu(compile_for_tpu, record_property):
    compile_for(compile_for_tpu, "v6e:2x2", [case.name for case in SUPPORTED], record_property)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
