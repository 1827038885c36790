"""All-reduce in plain JAX: `psum`, and the residual and norm after it as the models compute them."""

import jax.numpy as jnp
from jax import lax


def all_reduce(x, axis_name: str, *, residual, norm_weight, norm_eps: float, norm_offset: float, workspace=None):
    """See `api.all_reduce`."""
    del workspace
    out = lax.psum(x, axis_name)
    if residual is not None:
        out = residual + out
    if norm_weight is None:
        return out
    wide = out.astype(jnp.float32)
    factor = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm_eps)
    return out, (wide * factor * (norm_weight.astype(jnp.float32) + norm_offset)).astype(x.dtype)
