"""Rotary position embeddings (arXiv 2104.09864) and the ways of stretching them to longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.models.config import RopeConfig

RopeTable = tuple[jax.Array, jax.Array]
"""cos and sin, f32[T, rotary_dim / 2] each."""


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> np.ndarray:
    """Radians that each pair of dimensions turns from one position to the next.

    Args:
        rope: The embedding.
        max_model_len: Longest sequence that will be served; chooses between longrope's two sets of factors.

    Returns:
        float64[rotary_dim / 2].
    """
    frequencies = rope.theta ** (-np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, frequencies)
    if rope.kind == "longrope":
        is_long = max_model_len > rope.original_max_position
        return frequencies / np.asarray(rope.long_factor if is_long else rope.short_factor)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    rotations = rope.original_max_position * frequencies / (2 * math.pi)  # over the original context
    keep = np.clip((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)


def _yarn(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """YaRN (arXiv 2309.00071), section 3.2: a ramp over the dimensions between keeping and stretching."""
    dim = rope.rotary_dim

    def dimension_of(num_rotations: float) -> float:
        ratio = rope.original_max_position / (num_rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    stretch = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return frequencies * (1 - stretch + stretch / rope.factor)


def rope_table(rope: RopeConfig, positions: jax.Array, max_model_len: int) -> RopeTable:
    """Returns cos and sin of every position, once a step for all layers.

    Args:
        rope: The embedding.
        positions: i32[T].
        max_model_len: See `inverse_frequencies`.
    """
    frequencies = inverse_frequencies(rope, max_model_len).astype(np.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies  # [T, rotary_dim / 2]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def apply_rope(x: jax.Array, table: RopeTable) -> jax.Array:
    """Rotates the leading `rotary_dim` dimensions of each head: dimension i pairs with i + rotary_dim / 2.

    Args:
        x: `[T, heads, H]`.
        table: Of the same T.

    Returns:
        The same shape and dtype.
    """
    cos, sin = (part[:, None, :] for part in table)  # [T, 1, rotary_dim / 2]
    half = cos.shape[-1]
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
