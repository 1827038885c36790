"""Norm, rotation and cache write in one GPU kernel, in the interpreter with races detected, against plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.models.layers.rope import apply_rope
from jaxengine.pallas_kernels import ragged_paged_attention as attention
from jaxengine.pallas_kernels.ragged_paged_attention import reference
from jaxengine.pallas_kernels.rope_and_write import has_kernel, mosaic_gpu, rope_and_write

PAGE_SIZE, NUM_PAGES = 16, 9


def expected(qkv, cos, sin, cache, page, offset, num_heads: int, norm_weights, eps: float, scales=(None, None)):
    """The same in plain JAX."""
    num_kv_heads, head_dim = cache[0].shape[1::2]
    heads = qkv.reshape(qkv.shape[0], -1, head_dim)
    q, k, v = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    if norm_weights is not None:
        wide = (x.astype(jnp.float32) for x in (q, k))
        q, k = (
            (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * (w.astype(jnp.float32) + 1)).astype(qkv.dtype)
            for x, w in zip(wide, norm_weights, strict=True)
        )
    q, k = apply_rope(q, (cos, sin)), apply_rope(k, (cos, sin))
    return q, reference.write(k, v, cache, page, offset, *scales)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "norm"),
    [(1, 2, 1, 128, False), (16, 4, 2, 128, True), (6, 2, 1, 128, True), (32, 2, 2, 128, False)],
)
def test_matches_plain_jax(interpret, num_tokens, num_heads, num_kv_heads, head_dim, norm):
    rng = np.random.default_rng(num_tokens)

    def draw(*shape: int, dtype: str = "bfloat16") -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    qkv = draw(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    angles = rng.normal(size=(num_tokens, head_dim // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    cache = tuple(draw(NUM_PAGES, num_kv_heads, PAGE_SIZE, head_dim) for _ in range(2))
    slots = rng.permutation(NUM_PAGES * PAGE_SIZE)[:num_tokens]
    page = jnp.asarray(np.where(rng.random(num_tokens) < 0.8, slots // PAGE_SIZE, NUM_PAGES), jnp.int32)  # some dropped
    offset = jnp.asarray(slots % PAGE_SIZE, jnp.int32)
    weights = (draw(head_dim), draw(head_dim)) if norm else None
    want_q, want_cache = expected(qkv, cos, sin, cache, page, offset, num_heads, weights, 1e-5)

    run = functools.partial(mosaic_gpu.rope_and_write, norm_weights=weights, norm_offset=1.0, norm_eps=1e-5)
    got_q, got_cache = interpret(run, qkv, cos, sin, cache, page, offset)
    for got, want in zip((got_q, *got_cache), (want_q, *want_cache), strict=True):
        # Equal but for a rounding to bfloat16 where a multiply-add was fused.
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(got_cache[1], np.float32), np.asarray(want_cache[1], np.float32))


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "norm", "cache_dtype", "has_scales"),
    [
        (4, 2, 1, False, "float8_e4m3fn", True),
        (6, 4, 2, True, "float8_e4m3fn", False),
        (8, 2, 2, True, "int8", True),
        (1, 2, 1, False, "int8", True),
    ],
)
def test_writes_a_narrow_cache(interpret, num_tokens, num_heads, num_kv_heads, norm, cache_dtype, has_scales):
    """Scaled for each head, clipped, and rounded as the reference does; what other slots hold stays."""
    rng = np.random.default_rng(num_tokens)
    head_dim, slots = 128, rng.permutation(NUM_PAGES * PAGE_SIZE)[:num_tokens]
    qkv = jnp.asarray(rng.normal(size=(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)), "bfloat16")
    qkv = qkv.at[:, ::7].multiply(1000)  # far beyond what a scaled number may be
    angles = rng.normal(size=(num_tokens, head_dim // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    shape = (NUM_PAGES, num_kv_heads, PAGE_SIZE, head_dim)
    cache = tuple(jnp.asarray(rng.integers(-9, 9, size=shape), cache_dtype) for _ in range(2))
    page, offset = (jnp.asarray(x, jnp.int32) for x in (slots // PAGE_SIZE, slots % PAGE_SIZE))
    weights = tuple(jnp.asarray(rng.normal(size=head_dim), "bfloat16") for _ in range(2)) if norm else None
    scales = tuple(jnp.asarray(rng.uniform(0.02, 0.1, num_kv_heads), jnp.float32) for _ in range(2))
    k_scale, v_scale = scales if has_scales else (None, None)
    want_q, want = expected(qkv, cos, sin, cache, page, offset, num_heads, weights, 1e-5, (k_scale, v_scale))

    meta = attention.AttentionMetadata(*[jnp.zeros(())] * 5, plan=Slots(page, offset), implementation="mosaic_gpu")
    run = functools.partial(rope_and_write, norm_offset=1.0, norm_eps=1e-5, k_scale=k_scale, v_scale=v_scale)
    got_q, got = interpret(run, qkv, cos, sin, cache, meta, weights)
    np.testing.assert_allclose(np.asarray(got_q, np.float32), np.asarray(want_q, np.float32), rtol=2**-7, atol=1e-3)
    for got_pages, want_pages in zip(got, want, strict=True):
        got_pages, want_pages = np.asarray(got_pages, np.float32), np.asarray(want_pages, np.float32)
        assert np.isfinite(got_pages).all()
        # A multiply-add that was fused may round to the next number of the narrow dtype.
        step = 1 if cache_dtype == "int8" else np.maximum(np.abs(want_pages) / 8, 2**-9)
        assert (np.abs(got_pages - want_pages) <= step).all()
        assert (got_pages == want_pages).mean() > 0.99
    np.testing.assert_array_equal(np.asarray(got[1], np.float32), np.asarray(want[1], np.float32))  # turns nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the kernel reads of a plan."""

    page: jax.Array
    offset: jax.Array


def has(
    num_tokens=8, implementation="mosaic_gpu", head_dim=128, rotary_dim=128, dtype="bfloat16", is_planned=True
) -> bool:
    plan = object() if is_planned else None
    meta = attention.AttentionMetadata(*[jnp.zeros(())] * 5, plan=plan, implementation=implementation)
    cache = (jnp.zeros((4, 2, 16, head_dim), dtype),) * 2
    qkv = jnp.zeros((num_tokens, 6 * head_dim), "bfloat16")
    return has_kernel(qkv, jnp.zeros((num_tokens, rotary_dim // 2)), cache, meta)


def test_what_has_a_kernel():
    assert has()
    assert not has(implementation="reference")
    assert not has(rotary_dim=64)
    assert not has(head_dim=64, rotary_dim=64)
    assert has(num_tokens=128)
    assert not has(num_tokens=160)
    assert has(dtype="float8_e4m3fn")
    assert has(dtype="int8")
    assert not has(is_planned=False)
