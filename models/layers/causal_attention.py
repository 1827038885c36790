"""Causal self-attention without a cache, in plain JAX: for training, and what cached attention is tested against."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attends from each token to itself and to those before it in its sequence, in float32.

    The T x T scores of a layer are computed again for its gradients instead of being kept.

    Args:
        q: `[T, N, H]`.
        k, v: `[T, K, H]`; N is a multiple of K.
        segment_ids: i32[T], the number of each token's sequence; the tokens of a sequence lie side by side.
        scale, sliding_window, soft_cap, sinks: As for `ragged_paged_attention`.

    Returns:
        `[T, N, H]` in q's dtype.
    """
    attend = functools.partial(_attend, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
    return jax.checkpoint(attend)(q, k, v, segment_ids, sinks)


def _attend(q, k, v, segment_ids, sinks, *, scale, sliding_window, soft_cap):
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # GPUs would round float32 to TF32
    grouped = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)  # [T, K, G, H]
    scores = einsum("tkgh,skh->kgts", grouped, k.astype(jnp.float32)) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    distance = jnp.arange(num_tokens)[:, None] - jnp.arange(num_tokens)
    seen = (distance >= 0) & (segment_ids[:, None] == segment_ids)
    if sliding_window is not None:
        seen &= distance < sliding_window
    scores = jnp.where(seen, scores, MASKED)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    if sinks is not None:
        total = jnp.logaddexp(total, sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1))
    out = einsum("kgts,skh->tkgh", jnp.exp(scores - total), v.astype(jnp.float32))
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype)
