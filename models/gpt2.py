"""GPT-2: learned positions, layer norms with biases, weights stored `[in, out]` (Radford et al., 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxengine.models.causal_lm import CausalLM, DecoderLayer
from jaxengine.models.config import ModelConfig, common_fields
from jaxengine.models.layers.embedding import Embedding
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.layers.mlp import MLP
from jaxengine.models.layers.param import ParameterSpec
from jaxengine.models.registry import architecture_of
from jaxengine.models.step import ModelInputs
from jaxengine.models.weights import WeightSpec
from jaxengine.sharding import axes

TENSOR_NAMES = (
    ("embed_tokens.", "wte."),
    ("embed_positions.", "wpe."),
    ("layers.", "h."),
    (".input_layernorm.", ".ln_1."),
    (".post_attention_layernorm.", ".ln_2."),
    (".self_attn.qkv_proj.", ".attn.c_attn."),
    (".self_attn.o_proj.", ".attn.c_proj."),
    (".mlp.up_proj.", ".mlp.c_fc."),
    (".mlp.down_proj.", ".mlp.c_proj."),
    ("norm.", "ln_f."),
)
"""Our part of a name, and GPT-2's."""


class GPT2Layer(DecoderLayer):
    """Pre-norm attention and a plain MLP."""

    mlp_class = MLP


class GPT2ForCausalLM(CausalLM):
    """GPT-2."""

    layer_class = GPT2Layer
    has_fused_tensors = True
    base_prefix = "transformer."
    ignored_tensors = (".attn.bias", ".attn.masked_bias")  # causal masks

    def _add_embeddings(self, config: ModelConfig, build: LayerBuilder) -> None:
        super()._add_embeddings(config, build)
        self.embed_positions = Embedding(
            config.max_position_embeddings,
            config.hidden_size,
            build.at("embed_positions"),
            row_axis=axes.POSITION,
        )

    def embed(self, inputs: ModelInputs) -> jax.Array:
        """Embeds tokens and their positions as `[T, D]`."""
        return super().embed(inputs) + self.embed_positions(inputs.positions)

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`.

        Raises:
            ValueError: It asks for a variant of attention that no well-known checkpoint has.
        """
        for key, supported in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
            if hf.get(key, supported) is not supported:
                raise ValueError(f"{key} is {hf[key]!r}; only {supported} is supported")
        common = {
            "hidden_size": hf.get("n_embd", 768),
            "intermediate_size": hf.get("n_inner") or 4 * hf.get("n_embd", 768),
            "num_hidden_layers": hf.get("n_layer", 12),
            "num_attention_heads": hf.get("n_head", 12),
            "max_position_embeddings": hf.get("n_positions", 1024),
            "hidden_act": hf.get("activation_function", "gelu_new"),
            "tie_word_embeddings": True,
        }
        fields = common_fields(hf, defaults=common)
        fields.update(
            rope=None,
            norm="layer",
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
        )
        return ModelConfig(architecture=architecture_of(hf), **fields)

    def weight_spec(self, path: str, spec: ParameterSpec) -> WeightSpec:
        """Returns where the parameter at `path` comes from: as in the base class, linear weights transposed."""
        return dataclasses.replace(super().weight_spec(path, spec), transpose=path.endswith("_proj.weight"))

    @classmethod
    def checkpoint_layers(cls, layer: str, parts: Sequence[str]) -> tuple[str, ...]:
        """Returns the one name of the layer at a path."""
        if layer == "lm_head":
            return (layer,)
        path = f"{layer}."
        for ours, theirs in TENSOR_NAMES:
            is_inner = ours.startswith(".")
            if is_inner or path.startswith(ours):
                path = path.replace(ours, theirs, 1)
        return (cls.base_prefix + path.removesuffix("."),)
