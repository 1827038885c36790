"""Causal self-attention, over the paged cache or, for training, without one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.cache_scale import cache_scale, is_scaled
from jaxengine.models.layers.causal_attention import causal_attention
from jaxengine.models.layers.linear import Linear
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.layers.norm import RMSNorm
from jaxengine.models.layers.rope import RopeTable, apply_rope
from jaxengine.models.step import StepContext
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata, ragged_paged_attention
from jaxengine.pallas_kernels.rope_and_write import has_kernel, rope_and_write
from jaxengine.sharding import axes
from jaxengine.sharding.layout import Part
from jaxengine.sharding.mesh import COLUMNS, EVERYWHERE, on_each_device


class Attention(nnx.Module):
    """Projections, optional norms on queries and keys, rotation, attention, output projection."""

    def __init__(self, config: ModelConfig, layer: int, build: LayerBuilder):
        """Makes the attention of layer number `layer`; only what differs between layers is read by that number."""
        heads = self.heads = config.heads
        self.num_heads, self.num_kv_heads, self.head_dim = heads.num_heads, heads.num_kv_heads, config.head_dim
        self.scale = config.attention_scale
        self.soft_cap = config.attention_soft_cap
        self.window = config.window(layer)
        self.rotation = config.rotation(layer)
        self.qk_norm = config.qk_norm
        q, k, v = (
            Part(name, num_heads * self.head_dim, self.head_dim, units)
            for name, num_heads, units in (
                ("q_proj", config.num_heads, heads.q_heads),
                ("k_proj", config.num_kv_heads, heads.kv_heads),
                ("v_proj", config.num_kv_heads, heads.kv_heads),
            )
        )
        dim, qkv_bias, output_bias = config.hidden_size, config.qkv_bias, config.output_bias
        self.qkv_proj = Linear(dim, (q, k, v), (axes.QKV_HEADS, axes.EMBED), build.at("qkv_proj"), bias=qkv_bias)
        self.o_proj = Linear(q, dim, (axes.EMBED, axes.HEADS), build.at("o_proj"), bias=output_bias)
        if config.cache_scales:
            self.k_scale, self.v_scale = (
                cache_scale(
                    Part(name, config.num_kv_heads, 1, heads.kv_heads), heads.size, is_abstract=build.rngs is None
                )
                for name in ("k_scale", "v_scale")
            )
        if config.qk_norm is not None:
            self.q_norm, self.k_norm = (self._make_norm(config, part, build) for part in (q, k))

    def _make_norm(self, config: ModelConfig, part: Part, build: LayerBuilder) -> RMSNorm:
        """Returns the norm of queries or keys: of each head, or of all together."""
        is_whole = config.qk_norm == "projection"
        return RMSNorm(
            part if is_whole else self.head_dim,
            build,
            eps=config.norm_eps,
            unit_offset=config.norm_unit_offset,
            axis=axes.HEADS if is_whole else axes.HEAD_DIM,
        )

    @functools.partial(jax.jit, static_argnames="allow_partial")
    def __call__(
        self,
        x: jax.Array,
        cache: Any,
        step: StepContext,
        *,
        allow_partial: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Attends, and writes the new keys and values into the cache.

        Args:
            x: `[T, D]`.
            cache: This layer's cache; not looked at in a step without caches.
            step: The step's context, with plans.
            allow_partial: See `Linear`.

        Returns:
            `[T, D]` and the cache with the new keys and values.
        """
        qkv = self.qkv_proj(x, step)  # [T, (N + 2K) H]
        rope = None if self.rotation is None else step.rope[self.rotation]
        options = {"scale": self.scale, "sliding_window": self.window, "soft_cap": self.soft_cap}
        if step.segment_ids is not None:
            out = causal_attention(*self._heads(qkv, rope), step.segment_ids, **options)
        else:
            out, cache = self._attend(qkv, rope, cache, step.attention[0], options)
        return self.o_proj(out.reshape(x.shape[0], -1), step, allow_partial=allow_partial), cache

    def _attend(
        self, qkv: jax.Array, rope: RopeTable | None, cache: Any, meta: AttentionMetadata, options: dict[str, Any]
    ) -> tuple[jax.Array, Any]:
        """Attends over the cache: `[T, N, H]`, and the cache with the new keys and values."""
        scales = None
        if hasattr(self, "k_scale") and is_scaled(cache[0].dtype):
            scales = jnp.stack([self.k_scale[...], self.v_scale[...]])  # f32[2, K]
        if rope is not None and self.qk_norm != "projection" and has_kernel(qkv, rope[0], cache, meta):
            k = v = None
            q, cache = self._rotate(qkv, rope, cache, meta, scales)
        else:
            q, k, v = self._heads(qkv, rope)

        def attend(q, k, v, cache, scales, meta):
            return ragged_paged_attention(q, k, v, cache, meta, **options, **_by_name(scales))

        has_heads = (True, True, True, True, True, False)
        run: Callable[..., Any] = over_heads(attend, has_heads) if self.heads.size > 1 else attend
        return run(q, k, v, cache, scales, meta)

    def _heads(self, qkv: jax.Array, rope: RopeTable | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries `[T, N, H]`, keys and values `[T, K, H]`, normed and rotated."""
        num_tokens = qkv.shape[0]
        q, k, v = self.qkv_proj.split(qkv)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(num_tokens, self.num_heads, self.head_dim)
        k = k.reshape(num_tokens, self.num_kv_heads, self.head_dim)
        v = v.reshape(num_tokens, self.num_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def _rotate(
        self, qkv: jax.Array, rope: RopeTable, cache: Any, meta: AttentionMetadata, scales: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Returns queries `[T, N, H]`, normed and rotated, and the cache with the keys and values, in one kernel."""
        weights: tuple[jax.Array, jax.Array] | None = None
        options: dict[str, Any] = {}
        if self.qk_norm is not None:
            weights = self.q_norm.weight[...], self.k_norm.weight[...]
            options = {"norm_offset": self.q_norm.offset, "norm_eps": self.q_norm.eps}

        def rotate(qkv, cache, scales, rope, meta, weights):
            return rope_and_write(qkv, *rope, cache, meta, weights, **options, **_by_name(scales))

        has_heads = (True, True, True, False, False, False)
        run: Callable[..., Any] = over_heads(rotate, has_heads) if self.heads.size > 1 else rotate
        return run(qkv, cache, scales, rope, meta, weights)


def _by_name(scales: jax.Array | None) -> dict[str, Any]:
    return {} if scales is None else {"k_scale": scales[0], "v_scale": scales[1]}


def over_heads(function: Callable[..., Any], has_heads: Sequence[bool]) -> Callable[..., Any]:
    """Runs a function on every device's heads by themselves, under the mesh at hand.

    Args:
        function: Its results have heads.
        has_heads: Of each argument: whether its second axis is that of heads, as of `[T, heads, H]`, of pages
            `[P, K, page, H]`, of scales `[2, K]` and of a fused product's columns; else all devices have the same.
    """
    return on_each_device(function, [COLUMNS if has else EVERYWHERE for has in has_heads], COLUMNS)
