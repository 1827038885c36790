"""Ragged paged attention: one public op, one implementation per platform."""

from jaxengine.pallas_kernels.ragged_paged_attention.api import (
    AttentionMetadata,
    cache_shape,
    make_cache,
    plan_attention,
    ragged_paged_attention,
    shift_pages,
)

__all__ = [
    "AttentionMetadata",
    "cache_shape",
    "make_cache",
    "plan_attention",
    "ragged_paged_attention",
    "shift_pages",
]
