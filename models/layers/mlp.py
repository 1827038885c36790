"""Feed-forward layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.linear import Linear
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.step import NO_CONTEXT, StepContext
from jaxengine.sharding import axes
from jaxengine.sharding.layout import Part

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

    def __init__(self, config: ModelConfig, build: LayerBuilder):
        """Makes the layer of a model's own sizes."""
        dim, ffn_dim, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        parts = Part("gate_proj", ffn_dim), Part("up_proj", ffn_dim)
        self.gate_up_proj = Linear(dim, parts, (axes.MLP, axes.EMBED), build.at("gate_up_proj"), bias=bias)
        self.down_proj = Linear(ffn_dim, dim, (axes.EMBED, axes.MLP), build.at("down_proj"), bias=bias)
        self.activation = config.hidden_act

    @functools.partial(jax.jit, static_argnames="allow_partial")
    def __call__(self, x: jax.Array, step: StepContext = NO_CONTEXT, *, allow_partial: bool = False) -> jax.Array:
        """Applies the layer to `[T, D]`; see `Linear` for the rest."""
        hidden = self.gate_up_proj.gated(x, step) if self.activation == "silu" else None  # [T, F]
        if hidden is None:
            gate, up = self.gate_up_proj.split(self.gate_up_proj(x, step))  # [T, F] each
            hidden = (activate(gate, self.activation) * up.astype(jnp.float32)).astype(x.dtype)
        return self.down_proj(hidden, step, allow_partial=allow_partial)


class MLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(self, config: ModelConfig, build: LayerBuilder):
        """Makes the layer of a model's own sizes."""
        dim, ffn_dim, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = Linear(dim, ffn_dim, (axes.MLP, axes.EMBED), build.at("up_proj"), bias=bias)
        self.down_proj = Linear(ffn_dim, dim, (axes.EMBED, axes.MLP), build.at("down_proj"), bias=bias)
        self.activation = config.hidden_act

    @functools.partial(jax.jit, static_argnames="allow_partial")
    def __call__(self, x: jax.Array, step: StepContext = NO_CONTEXT, *, allow_partial: bool = False) -> jax.Array:
        """Applies the layer to `[T, D]`; see `Linear` for the rest."""
        hidden = activate(self.up_proj(x, step), self.activation).astype(x.dtype)
        return self.down_proj(hidden, step, allow_partial=allow_partial)
