"""The public op: norms and rotates queries and keys, and writes keys and values into the paged cache."""

import jax
import jax.numpy as jnp

from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata

KVCache = tuple[jax.Array, ...]

MAX_TOKENS = 128


def has_kernel(qkv: jax.Array, cos: jax.Array, cache: KVCache, meta: AttentionMetadata) -> bool:
    """Whether `rope_and_write` runs for these: few tokens on a GPU, heads of 128 that rotate whole.

    Elsewhere `ragged_paged_attention` writes keys and values itself, and XLA fuses the rest. Steps of many tokens have
    no use for it: what they spend there is small against their products.
    """
    return (
        meta.implementation == "mosaic_gpu"
        and meta.plan is not None
        and qkv.shape[0] <= MAX_TOKENS
        and 2 * cos.shape[1] == cache[0].shape[-1] == 128
    )


def rope_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: KVCache,
    meta: AttentionMetadata,
    norm_weights: tuple[jax.Array, jax.Array] | None = None,
    *,
    norm_offset: float = 0.0,
    norm_eps: float = 0.0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Splits, norms and rotates; stores keys and values in their pages. Only where `has_kernel` says so.

    Args:
      qkv: [T, (N + 2K) * H], the heads of queries, keys and values one after the other.
      cos: f32[T, H / 2], of each row's position; likewise `sin`. Dimension i turns with dimension i + H / 2.
      cache: pages of this layer; donate them for an update in place.
      meta: with a plan (`plan_attention`), which says where each row is written.
      norm_weights: [H] each, of a root mean square norm over each head of queries and of keys, before the rotation.
      norm_offset: added to the weights.
      norm_eps: added to the mean square.
      k_scale: f32[K] or scalar, as in `ragged_paged_attention`. Likewise `v_scale`.

    Returns:
      q: [T, N, H], for `ragged_paged_attention(q, None, None, cache, ...)`.
      cache: with the new keys and values.
    """
    from jaxengine.pallas_kernels.rope_and_write import mosaic_gpu

    scales = None
    if k_scale is not None or v_scale is not None:
        ones = jnp.ones(cache[0].shape[1], jnp.float32)
        scales = jnp.stack([ones if s is None else ones * s for s in (k_scale, v_scale)])
    return mosaic_gpu.rope_and_write(
        qkv,
        cos,
        sin,
        cache,
        meta.plan.page,
        meta.plan.offset,
        norm_weights=norm_weights,
        norm_offset=norm_offset,
        norm_eps=norm_eps,
        scales=scales,
    )
