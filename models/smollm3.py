"""SmolLM3: Llama with every fourth layer without positions (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from typing import Any

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import FULL, SLIDING, ModelConfig, common_fields
from jaxengine.models.registry import architecture_of


class SmolLM3ForCausalLM(CausalLM):
    """SmolLM3."""

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`; in `no_rope_layers` a 1 marks a layer that does rotate."""
        defaults = {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        }
        fields = common_fields(hf, defaults=defaults)
        interval = hf.get("no_rope_layer_interval") or 4
        rotates = hf.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(fields["num_layers"])]
        rope_layers = tuple(bool(flag) for flag in rotates)[: fields["num_layers"]]
        window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
        default_types = [FULL if flag else SLIDING for flag in rope_layers]
        return ModelConfig(
            architecture=architecture_of(hf),
            rope_layers=rope_layers,
            sliding_window=window,
            layer_types=() if window is None else tuple(hf.get("layer_types") or default_types),
            **fields,
        )
