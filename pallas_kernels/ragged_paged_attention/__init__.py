"""Ragged paged attention: one public op, one implementation per platform."""

from jaxengine.pallas_kernels.ragged_paged_attention.api import (
    IMPLEMENTATIONS,
    AttentionMetadata,
    AttentionSpec,
    KVCache,
    cache_shapes,
    choose_implementation,
    make_cache,
    plan_attention,
    ragged_paged_attention,
    shift_pages,
)

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionMetadata",
    "AttentionSpec",
    "KVCache",
    "cache_shapes",
    "choose_implementation",
    "make_cache",
    "plan_attention",
    "ragged_paged_attention",
    "shift_pages",
]
