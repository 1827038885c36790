"""Qwen 2 and 2.5: Llama with biases on queries, keys and values; arXiv 2407.10671."""

from __future__ import annotations

from typing import Any

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import FULL, SLIDING, ModelConfig, common_fields
from jaxengine.models.registry import architecture_of


class Qwen2ForCausalLM(CausalLM):
    """Qwen 2 and 2.5."""

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`."""
        fields = common_fields(hf, defaults={"max_position_embeddings": 32768})
        fields.update(qkv_bias=True, output_bias=False)
        return ModelConfig(architecture=architecture_of(hf), **window_fields(hf, fields["num_layers"]), **fields)


def window_fields(hf: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Returns Qwen's sliding windows.

    They are off unless `use_sliding_window` is true, and then in the layers from `max_window_layers` on.
    """
    window = hf.get("sliding_window", 4096)
    if not hf.get("use_sliding_window") or window is None:
        return {}
    first = hf.get("max_window_layers", 28)
    default = [SLIDING if layer >= first else FULL for layer in range(num_layers)]
    return {"sliding_window": window, "layer_types": tuple(hf.get("layer_types") or default)}
