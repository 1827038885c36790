"""What matrices are held in, and products with matrices of another dtype than the activations'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.models.layers.dense import CONVERTED_BYTES, matmul
from jaxengine.runner import platform
from jaxengine.runner.platform import resolve_dtypes

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what CPUs do")


@on_cpu
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_cpus_hold_16_bit_matrices_as_they_are_where_layers_run_in_a_loop(dtype, monkeypatch):
    monkeypatch.setattr(platform, "cpu_has_bfloat16", lambda: False)
    for stored in ("bfloat16", "float16"):
        assert resolve_dtypes(dtype, "auto", stored, is_loop=True)[:2] == ("float32", stored)
        assert resolve_dtypes(dtype, "auto", stored, is_loop=False)[:2] == ("float32", "float32")
    assert resolve_dtypes(dtype, "auto", "float32", is_loop=True)[:2] == ("float32", "float32")


def test_other_dtypes_are_those_of_the_matrices_too():
    assert resolve_dtypes("bfloat16", "auto", "float16", is_loop=True) == ("bfloat16",) * 3


@on_cpu
def test_cpus_that_multiply_bfloat16_run_bfloat16_checkpoints_in_it(monkeypatch):
    monkeypatch.setattr(platform, "cpu_has_bfloat16", lambda: True)
    assert resolve_dtypes("auto", "auto", "bfloat16", is_loop=True) == ("bfloat16",) * 3
    assert resolve_dtypes("auto", "auto", "float16", is_loop=True)[:2] == ("float32", "float16")
    assert resolve_dtypes("float32", "auto", "bfloat16", is_loop=True)[:2] == ("float32", "bfloat16")


@pytest.mark.parametrize("num_extra", [-5, 0, 7])
def test_a_large_matrix_is_converted_in_blocks(num_extra):
    dim = 256
    num_rows = 2 * CONVERTED_BYTES // (4 * dim) + num_extra  # two blocks, or a third that overlaps the second
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(num_rows, dim)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(3, dim)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(jax.jit(matmul)(x, weight), expected, atol=1e-3)


@on_cpu
@pytest.mark.parametrize("dim", [256, 300, 1600])  # whole chunks; a last one that overlaps; wider ones
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_matrix_is_converted_in_registers_for_one_row(dim, shape, dtype):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(40, dim)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(*shape, dim)), dtype)
    product = jax.jit(lambda x, weight: matmul(x, weight, jnp.float32)).lower(x, weight).compile()
    assert product(x, weight).shape == (*shape, 40)
    np.testing.assert_allclose(
        product(x, weight), np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T, atol=1e-4
    )
    program = product.as_text() or ""
    assert " dot(" not in program
    assert not [line for line in program.splitlines() if f"= f32[40,{dim}]" in line and " fusion(" in line]


@on_cpu
@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 5)])
@pytest.mark.parametrize("out_dtype", [None, jnp.bfloat16])
def test_few_rows_of_float32_come_second(shape, out_dtype):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(40, 64)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(*shape, 64)), jnp.float32)
    product = jax.jit(lambda x, weight: matmul(x, weight, out_dtype)).lower(x, weight).compile()
    got = product(x, weight)
    assert got.shape == (*shape, 40)
    assert got.dtype == (out_dtype or jnp.float32)
    expected = np.asarray(x) @ np.asarray(weight).T
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=1e-2 if out_dtype else 1e-5, atol=1e-4)
    assert "[40,5]" in (product.as_text() or "")
