"""Gemma 3, text: five windowed layers to each full one, each kind with its own rotation; arXiv 2503.19786."""

from __future__ import annotations

from typing import Any

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import FULL, SLIDING, ModelConfig
from jaxengine.models.gemma2 import GemmaLayer, gemma_fields
from jaxengine.models.registry import architecture_of


class Gemma3ForCausalLM(CausalLM):
    """Gemma 3, the text model by itself."""

    layer_class = GemmaLayer

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`."""
        fields = gemma_fields(hf, max_position_embeddings=131072, rope_theta=1_000_000.0, rope_local_base_freq=10_000.0)
        pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
        default_types = [SLIDING if (layer + 1) % pattern else FULL for layer in range(fields["num_layers"])]
        return ModelConfig(
            architecture=architecture_of(hf),
            layer_types=tuple(hf.get("layer_types") or default_types),
            qk_norm="head",
            # `attn_logit_softcapping` is a leftover of Gemma 2: no implementation applies it.
            final_soft_cap=hf.get("final_logit_softcapping"),
            **fields,
        )
