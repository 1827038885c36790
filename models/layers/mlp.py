"""Feed-forward layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.linear import Linear, split_fused
from jaxengine.models.step import NO_CONTEXT, StepContext
from jaxengine.pallas_kernels.skinny_matmul import gated_skinny_matmul, has_kernel
from jaxengine.sharding import axes
from jaxengine.sharding.layout import fused_runs

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
"""By the names of Hugging Face's configurations, which `models.config.ACTIVATIONS` lists."""


def activate(x: jax.Array, name: str) -> jax.Array:
    """Applies an activation in float32; the result stays float32, for a product that may follow."""
    return ACTIVATION_FUNCTIONS[name](x.astype(jnp.float32))


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, with gate and up in one product."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        """Makes the layer of a model's own sizes."""
        dim, ffn_dim, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.size = config.tensor_parallel_size
        share, shares = ffn_dim // self.size, tuple(range(self.size))
        self.gate_up_proj = Linear(
            dim,
            2 * ffn_dim,
            (axes.MLP, axes.EMBED),
            bias=bias,
            parts=(ffn_dim, ffn_dim),
            rows=fused_runs([(0, share, shares), (ffn_dim, share, shares)], self.size),
            dtype=dtype,
            rngs=rngs,
        )
        self.down_proj = Linear(ffn_dim, dim, (axes.EMBED, axes.MLP), bias=bias, dtype=dtype, rngs=rngs)
        self.activation = config.hidden_act

    @functools.partial(jax.jit, static_argnames="allow_partial")
    def __call__(self, x: jax.Array, step: StepContext = NO_CONTEXT, *, allow_partial: bool = False) -> jax.Array:
        """Applies the layer to `[T, D]`; see `Linear` for the rest."""
        weight = self.gate_up_proj.weight
        is_plain = (
            not step.is_differentiable
            and self.activation == "silu"
            and self.gate_up_proj.bias is None
            and x.dtype == weight.dtype
        )
        if is_plain and has_kernel(x.shape, weight.shape, x.dtype, gated=True):
            hidden = gated_skinny_matmul(x, weight[...])  # [T, F]
        else:
            fused = self.gate_up_proj(x, step)  # [T, 2F]
            gate, up = split_fused(fused, (fused.shape[1] // 2,) * 2, self.size)  # [T, F] each
            hidden = (activate(gate, self.activation) * up.astype(jnp.float32)).astype(x.dtype)
        return self.down_proj(hidden, step, allow_partial=allow_partial)


class MLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        """Makes the layer of a model's own sizes."""
        dim, ffn_dim, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = Linear(dim, ffn_dim, (axes.MLP, axes.EMBED), bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(ffn_dim, dim, (axes.EMBED, axes.MLP), bias=bias, dtype=dtype, rngs=rngs)
        self.activation = config.hidden_act

    @functools.partial(jax.jit, static_argnames="allow_partial")
    def __call__(self, x: jax.Array, step: StepContext = NO_CONTEXT, *, allow_partial: bool = False) -> jax.Array:
        """Applies the layer to `[T, D]`; see `Linear` for the rest."""
        hidden = activate(self.up_proj(x, step), self.activation).astype(x.dtype)
        return self.down_proj(hidden, step, allow_partial=allow_partial)
