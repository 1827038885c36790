"""Gemma 2: norms before and after each block, soft caps, alternating windows; arXiv 2408.00118."""

from __future__ import annotations

from typing import Any

import jax

from jaxengine.models.causal_lm import CausalLM, DecoderLayer, make_norm
from jaxengine.models.config import FULL, SLIDING, ModelConfig, common_fields
from jaxengine.models.layers.matrix import LayerBuilder
from jaxengine.models.registry import architecture_of
from jaxengine.models.step import StepContext


class GemmaLayer(DecoderLayer):
    """Norms before and after attention and before and after the MLP (Gemma 2 and 3)."""

    def __init__(self, config: ModelConfig, layer: int, build: LayerBuilder):
        """Makes layer number `layer`."""
        super().__init__(config, layer, build)
        self.pre_feedforward_layernorm = make_norm(config, build.at("pre_feedforward_layernorm"))
        self.post_feedforward_layernorm = make_norm(config, build.at("post_feedforward_layernorm"))

    @jax.jit
    def __call__(self, x: jax.Array, cache: Any, step: StepContext) -> tuple[jax.Array, Any]:
        """Applies the layer to `[T, D]`; see `Attention` for the rest."""
        attended, cache = self.self_attn(self.input_layernorm(x), cache, step)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), step)), cache


class Gemma2ForCausalLM(CausalLM):
    """Gemma 2."""

    layer_class = GemmaLayer

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`; soft caps of null mean none, and none given means 50 (scores) and 30 (logits)."""
        fields = gemma_fields(hf, max_position_embeddings=8192, rope_theta=10000.0)
        default_types = [FULL if layer % 2 else SLIDING for layer in range(fields["num_layers"])]
        return ModelConfig(
            architecture=architecture_of(hf),
            layer_types=tuple(hf.get("layer_types") or default_types),
            attention_soft_cap=hf.get("attn_logit_softcapping", 50.0),
            final_soft_cap=hf.get("final_logit_softcapping", 30.0),
            **fields,
        )


def gemma_fields(hf: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Returns what Gemma 2 and 3 have in common; `defaults` are for keys that `config.json` may leave out."""
    fields = common_fields(hf, defaults={"head_dim": 256, "tie_word_embeddings": True, **defaults})
    fields.update(
        sliding_window=hf.get("sliding_window", 4096),
        norm_unit_offset=True,
        attention_scale=float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
        embedding_scale=float(fields["hidden_size"]) ** 0.5,
        hidden_act=hf.get("hidden_activation") or "gelu_pytorch_tanh",  # `hidden_act` of old files is wrong
    )
    return fields
