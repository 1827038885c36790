"""A model that writes what a test wants: greedy decoding of it follows a script, whatever the prompt says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SCRIPTS = {
    "call": [
        *("<think>", "I must", " look", ".</think>", "\n\n", "Let me see.", "\n<tool_", "call>\n"),
        *('{"name": "weather", ', '"arguments": {"city": "Par', 'is", "days": 2}}', "\n</tool_call>\n<tool_call>"),
        *('{"name": "clock", "arguments": {}', "}", "</tool_call>"),
    ],
    "broken": ['<tool_call>{"name": ', "weather}", "</tool_call"],
    "text": ["The", " weather", " is", " fine."],
}
"""Texts by name, in their tokens; no token comes twice, because each decides which one follows."""

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|{{ script or 'text' }}|>{% endif %}"
)
"""The variable `script` chooses what is written."""


def write_scripted_model(folder: Path) -> None:
    """Writes a Llama whose one layer does nothing: embeddings are unit vectors, the head leads to the next token."""
    from safetensors.numpy import save_file

    pieces = [piece for script in SCRIPTS.values() for piece in script]
    starts = [f"<|{name}|>" for name in SCRIPTS]
    assert len(set(pieces)) == len(pieces)
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *starts, *pieces]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    _write_tokenizer(folder, vocab, starts, pieces)
    size = -(-len(vocab) // 32) * 32
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
    config |= {"hidden_size": size, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": size}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
    config |= {"bos_token_id": None, "eos_token_id": vocab["<|end|>"]}
    (folder / "config.json").write_text(json.dumps(config))
    head = np.zeros((size, size), np.float32)
    for name, script in SCRIPTS.items():
        written = [f"<|{name}|>", *script, "<|end|>"]
        for token, following in itertools.pairwise(written):
            head[vocab[following], vocab[token]] = 10
    tensors = {"model.embed_tokens.weight": np.eye(size), "lm_head.weight": head, "model.norm.weight": np.ones(size)}
    layer = {
        **{f"self_attn.{part}_proj.weight": np.zeros((32, size)) for part in "qkv"},
        **{f"mlp.{part}_proj.weight": np.zeros((32, size)) for part in ("gate", "up")},
        **{f"{part}.weight": np.zeros((size, 32)) for part in ("self_attn.o_proj", "mlp.down_proj")},
        **{f"{part}_layernorm.weight": np.ones(size) for part in ("input", "post_attention")},
    }
    tensors |= {f"model.layers.0.{name}": tensor for name, tensor in layer.items()}
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors")


def _write_tokenizer(folder: Path, vocab: dict[str, int], starts: list[str], pieces: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<|end|>", *starts])
    # As in some models, what marks a call is a special token.
    marks = [piece for piece in pieces if "tool_call" in piece]
    tokenizer.add_special_tokens(marks)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces if piece not in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
