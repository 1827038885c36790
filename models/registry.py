"""Architectures that can be served: a table of strings, each module imported on use."""

from __future__ import annotations

import importlib
from typing import Any

MODELS: dict[str, str] = {
    "GPT2LMHeadModel": "gpt2:GPT2ForCausalLM",
    "Gemma2ForCausalLM": "gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "gemma3:Gemma3ForCausalLM",
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "MistralForCausalLM": "llama:MistralForCausalLM",
    "Olmo2ForCausalLM": "olmo2:Olmo2ForCausalLM",
    "Phi3ForCausalLM": "phi3:Phi3ForCausalLM",
    "Qwen2ForCausalLM": "qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "qwen3:Qwen3ForCausalLM",
    "SmolLM3ForCausalLM": "smollm3:SmolLM3ForCausalLM",
}


def architecture_of(config: dict[str, Any]) -> str:
    """Returns the first supported architecture that a `config.json` names.

    Raises:
        ValueError: It names none, or none that is supported.
    """
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in MODELS:
            return architecture
    raise ValueError(f"architectures is {named!r}; supported: {', '.join(sorted(MODELS))}")


def model_class(architecture: str) -> type[Any]:
    """Imports and returns the class of an architecture, a `CausalLM`.

    Raises:
        ValueError: The architecture is not in the table.
    """
    if architecture not in MODELS:
        raise ValueError(f"architecture is {architecture!r}; supported: {', '.join(sorted(MODELS))}")
    module, _, name = MODELS[architecture].partition(":")
    return getattr(importlib.import_module(f"jaxengine.models.{module}"), name)
