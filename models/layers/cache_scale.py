"""Scales of keys and values that are cached in 8 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.models.layers.param import ParameterSpec
from jaxengine.sharding import axes
from jaxengine.sharding.layout import Part

CACHE_LIMITS = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""The largest number that a cache of each of these dtypes holds."""


class CacheScale(nnx.Variable):
    """f32[K]: a cache holds the keys, or the values, of each head divided by its scale. No parameter to be trained."""


def cache_scale(part: Part, num_devices: int, *, is_abstract: bool) -> CacheScale:
    """Makes the scales of a layer's keys or values. They are 0, which stands for "not known", until they are loaded.

    Args:
        part: The heads, as a checkpoint has them and as the devices do.
        num_devices: How many share the heads.
        is_abstract: Whether to leave them to be filled.
    """
    spec = ParameterSpec((part.own_size,), "float32", (axes.HEADS,), "zeros", ((part,),), num_devices)
    value = jax.ShapeDtypeStruct(spec.shape, spec.dtype) if is_abstract else jnp.zeros(spec.shape, spec.dtype)
    return CacheScale(value, spec=spec)


def is_scaled(dtype: DTypeLike) -> bool:
    """Whether caches of a dtype hold numbers divided by scales; bytes are the reference's float8."""
    return jnp.dtype(dtype).name in (*CACHE_LIMITS, "uint8")
