"""The public op: checks its arguments once and hands them to the platform's implementation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.pallas_kernels.ragged_paged_attention import reference

KVCache = tuple[jax.Array, jax.Array]

# Implementations by name. A platform kernel raises NotImplementedError for what it does not support.
IMPLEMENTATIONS = {"reference": reference}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Where each sequence's tokens and pages are. Sequences with exactly one new token come first.

    Attributes:
      kv_lens: i32[S], tokens of each sequence after this step, the new ones included.
      query_starts: i32[S + 1], row of each sequence's first new token; constant from `num_seqs` on.
      page_table: i32[S, P], page ids in order; entries past the sequence's end may be any number.
      num_seqs: i32[], sequences in this step; rows from there on are padding.
      num_decodes: i32[], leading sequences with exactly one new token.
      plan: what `plan_attention` added, or None: then the op plans by itself.
    """

    kv_lens: jax.Array
    query_starts: jax.Array
    page_table: jax.Array
    num_seqs: jax.Array
    num_decodes: jax.Array
    plan: Any = None


def cache_shape(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of one layer's K (or V) array for the implementation in use: [P, K, page, H]."""
    return reference.cache_shape(num_pages, page_size, num_kv_heads, head_dim)


def make_cache(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype) -> KVCache:
    """Makes one layer's empty cache: its K and its V array."""
    shape = cache_shape(num_pages, page_size, num_kv_heads, head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KVCache,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: str = "reference",
) -> tuple[jax.Array, KVCache]:
    """Writes new keys and values into their pages and attends causally to everything up to each token.

    Args:
      q: [T, N, H] queries of all sequences, one after the other (see `meta.query_starts`).
      k: [T, K, H] new keys; N is a multiple of K.
      v: [T, K, H] new values.
      cache: K and V pages of this layer, from `make_cache`; donate them for an update in place.
      meta: lengths and pages.
      scale: factor on q.k, usually H**-0.5.
      sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None for all.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2).
      sinks: [N] learned logits that take part in the softmax but carry no value.
      k_scale: f32[K] or scalar; the cache holds keys divided by it. Likewise `v_scale`.
      implementation: a name in `IMPLEMENTATIONS`.

    Returns:
      out: [T, N, H] in q's dtype; rows of the padding are finite, and nothing else is promised of them.
      cache: the updated pages.

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: a combination that the implementation does not support.
    """
    _check(q, k, v, cache, meta)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected one of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation].ragged_paged_attention(
        q,
        k,
        v,
        cache,
        meta,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def plan_attention(
    meta: AttentionMetadata,
    *,
    num_tokens: int,
    cache: KVCache,
    sliding_window: int | None = None,
    implementation: str = "reference",
) -> AttentionMetadata:
    """Adds to the metadata what follows from it alone: done once a step, and not again in every layer.

    Args:
      meta: lengths and pages.
      num_tokens: T.
      cache: any layer's; only its shape is read.
      sliding_window: the window of the layers that the plan is for.
      implementation: a name in `IMPLEMENTATIONS`.
    """
    num_pages, _, page_size, _ = cache[0].shape
    plan = IMPLEMENTATIONS[implementation].make_plan(
        meta, num_tokens=num_tokens, num_pages=num_pages, page_size=page_size, sliding_window=sliding_window
    )
    return dataclasses.replace(meta, plan=plan)


def shift_pages(meta: AttentionMetadata, offset: jax.Array, implementation: str = "reference") -> AttentionMetadata:
    """Moves all page ids by `offset`: for a cache that holds the pages of several layers one after the other.

    The plan must have been made for the whole cache, so that what it drops stays out of range.
    """
    plan = None if meta.plan is None else IMPLEMENTATIONS[implementation].shift_plan(meta.plan, offset)
    return dataclasses.replace(meta, page_table=meta.page_table + offset, plan=plan)


def _check(q, k, v, cache, meta: AttentionMetadata) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape:
        raise ValueError(f"expected q[T,N,H], k[T,K,H] and v like k, got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q{q.shape} does not fit k{k.shape}: same T and H, and N a multiple of K")
    k_pages, v_pages = cache
    if k_pages.shape != v_pages.shape or k_pages.shape[1] != k.shape[1] or k_pages.shape[3] != k.shape[2]:
        raise ValueError(f"cache {k_pages.shape}, {v_pages.shape} does not fit k{k.shape}: expected [P, K, page, H]")
    num_slots = meta.kv_lens.shape[0]
    if meta.query_starts.shape != (num_slots + 1,) or meta.page_table.shape[0] != num_slots:
        raise ValueError(
            f"meta: kv_lens{meta.kv_lens.shape}, query_starts{meta.query_starts.shape} and "
            f"page_table{meta.page_table.shape} do not agree on the number of sequences"
        )
