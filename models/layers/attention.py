"""Causal self-attention over the paged cache."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.linear import Linear
from jaxengine.models.layers.norm import RMSNorm
from jaxengine.models.layers.rope import RopeTable, apply_rope
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata, ragged_paged_attention
from jaxengine.pallas_kernels.rope_and_write import has_kernel, rope_and_write
from jaxengine.sharding import axes


class Attention(nnx.Module):
    """Projections, optional norms on queries and keys, rotation, attention, output projection."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        """Makes the attention of layer number `layer`; only what differs between layers is read by that number."""
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.attention_scale
        self.soft_cap = config.attention_soft_cap
        self.window = config.window(layer)
        self.qk_norm = config.qk_norm
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = Linear(
            config.hidden_size,
            (q_size, kv_size, kv_size),
            (axes.QKV_HEADS, axes.EMBED),
            bias=config.qkv_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.o_proj = Linear(
            q_size, config.hidden_size, (axes.EMBED, axes.HEADS), bias=config.output_bias, dtype=dtype, rngs=rngs
        )
        if config.qk_norm is not None:
            is_whole = config.qk_norm == "projection"

            def make_norm(size: int) -> RMSNorm:
                return RMSNorm(
                    size if is_whole else self.head_dim,
                    eps=config.norm_eps,
                    unit_offset=config.norm_unit_offset,
                    axis=axes.HEADS if is_whole else axes.HEAD_DIM,
                    dtype=dtype,
                    rngs=rngs,
                )

            self.q_norm, self.k_norm = make_norm(q_size), make_norm(kv_size)

    def __call__(
        self, x: jax.Array, rope: RopeTable | None, cache: Any, meta: AttentionMetadata
    ) -> tuple[jax.Array, Any]:
        """Attends, and writes the new keys and values into the cache.

        Args:
            x: `[T, D]`.
            rope: cos and sin of the T positions; None where this layer does not rotate.
            cache: This layer's cache.
            meta: Which tokens belong to which sequences and pages.

        Returns:
            `[T, D]` and the cache with the new keys and values.
        """
        qkv = self.qkv_proj(x)  # [T, (N + 2K) H]
        if rope is not None and self.qk_norm != "projection" and has_kernel(qkv, rope[0], cache, meta):
            k = v = None
            q, cache = rope_and_write(qkv, *rope, cache, meta, **self._head_norm())
        else:
            q, k, v = self._heads(qkv, rope)
        out, cache = ragged_paged_attention(
            q, k, v, cache, meta, scale=self.scale, sliding_window=self.window, soft_cap=self.soft_cap
        )  # [T, N, H]
        return self.o_proj(out.reshape(x.shape[0], self.num_heads * self.head_dim)), cache

    def _heads(self, qkv: jax.Array, rope: RopeTable | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[T, N, H]`, keys and values `[T, K, H]`, normed and rotated."""
        num_tokens = qkv.shape[0]
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv[:, :q_size], qkv[:, q_size : q_size + kv_size], qkv[:, q_size + kv_size :]
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

    def _head_norm(self) -> dict[str, Any]:
        """The norm over heads of queries and keys, as `rope_and_write` wants it."""
        if self.qk_norm is None:
            return {}
        weights = self.q_norm.weight[...], self.k_norm.weight[...]
        return {"norm_weights": weights, "norm_offset": self.q_norm.offset, "norm_eps": self.q_norm.eps}
