"""Records what transformers computes with tiny random checkpoints of every family, for `test_reference_logits.py`.

Needs torch and transformers, which jaxengine itself does not: run it in an environment of its own,

    python tests/models/record_reference_logits.py

Every case becomes a folder of `tests/models/data` with `config.json` and `model.safetensors`, as transformers saves
them, and `reference.npz` with `token_ids` i64[T] and `logits` f32[T, V]. All parameters are random, norms and biases
too, so that a forgotten bias or `1 + weight` shows; windows are shorter than the prompt and soft caps are small enough
to bend what they cap. Weights are rounded to the dtype of the file before the logits are computed in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers

DATA = Path(__file__).parent / "data"
PROMPT_LEN = 40
VOCAB_SIZE = 64

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHI_FACTORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.0, 3.5, 5.0],
}


def rope(kind: str, **params: object) -> dict[str, object]:
    """Rope parameters as configurations have them."""
    return {"rope_type": kind, "rope_theta": 10000.0, **params}


# name: (config class, dtype of the file, config)
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama2": ("Llama", "float32", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_odd_heads": (
        "Llama",
        "bfloat16",
        {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama3": (
        "Llama",
        "bfloat16",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": rope(
                "llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "llama_bias": ("Llama", "float16", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("Llama", "bfloat16", {"rope_parameters": rope("linear", factor=4.0)}),
    "llama_yarn": (
        "Llama",
        "bfloat16",
        {"head_dim": 16, "rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama_yarn_mscale": (
        "Llama",
        "bfloat16",
        {
            "head_dim": 16,
            "rope_parameters": rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=256,
                mscale=1.0,
                mscale_all_dim=0.5,
                beta_fast=16.0,
                beta_slow=2.0,
                truncate=False,
            ),
        },
    ),
    "mistral": ("Mistral", "bfloat16", {"head_dim": 16, "sliding_window": 8}),
    "mistral_no_window": ("Mistral", "bfloat16", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", "bfloat16", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        "bfloat16",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", "bfloat16", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3_bias": ("Qwen3", "bfloat16", {"head_dim": 8, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        "bfloat16",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        "bfloat16",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_key_value_heads": 1,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "full_attention": rope("linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": rope("default"),
            },
        },
    ),
    "gemma3_soft_caps": (
        "Gemma3Text",
        "bfloat16",
        {
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "phi3": ("Phi3", "bfloat16", {"rope_parameters": rope("default", partial_rotary_factor=0.5)}),
    "phi3_window": ("Phi3", "bfloat16", {"sliding_window": 9, "num_key_value_heads": 4}),
    "phi3_longrope_short": (
        "Phi3",
        "bfloat16",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": rope("longrope", **PHI_FACTORS),
        },
    ),
    "phi3_longrope_long": (
        "Phi3",
        "bfloat16",
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 32,
            "rope_parameters": rope("longrope", **PHI_FACTORS),
        },
    ),
    "olmo2": ("Olmo2", "bfloat16", {}),
    "smollm3": (
        "SmolLM3",
        "bfloat16",
        {"no_rope_layer_interval": 2, "tie_word_embeddings": True, "rope_parameters": rope("default", rope_theta=2e6)},
    ),
    "smollm3_window": (
        "SmolLM3",
        "bfloat16",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9, "attention_bias": True},
    ),
    "gpt2": (
        "GPT2",
        "float32",
        {"vocab_size": VOCAB_SIZE, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64, "n_inner": 24},
    ),
}


def randomise(model: torch.nn.Module, rng: np.random.Generator, dtype: torch.dtype, is_offset: bool) -> None:
    """Fills every parameter with random numbers of a useful size, rounded to `dtype`."""
    for name, param in model.named_parameters():
        values = rng.standard_normal(tuple(param.shape))
        if param.ndim == 1:
            values = 0.3 * values
            if name.endswith("weight") and not is_offset:
                values += 1.0  # a norm
        elif "embed" not in name and "wte" not in name and "wpe" not in name:
            fan_in = param.shape[0] if "c_" in name else param.shape[1]
            values *= 1.5 / np.sqrt(fan_in)
        param.data = torch.tensor(values, dtype=torch.float32).to(dtype).to(torch.float32)


def record(name: str) -> float:
    """Records one case; returns the standard deviation of its logits."""
    family, dtype_name, overrides = CASES[name]
    dtype = getattr(torch, dtype_name)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**(overrides if family == "GPT2" else {**COMMON, **overrides}))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, rng, dtype, is_offset=family.startswith("Gemma"))
    token_ids = rng.integers(0, VOCAB_SIZE, PROMPT_LEN)
    with torch.no_grad():
        logits = model(torch.tensor(token_ids)[None]).logits[0].float().numpy()
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    np.savez(folder / "reference.npz", token_ids=token_ids, logits=logits.astype(np.float32))
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()), indent=2, sort_keys=True) + "\n")
    return float(logits.std())


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        print(f"{case}: logits have standard deviation {record(case):.2f}")
