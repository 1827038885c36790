"""Qwen 3, dense: Llama with a norm on each query and key head; arXiv 2505.09388."""

from __future__ import annotations

from typing import Any

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig, common_fields
from jaxengine.models.qwen2 import window_fields
from jaxengine.models.registry import architecture_of


class Qwen3ForCausalLM(CausalLM):
    """Qwen 3, dense."""

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`."""
        fields = common_fields(hf, defaults={"head_dim": 128, "max_position_embeddings": 32768})
        return ModelConfig(
            architecture=architecture_of(hf), qk_norm="head", **window_fields(hf, fields["num_layers"]), **fields
        )
