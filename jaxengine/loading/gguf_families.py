"""How each model family's GGUF metadata and tensor names translate to Hugging Face's.

The facts are those of llama.cpp's converter (its `conversion/` folder), and of what llama.cpp itself assumes where a
file is silent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_LAYERS, MAX_HEADS = 1024, 4096
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma 2 and 3 have norms on both sides of attention and of the MLP.
_GEMMA_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Not weights: what they hold goes into the configuration, or follows from it.
DERIVED_TENSORS = ("rope_freqs.weight",)
_DERIVED_SUFFIXES = (".attn_rot_embd.weight", ".rope_freqs.weight")


class Metadata:
    """Typed access to the keys of one architecture, with errors that name file and key.

    Attributes:
        arch: The value of `general.architecture`, which prefixes the keys.
    """

    def __init__(self, values: dict[str, Any], path: object):
        self._values, self._path = values, path
        arch = values.get("general.architecture", "")
        if not isinstance(arch, str):
            raise ValueError(f"{path}: metadata general.architecture is {arch!r:.100}, expected a text")
        self.arch: str = arch

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of `{arch}.{key}`."""
        return self._values.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: Any = None) -> Any:
        """Returns a scalar that must be there unless a default is given.

        An array of one value for all layers counts as one.

        Raises:
            ValueError: The key is missing, no number, or differs from layer to layer.
        """
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{self._path}: metadata {self.arch}.{key} is {value!r:.100}, expected one number")
        return value

    def count(self, key: str, default: Any = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """Returns an integer from `least` to `most`, otherwise as `number`."""
        value = self.number(key, default)
        if not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{self._path}: metadata {self.arch}.{key} is {value!r}, expected {least} to {most}")
        return value


@dataclass(frozen=True)
class Family:
    """One value of `general.architecture`.

    Attributes:
        architecture, model_type: Of the Hugging Face configuration.
        layer_names: Names within a block, in GGUF and in Hugging Face.
        extra: Adds the family's own keys to the configuration: `extra(config, metadata)`.
        permuted: The rows of q and k are in the order of llama.cpp's interleaved rope.
        norm_offset: What the file's norm weights have added.
    """

    architecture: str
    model_type: str
    layer_names: dict[str, str]
    extra: Callable[[dict[str, Any], Metadata], None]
    permuted: bool = False
    norm_offset: float = 0.0


def _llama(config: dict[str, Any], metadata: Metadata) -> None:
    if metadata.get("expert_count"):
        raise ValueError("GGUF files of mixture-of-experts models of architecture 'llama' (Mixtral) are not supported")


def _smollm3(config: dict[str, Any], metadata: Metadata) -> None:
    config["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]


def _qwen(config: dict[str, Any], metadata: Metadata) -> None:
    config["use_sliding_window"] = False


def _gemma2(config: dict[str, Any], metadata: Metadata) -> None:
    _gemma(config, metadata, period=2, layers_of_27b=46)
    config["attn_logit_softcapping"] = metadata.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = metadata.number("final_logit_softcapping", 30.0)


def _gemma3(config: dict[str, Any], metadata: Metadata) -> None:
    _gemma(config, metadata, period=6, layers_of_27b=62)
    config["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", 10000.0)
    config["attn_logit_softcapping"] = None
    config["final_logit_softcapping"] = metadata.get("final_logit_softcapping")


def _gemma(config: dict[str, Any], metadata: Metadata, *, period: int, layers_of_27b: int) -> None:
    num_layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    # The files do not say by what queries are scaled: the 27B models alone do not take the head dimension.
    is_27b = num_layers == layers_of_27b
    config["query_pre_attn_scalar"] = config["hidden_size"] // heads if is_27b else config["head_dim"]
    config["hidden_activation"] = config.pop("hidden_act")
    window = metadata.get("attention.sliding_window")
    pattern = metadata.get("attention.sliding_window_pattern", period)
    if not isinstance(pattern, list):
        period = metadata.count("attention.sliding_window_pattern", period)
        pattern = [(layer + 1) % period != 0 for layer in range(num_layers)]
    sliding = [bool(slides and window) for slides in pattern[:num_layers]]
    config["sliding_window"] = window
    config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", _LAYER, _llama, permuted=True),
    "smollm3": Family("SmolLM3ForCausalLM", "smollm3", _LAYER, _smollm3, permuted=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", _LAYER, _qwen),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", _LAYER, _qwen),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", _GEMMA_LAYER, _gemma2, norm_offset=1.0),
    "gemma3": Family("Gemma3ForCausalLM", "gemma3_text", _GEMMA_LAYER, _gemma3, norm_offset=1.0),
}


def family_of(metadata: Metadata, path: object) -> Family:
    """Returns the family of a file.

    Raises:
        ValueError: It is not supported; lists those that are.
    """
    if metadata.arch not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{path} has general.architecture {metadata.arch!r}; GGUF files are supported of {known}")
    return FAMILIES[metadata.arch]


def hf_name(gguf_name: str, family: Family) -> str | None:
    """Returns the Hugging Face name of a tensor; None if it holds no weights.

    Raises:
        ValueError: The family has no such tensor.
    """
    if gguf_name in DERIVED_TENSORS or gguf_name.endswith(_DERIVED_SUFFIXES):
        return None
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    layer, name, kind = match.groups() if match else (None, "", "")
    names = _TOP if layer is None else family.layer_names
    if name not in names:
        raise ValueError(f"the GGUF file holds tensor {gguf_name!r}, which {family.architecture} does not have")
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{names[name]}.{kind}"


def hf_config(metadata: Metadata, family: Family, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the configuration in Hugging Face's form, without token ids and dtype.

    Args:
        metadata: The file's.
        family: Its family.
        shapes: Of all tensors, by their names in the file.

    Raises:
        ValueError: A needed key or the embedding is missing.
    """
    if "token_embd.weight" not in shapes:
        raise ValueError("the GGUF file has no tensor 'token_embd.weight': it holds no language model")
    heads = metadata.count("attention.head_count", most=MAX_HEADS)
    hidden = metadata.count("embedding_length")
    key_length = metadata.count("attention.key_length", hidden // heads)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count", least=0, most=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads, most=MAX_HEADS),
        "head_dim": key_length,
        "hidden_act": "gelu_pytorch_tanh" if family.norm_offset else "silu",
        # Stored as float32: 9.999999747378752e-06 was 1e-05.
        "rms_norm_eps": _short_float(metadata.number("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": metadata.count("context_length"),
        "rope_theta": _short_float(metadata.number("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    rotary = metadata.count("rope.dimension_count", key_length)
    if rotary != key_length:
        config["partial_rotary_factor"] = rotary / key_length
    family.extra(config, metadata)
    return config


def _short_float(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    kind = metadata.get("rope.scaling.type") or ("linear" if metadata.get("rope.scale_linear") else "none")
    if kind == "none":
        return None
    factor = metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear"))
    if kind not in ("linear", "yarn") or not isinstance(factor, int | float):
        raise ValueError(
            f"metadata {metadata.arch}.rope.scaling has type {kind!r} and factor {factor!r}; supported are the types "
            "'none', 'linear' and 'yarn', with a factor"
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _short_float(factor)}
    optional = {
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    }
    for key, name in optional.items():
        if kind == "yarn" and metadata.get(key) is not None:
            value = metadata.number(key)
            scaling[name] = value if isinstance(value, int) else _short_float(value)
    return scaling


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Recovers Llama 3.x's rope scaling from `rope_freqs.weight`, which holds only its result.

    Args:
        factors: f32[head_dim / 2], what each rotary frequency is divided by.
        theta: Base of the frequencies.
        head_dim: H.

    Returns:
        The `rope_scaling` of Hugging Face.

    Raises:
        ValueError: No published Llama 3 scaling gives these factors.
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor = float(factors.max())
    low, high = 1.0, 4.0  # in every published model
    for original in (8192, 4096, 16384, 32768, 65536, 131072):
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": _short_float(factor),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError("the tensor rope_freqs.weight holds no Llama 3 rope scaling; other factors are not supported")
