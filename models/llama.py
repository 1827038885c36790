"""Llama 2 and 3.x, and the models in their form (SmolLM2, TinyLlama, ...); Mistral, which adds a sliding window."""

from __future__ import annotations

from typing import Any

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import SLIDING, ModelConfig, common_fields
from jaxengine.models.registry import architecture_of


class LlamaForCausalLM(CausalLM):
    """Llama: pre-norm layers, rotary positions, gated MLP, grouped queries; arXiv 2302.13971, 2407.21783."""


class MistralForCausalLM(CausalLM):
    """Mistral: Llama with the same sliding window in every layer; arXiv 2310.06825."""

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`; a `sliding_window` of null means none, and none given means 4096."""
        fields = common_fields(hf, defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072})
        window = hf.get("sliding_window", 4096)
        return ModelConfig(
            architecture=architecture_of(hf),
            sliding_window=window,
            layer_types=() if window is None else (SLIDING,) * fields["num_layers"],
            **fields,
        )
