"""Phi-3 and Phi-4-mini: Llama with fused tensors, partial rotation and longrope; arXiv 2404.14219."""

from __future__ import annotations

from typing import Any

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import SLIDING, ModelConfig, common_fields
from jaxengine.models.registry import architecture_of


class Phi3ForCausalLM(CausalLM):
    """Phi-3."""

    has_fused_tensors = True

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads `config.json`; "su" and "yarn" are the names that early files have for longrope."""
        hf = dict(hf)
        for key in ("rope_scaling", "rope_parameters"):
            if hf.get(key) and (hf[key].get("rope_type") or hf[key].get("type")) in ("su", "yarn"):
                hf[key] = {**hf[key], "rope_type": "longrope"}
        defaults = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
        fields = common_fields(hf, defaults=defaults)
        window = hf.get("sliding_window")
        return ModelConfig(
            architecture=architecture_of(hf),
            sliding_window=window,
            layer_types=() if window is None else (SLIDING,) * fields["num_layers"],
            **fields,
        )
