"""The reference implementation against a dense float64 oracle, its cost, and its memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.pallas_kernels import ragged_paged_attention as op
from jaxengine.pallas_kernels.ragged_paged_attention import reference
from jaxengine.pallas_kernels.ragged_paged_attention.cases import BOUNDS, CASES, Case, check, error, make_inputs, oracle


def spec_of(case: Case) -> op.AttentionSpec:
    return op.AttentionSpec(
        case.num_heads, case.num_kv_heads, case.head_dim, case.page_size, case.dtype, case.cache_dtype
    )


def run(case: Case, inputs, implementation="reference", **changes):
    """Calls the op on the case's inputs; returns out of the real rows and both caches in float32."""
    cache = tuple(jnp.asarray(c).astype(case.cache_dtype) for c in (inputs.k_cache, inputs.v_cache))
    meta = op.AttentionMetadata(
        kv_lens=jnp.asarray(inputs.kv_lens),
        query_starts=jnp.asarray(inputs.query_starts),
        page_table=jnp.asarray(inputs.page_table),
        num_seqs=jnp.int32(inputs.num_seqs),
        num_decodes=jnp.int32(inputs.num_decodes),
        implementation=implementation,
    )
    options = {
        "scale": inputs.scale,
        "sliding_window": case.sliding_window,
        "soft_cap": case.soft_cap,
        "sinks": None if inputs.sinks is None else jnp.asarray(inputs.sinks),
        "k_scale": None if inputs.k_scale is None else jnp.asarray(inputs.k_scale),
        "v_scale": None if inputs.v_scale is None else jnp.asarray(inputs.v_scale),
    }
    call = jax.jit(functools.partial(op.ragged_paged_attention, **(options | changes)), donate_argnums=3)
    out, (k_pages, v_pages) = call(*(jnp.asarray(x) for x in (inputs.q, inputs.k, inputs.v)), cache, meta)
    rows = inputs.query_starts[-1]
    assert out.dtype == inputs.q.dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    return np.asarray(out, np.float64)[:rows], np.asarray(k_pages, np.float32), np.asarray(v_pages, np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_the_oracle(case: Case):
    check(case, run)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("window", {"sliding_window": 49}),
        ("soft_cap", {"soft_cap": 5.1}),
        ("sinks", {"sinks": None}),
        ("mixed", {"scale": 0.126}),
    ],
)
def test_bounds_notice_a_small_mistake(name, change):
    case = next(c for c in CASES if c.name == name)
    inputs = make_inputs(case)
    want, _, _ = oracle(case, inputs)
    got, _, _ = run(case, inputs, **change)
    assert error(got, want) > 100 * BOUNDS[case.dtype]


def test_a_mutation_of_the_mask_is_noticed(monkeypatch):
    case = next(c for c in CASES if c.name == "mixed")
    inputs = make_inputs(case)
    want, _, _ = oracle(case, inputs)
    original = reference._attend_block

    def off_by_one(carry, q, k, v, q_pos, k_pos, **kwargs):
        return original(carry, q, k, v, q_pos - 1, k_pos, **kwargs)

    monkeypatch.setattr(reference, "_attend_block", off_by_one)
    got, _, _ = run(case, inputs)
    assert error(got, want) > 1e-2


def test_the_cache_is_updated_in_place():
    """No copy of the cache: the donated buffers are the outputs', and temporaries stay far below the cache's size."""
    pages = jax.ShapeDtypeStruct(
        op.cache_shapes(op.AttentionSpec(4, 2, 64, 16, "float32", "float32"), 4096)[0], jnp.float32
    )
    i32: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    meta = op.AttentionMetadata(i32((8,)), i32((9,)), i32((8, 64)), i32(()), i32(()))
    new = jax.ShapeDtypeStruct((32, 2, 64), jnp.float32)
    call = jax.jit(functools.partial(op.ragged_paged_attention, scale=1.0), donate_argnums=3)
    compiled = call.lower(jax.ShapeDtypeStruct((32, 4, 64), jnp.float32), new, new, (pages, pages), meta).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    cache_bytes = 2 * 4096 * 16 * 2 * 64 * 4
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 10


def test_shapes_that_do_not_fit_are_refused():
    case = CASES[0]
    inputs = make_inputs(case)
    inputs.q = inputs.q[:, :3]
    with pytest.raises(ValueError, match="N a multiple of K"):
        run(case, inputs)
    with pytest.raises(ValueError, match="implementation='nope'"):
        run(case, make_inputs(case), implementation="nope")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_a_narrow_cache_holds_its_largest_value_for_what_is_larger(dtype):
    """NaN, which float8_e4m3fn would hold instead, would spoil every later token of the sequence."""
    new = jnp.asarray([1e30, 1e3, 1.0, -1e3, -1e30], jnp.float32)[None, None, :]
    kept = np.asarray(reference.to_cache_dtype(new, jnp.asarray([1e-3]), jnp.dtype(dtype)), np.float32)[0, 0]
    limits = jnp.iinfo(dtype) if dtype == "int8" else jnp.finfo(dtype)
    assert kept[0] == float(limits.max)
    assert kept[-1] == float(limits.min)
    assert np.isfinite(kept).all()
    assert (np.diff(kept) <= 0).all()


def test_bytes_are_those_of_float8():
    """The reference keeps float8_e4m3fn as bytes."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    is_number = np.isfinite(numbers)
    read = np.asarray(reference._to_float32(jnp.arange(256, dtype=jnp.uint8)))
    np.testing.assert_array_equal(read[is_number], numbers[is_number])
    written = reference.to_cache_dtype(jnp.asarray(numbers[is_number])[None, None], None, jnp.dtype("uint8"))
    np.testing.assert_array_equal(np.asarray(written)[0, 0], np.arange(256)[is_number])
