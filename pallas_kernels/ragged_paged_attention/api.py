"""The public op: checks its arguments once and hands them to the implementation that the metadata names."""

import dataclasses
import functools
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp

logger = logging.getLogger(__name__)

KVCache = tuple[jax.Array, ...]

# Modules beside this one, imported on first use. Each has check_support, cache_shapes, make_plan and the op itself.
IMPLEMENTATIONS = ("reference", "mosaic_gpu", "mosaic_tpu")
_KERNEL_OF_PLATFORM = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is fixed for a model's attention layers, and decides which implementation can run them.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      head_dim: H.
      page_size: tokens of a page.
      dtype: name of the queries' dtype.
      cache_dtype: name of the cache's dtype.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    cache_dtype: str


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
      implementation: a name in `IMPLEMENTATIONS`; the cache must have been made for the same.
      max_query_len: most new tokens of any sequence, where that is known when the step is compiled: 1 for a step of
        decodes spares the kernels the rest.
    """

    kv_lens: jax.Array
    query_starts: jax.Array
    page_table: jax.Array
    num_seqs: jax.Array
    num_decodes: jax.Array
    plan: Any = None
    implementation: str = dataclasses.field(default="reference", metadata={"static": True})
    max_query_len: int | None = dataclasses.field(default=None, metadata={"static": True})


def choose_implementation(spec: AttentionSpec, platform: str | None = None, wanted: str = "auto") -> str:
    """The kernel of a platform ("cpu", "gpu", "tpu"; None for the default device's), where it supports `spec`.

    Otherwise the reference, which the log says once; or an error, where a certain one is wanted.

    Raises:
      ValueError: what is wanted does not run there, or does not support `spec`.
    """
    platform = platform or jax.default_backend()
    name = _KERNEL_OF_PLATFORM.get(platform, "reference")
    if wanted != "auto":
        if wanted not in (name, "reference"):
            raise ValueError(f"attention_backend={wanted!r}: does not run on a {platform}; 'auto' or 'reference' does")
        try:
            get_implementation(wanted).check_support(spec)
        except NotImplementedError as error:
            raise ValueError(f"attention_backend={wanted!r} does not support {error}") from error
        return wanted
    try:
        get_implementation(name).check_support(spec)
    except NotImplementedError as error:
        _warn_once(f"attention runs in plain JAX, which is slow: {name}: {error}")
        return "reference"
    return name


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@functools.cache
def get_implementation(name: str) -> Any:
    """The module of an implementation.

    Raises:
      ValueError: no such name.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return importlib.import_module(f"jaxengine.pallas_kernels.ragged_paged_attention.{name}")


def cache_shapes(spec: AttentionSpec, num_pages: int, implementation: str = "reference") -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays that make up one layer's cache; the leading axis of each is the pages'.

    Raises:
      NotImplementedError: the implementation does not support `spec`.
    """
    module = get_implementation(implementation)
    module.check_support(spec)
    return module.cache_shapes(spec, num_pages)


def make_cache(
    spec: AttentionSpec,
    num_pages: int,
    implementation: str = "reference",
    *,
    num_devices: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> KVCache:
    """Makes one layer's empty cache. Raises as `cache_shapes` does.

    Args:
      spec: of one device's heads.
      num_pages: P.
      implementation: which of the implementations will use it.
      num_devices: devices that share the heads, the second axis of every array.
      sharding: where the arrays go; None for the default device.
    """
    dtype = spec.cache_dtype
    if implementation == "reference":
        dtype = get_implementation(implementation).stored_dtype(dtype)
    return tuple(
        jnp.zeros((pages, heads * num_devices, *rest), dtype, device=sharding)
        for pages, heads, *rest in cache_shapes(spec, num_pages, implementation)
    )


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    cache: KVCache,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Writes new keys and values into their pages and attends causally to everything up to each token.

    Args:
      q: [T, N, H] queries of all sequences, one after the other (see `meta.query_starts`).
      k: [T, K, H] new keys; N is a multiple of K. None if they are in the cache already (`rope_and_write`).
      v: [T, K, H] new values, or None.
      cache: pages of this layer, from `make_cache`; donate them for an update in place.
      meta: lengths and pages, and which implementation runs.
      scale: factor on q.k, usually H**-0.5.
      sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None for all.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2).
      sinks: [N] learned logits that take part in the softmax but carry no value.
      k_scale: f32[K] or scalar; the cache holds keys divided by it. Likewise `v_scale`. An int8 cache rounds to the
        nearest integer.

    Returns:
      out: [T, N, H] in q's dtype; rows of the padding are finite, and nothing else is promised of them.
      cache: the updated pages.

    Raises:
      ValueError: shapes that do not fit together.
      NotImplementedError: a combination that the implementation does not support.
    """
    _check(q, k, v, meta)
    return get_implementation(meta.implementation).ragged_paged_attention(
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
    meta: AttentionMetadata, *, num_tokens: int, num_heads: int, cache: KVCache, sliding_window: int | None = None
) -> AttentionMetadata:
    """Adds to the metadata what follows from it alone: done once a step, and not again in every layer.

    Args:
      meta: lengths and pages.
      num_tokens: T.
      num_heads: N.
      cache: any layer's; only its shape is read.
      sliding_window: the window of the layers that the plan is for.
    """
    plan = get_implementation(meta.implementation).make_plan(
        meta, num_tokens=num_tokens, num_heads=num_heads, cache=cache, sliding_window=sliding_window
    )
    return dataclasses.replace(meta, plan=plan)


def shift_pages(meta: AttentionMetadata, offset: jax.Array) -> AttentionMetadata:
    """Moves all page ids by `offset`: for a cache that holds the pages of several layers one after the other.

    The plan must have been made for the whole cache, so that what it drops stays out of range.
    """
    plan = None if meta.plan is None else get_implementation(meta.implementation).shift_plan(meta.plan, offset)
    return dataclasses.replace(meta, page_table=meta.page_table + offset, plan=plan)


def _check(q, k, v, meta: AttentionMetadata) -> None:
    if (k is None) != (v is None) or (k is None and meta.implementation != "mosaic_gpu"):
        raise ValueError(f"k and v may be None together and for mosaic_gpu only, not for {meta.implementation}")
    if k is not None and (q.ndim != 3 or k.ndim != 3 or k.shape != v.shape):
        raise ValueError(f"expected q[T,N,H], k[T,K,H] and v like k, got {q.shape}, {k.shape}, {v.shape}")
    if k is not None and (q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]):
        raise ValueError(f"q{q.shape} does not fit k{k.shape}: same T and H, and N a multiple of K")
    num_slots = meta.kv_lens.shape[0]
    if meta.query_starts.shape != (num_slots + 1,) or meta.page_table.shape[0] != num_slots:
        raise ValueError(
            f"meta: kv_lens{meta.kv_lens.shape}, query_starts{meta.query_starts.shape} and "
            f"page_table{meta.page_table.shape} do not agree on the number of sequences"
        )
