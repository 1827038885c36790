"""Damaged model folders and files: each case is a function that writes one into a folder and returns its path."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.conftest import write_byte_tokenizer

DATA = Path(__file__).parent.parent / "data"
Case = Callable[[Path], Path]

DEEP = "[" * 200_000 + "]" * 200_000
VALUES: dict[str, str] = {
    "text": '"x"',
    "minus": "-1",
    "zero": "0",
    "half": "0.5",
    "true": "true",
    "list": "[]",
    "odd list": '[1, "a", null]',
    "object": '{"a": {}}',
    "million": "1000000",
    "billion": "1000000000",
    "digits": "9" * 30,
    "infinity": "Infinity",
    "nan": "NaN",
    "huge exponent": "1e999",
    "deep": DEEP,
}
"""What stands where something else should, as JSON."""
CONFIG_KEYS = {
    "llama3": (
        *("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
        *("rope_parameters", "eos_token_id", "dtype", "tie_word_embeddings", "attention_bias", "quantization_config"),
    ),
    "gemma3": ("layer_types", "sliding_window", "query_pre_attn_scalar", "final_logit_softcapping", "text_config"),
    "phi3_longrope_long": ("original_max_position_embeddings", "partial_rotary_factor"),
    "gpt2": ("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "layer_norm_epsilon", "activation_function"),
    "smollm3": ("no_rope_layers", "no_rope_layer_interval"),
}
ROPE_KEYS = ("factor", "rope_theta", "rope_type", "original_max_position_embeddings", "low_freq_factor")
GENERATION_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty", "eos_token_id", "bos_token_id")
TOKENIZER_KEYS = (
    "tokenizer_class",
    "eos_token",
    "chat_template",
    "added_tokens_decoder",
    "model_max_length",
    "auto_map",
)
TOKENIZER_PARTS = ("model", "added_tokens", "pre_tokenizer", "decoder", "normalizer", "post_processor", "version")
SOME = ("text", "minus", "list", "object", "digits", "infinity", "deep")


def write_model(folder: Path, family: str = "llama3", *, tokenizer: bool = False) -> Path:
    """A whole model."""
    for path in (DATA / family).iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, folder / path.name)
    if tokenizer:
        write_byte_tokenizer(folder)
    return folder


def with_value(path: Path, keys: tuple[str, ...], value: str) -> None:
    """Puts a value, as JSON, into a JSON file."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    inner = whole
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = "@@"
    path.write_text(json.dumps(whole).replace('"@@"', value))


def json_case(folder: Path, *, family: str, file: str, keys: tuple[str, ...], value: str) -> Path:
    write_model(folder, family, tokenizer=file.startswith("tokenizer"))
    with_value(folder / file, keys, VALUES[value])
    return folder


def text_case(folder: Path, *, file: str, content: bytes) -> Path:
    write_model(folder, tokenizer=True)
    (folder / file).write_bytes(content)
    return folder


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "no UTF-8": b"\xff\xfe{}",
    "cut": b'{"architectures": ["Ll',
    "deep": DEEP.encode(),
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "zeros": bytes(4096),
    "an object": b"{}",
    "surrogates": b'{"architectures": ["\\ud800"], "model_type": "\\udfff"}',
    "twice": b'{"architectures": 1, "architectures": ["LlamaForCausalLM"]}',
}
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def safetensors_bytes(header: str | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(**more: Any) -> str:
    return json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | more})


def raw_entry(field: str, value: str) -> str:
    return entry(**{field: "@@"}).replace('"@@"', value)


SAFETENSORS: dict[str, bytes] = {
    **{f"{f} {v}": safetensors_bytes(raw_entry(f, VALUES[v]), bytes(8)) for f in ("dtype", "shape") for v in VALUES},
    **{f"offsets {v}": safetensors_bytes(raw_entry("data_offsets", VALUES[v]), bytes(8)) for v in VALUES},
    **{f"shape of {v}": safetensors_bytes(raw_entry("shape", f"[{VALUES[v]}]"), bytes(8)) for v in VALUES},
    **{f"offset {v}": safetensors_bytes(raw_entry("data_offsets", f"[0, {VALUES[v]}]"), bytes(8)) for v in VALUES},
    **{f"an entry {v}": safetensors_bytes(f'{{"t": {VALUES[v]}}}', bytes(8)) for v in VALUES},
    **{f"metadata {v}": safetensors_bytes(f'{{"__metadata__": {VALUES[v]}}}') for v in VALUES},
    **{f"header {name}": safetensors_bytes(content) for name, content in CONTENTS.items()},
    "trailing bytes": safetensors_bytes(entry(), bytes(800)),
    "a hole": safetensors_bytes(entry(data_offsets=[8, 16]), bytes(16)),
    "header size": safetensors_bytes(entry(), bytes(8), size=2**63),
    "header size of the file": safetensors_bytes(entry(), bytes(8), size=4096),
    "many entries": safetensors_bytes(
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)})
    ),
    "many dimensions": safetensors_bytes(entry(shape=[1] * 100_000 + [2]), bytes(8)),
}

