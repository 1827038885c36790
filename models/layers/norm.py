"""Normalisation, computed in float32 whatever the dtype of the activations."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.step import NO_CONTEXT, StepContext
from jaxengine.pallas_kernels.add_norm import add_norm
from jaxengine.sharding import axes
from jaxengine.sharding.layout import Part


class PendingResidual(NamedTuple):
    """Hidden states that are still to be added up, so that the norm after them can do it.

    Attributes:
        x: The residual, `[T, D]`.
        parts: What a layer adds: `[T, D]`, or in parts, f32[S, T, D].
    """

    x: jax.Array
    parts: jax.Array


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis (arXiv 1910.07467)."""

    def __init__(
        self,
        dim: int | Part,
        build: LayerBuilder,
        *,
        eps: float,
        unit_offset: bool = False,
        axis: str = axes.EMBED,
    ):
        """Makes the norm.

        Args:
            dim: Size of the last axis, or what it is in a checkpoint.
            build: Makes the weight.
            eps: Added to the mean square.
            unit_offset: Multiply by `1 + weight` (Gemma) instead of `weight`.
            axis: Logical axis of the weight.
        """
        init = "zeros" if unit_offset else "ones"
        self.weight = build.vector(dim, axis, init=init)
        self.eps = eps
        self.offset = 1.0 if unit_offset else 0.0

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., dim] -> [..., dim]
        """Applies the norm."""
        wide = x.astype(jnp.float32)
        scale = self.weight[...].astype(jnp.float32) + self.offset
        normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)

    def add_and_norm(
        self, x: jax.Array | PendingResidual, step: StepContext = NO_CONTEXT
    ) -> tuple[jax.Array, jax.Array]:
        """Adds up what is not yet, and norms it: the new residual and its norm, `[T, D]` each."""
        if step.is_differentiable:
            x = add_up(x)
        if not isinstance(x, PendingResidual):
            return x, self(x)
        return add_norm(*x, self.weight[...], eps=self.eps, offset=self.offset)


class LayerNorm(nnx.Module):
    """Layer norm with bias over the last axis."""

    def __init__(self, dim: int, build: LayerBuilder, *, eps: float):
        """Makes the norm; see `RMSNorm`."""
        self.weight = build.vector(dim, axes.EMBED, init="ones")
        self.bias = build.vector(dim, axes.EMBED, init="zeros")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., dim] -> [..., dim]
        """Applies the norm."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def add_and_norm(
        self, x: jax.Array | PendingResidual, step: StepContext = NO_CONTEXT
    ) -> tuple[jax.Array, jax.Array]:
        """See `RMSNorm.add_and_norm`."""
        del step
        x = add_up(x)
        return x, self(x)


def add_up(x: jax.Array | PendingResidual) -> jax.Array:
    """Returns hidden states as one array."""
    if not isinstance(x, PendingResidual):
        return x
    parts = x.parts if x.parts.ndim == x.x.ndim else x.parts.sum(axis=0)
    return (x.x.astype(parts.dtype) + parts).astype(x.x.dtype)
