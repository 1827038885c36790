"""OLMo 2: norms after the blocks instead of before, and over whole query and key projections; arXiv 2501.00656."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxengine.models.causal_lm import CausalLM, make_norm
from jaxengine.models.config import ModelConfig, common_fields
from jaxengine.models.layers.attention import Attention
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.layers.mlp import GatedMLP
from jaxengine.models.registry import architecture_of
from jaxengine.models.step import StepContext


class Olmo2Layer(nnx.Module):
    """Attention and MLP, each followed by its norm."""

    def __init__(self, config: ModelConfig, layer: int, build: LayerBuilder):
        """Makes layer number `layer`."""
        self.self_attn = Attention(config, layer, build.at("self_attn"))
        self.post_attention_layernorm = make_norm(config, build.at("post_attention_layernorm"))
        self.mlp = GatedMLP(config, build.at("mlp"))
        self.post_feedforward_layernorm = make_norm(config, build.at("post_feedforward_layernorm"))

    @jax.jit
    def __call__(self, x: jax.Array, cache: Any, step: StepContext) -> tuple[jax.Array, Any]:
        """Applies the layer to `[T, D]`; see `Attention` for the rest."""
        attended, cache = self.self_attn(x, cache, step)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(x, step)), cache


class Olmo2ForCausalLM(CausalLM):
    """OLMo 2."""

    layer_class = Olmo2Layer

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`."""
        fields = common_fields(hf, defaults={"rms_norm_eps": 1e-5})
        return ModelConfig(architecture=architecture_of(hf), qk_norm="projection", **fields)
