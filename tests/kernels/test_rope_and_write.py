"""Norm, rotation and cache write in one GPU kernel, in the interpreter with races detected, against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.models.layers.rope import apply_rope
from jaxengine.pallas_kernels import ragged_paged_attention as attention
from jaxengine.pallas_kernels.ragged_paged_attention import reference
from jaxengine.pallas_kernels.rope_and_write import has_kernel, mosaic_gpu

PAGE_SIZE, NUM_PAGES = 16, 9


def expected(qkv, cos, sin, cache, page, offset, num_heads: int, norm_weights, eps: float):
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
    return q, reference.write(k, v, cache, page, offset, None, None)


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
    assert not has(dtype="float8_e4m3fn")
    assert not has(is_planned=False)
