"""Residual addition and norm in plain JAX."""

import jax.numpy as jnp
from jax import lax


def add_norm(residual, parts, weight, *, eps: float, offset: float):
    """See `api.add_norm`; parts are [S, T, D]."""
    total = residual.astype(jnp.float32)
    for part in parts:
        total += part.astype(jnp.float32)
    rounded = total.astype(residual.dtype)
    wide = rounded.astype(jnp.float32)
    scale = weight.astype(jnp.float32) + offset
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return rounded, (normed * scale).astype(residual.dtype)
