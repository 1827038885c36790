"""What matrices are held in, and products with matrices of another dtype than the activations'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.models.layers.linear import CONVERTED_BYTES, matmul
from jaxengine.runner.platform import resolve_dtypes

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what CPUs do")


@on_cpu
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_cpus_hold_16_bit_matrices_as_they_are_where_layers_run_in_a_loop(dtype):
    for stored in ("bfloat16", "float16"):
        assert resolve_dtypes(dtype, "auto", stored, is_loop=True)[:2] == ("float32", stored)
        assert resolve_dtypes(dtype, "auto", stored, is_loop=False)[:2] == ("float32", "float32")
    assert resolve_dtypes(dtype, "auto", "float32", is_loop=True)[:2] == ("float32", "float32")


def test_other_dtypes_are_those_of_the_matrices_too():
    assert resolve_dtypes("bfloat16", "auto", "float16", is_loop=True) == ("bfloat16",) * 3


@pytest.mark.parametrize("num_extra", [-5, 0, 7])
def test_a_large_matrix_is_converted_in_blocks(num_extra):
    dim = 256
    num_rows = 2 * CONVERTED_BYTES // (4 * dim) + num_extra  # two blocks, or a third that overlaps the second
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(num_rows, dim)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(3, dim)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(jax.jit(matmul)(x, weight), expected, atol=1e-3)