INDICES: dict[str, str] = {
    **{f"weight_map {v}": f'{{"weight_map": {VALUES[v]}}}' for v in VALUES},
    **{f"shard {v}": f'{{"weight_map": {{"t": {VALUES[v]}}}}}' for v in VALUES},
    "shard above": '{"weight_map": {"t": "../x.safetensors"}}',
    "shard absolute": '{"weight_map": {"t": "/etc/passwd"}}',
    "shard of nothing": '{"weight_map": {"t": ""}}',
    "shard with zero": '{"weight_map": {"t": "a\\u0000b"}}',
    "shard of this folder": '{"weight_map": {"t": "."}}',
    "shard long": json.dumps({"weight_map": {"t": "x" * 5000}}),
}


def index_case(folder: Path, *, text: str) -> Path:
    write_model(folder)
    (folder / "model.safetensors").rename(folder / "m-1-of-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def special_case(folder: Path, *, file: str, kind: str) -> Path:
    """Something else stands where a file should."""
    write_model(folder, tokenizer=True)
    path = folder / file
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/nowhere")
    return folder


def gguf_case(folder: Path, *, change: Callable[[bytes], bytes] = lambda data: data, **metadata: Any) -> Path:
    from tests.models.malformed.gguf_bytes import write_gguf

    path = folder / "model.gguf"
    write_gguf(path, metadata)
    path.write_bytes(change(path.read_bytes()))
    return path


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def orbax_case(folder: Path, *, file: str, change: Callable[[bytes], bytes]) -> Path:
    from tests.models.malformed.converted import copy_converted

    copy_converted(folder)
    (path,) = sorted(folder.glob(file))[:1]
    path.write_bytes(change(path.read_bytes()))
    return folder


def put(key: str, value: str) -> Callable[[bytes], bytes]:
    """Changes a key of a JSON object, the first of this name at any depth."""

    def change(data: bytes) -> bytes:
        whole = json.loads(data)
        waiting = [whole]
        while waiting:
            found = waiting.pop(0)
            if isinstance(found, dict):
                if key in found:
                    found[key] = "@@"
                    break
                waiting += found.values()
            elif isinstance(found, list):
                waiting += found
        return json.dumps(whole).replace('"@@"', value).encode()

    return change


def all_cases() -> dict[str, Case]:
    """All cases by name."""
    cases: dict[str, Case] = {}
    for family, keys in CONFIG_KEYS.items():
        for key in keys:
            for value in VALUES:
                name = f"config {family} {key} {value}"
                cases[name] = partial(json_case, family=family, file="config.json", keys=(key,), value=value)
    for key in ROPE_KEYS:
        for value in VALUES:
            keys = ("rope_parameters", key)
            cases[f"rope {key} {value}"] = partial(
                json_case, family="llama3", file="config.json", keys=keys, value=value
            )
    for file, names, values in (
        ("generation_config.json", GENERATION_KEYS, VALUES),
        ("tokenizer_config.json", TOKENIZER_KEYS, SOME),
        ("tokenizer.json", TOKENIZER_PARTS, SOME),
    ):
        for key in names:
            for value in values:
                cases[f"{file} {key} {value}"] = partial(
                    json_case, family="llama3", file=file, keys=(key,), value=value
                )
    for file in JSON_FILES:
        for name, content in CONTENTS.items():
            cases[f"{file} {name}"] = partial(text_case, file=file, content=content)
    for name, content in SAFETENSORS.items():
        cases[f"safetensors {name}"] = partial(text_case, file="model.safetensors", content=content)
    for name, text in INDICES.items():
        cases[f"index {name}"] = partial(index_case, text=text)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        for kind in ("fifo", "folder", "zero", "loop", "dangling"):
            cases[f"{kind} for {file}"] = partial(special_case, file=file, kind=kind)
    from tests.models.malformed.converted import ORBAX
    from tests.models.malformed.gguf_bytes import BYTES, METADATA

    for key, values in METADATA.items():
        for name, value in values.items():
            cases[f"gguf {key} {name}"] = partial(gguf_case, **{key: value})
    for name, change in BYTES.items():
        cases[f"gguf {name}"] = partial(gguf_case, change=change)
    for name, (file, change) in ORBAX.items():
        cases[f"orbax {name}"] = partial(orbax_case, file=file, change=change)
    return cases
