"""Damaged GGUF files: odd metadata, and odd bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.unit.loading.test_gguf_tokenizer import byte_level_metadata

LAYERS, HIDDEN, FFN, HEADS = 1, 32, 32, 2


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """A small llama, with some metadata replaced, or left out where the value is None."""
    tokenizer = byte_level_metadata()
    vocab = len(tokenizer["tokenizer.ggml.tokens"])
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": LAYERS,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 64,
        **tokenizer,
        **metadata,
    }
    shapes = {"token_embd": (vocab, HIDDEN), "output_norm": (HIDDEN,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes[f"blk.0.{name}"] = (HIDDEN, HIDDEN)
    shapes |= {"blk.0.ffn_gate": (FFN, HIDDEN), "blk.0.ffn_up": (FFN, HIDDEN), "blk.0.ffn_down": (HIDDEN, FFN)}
    shapes |= {"blk.0.attn_norm": (HIDDEN,), "blk.0.ffn_norm": (HIDDEN,)}
    tensors = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    pairs = b"".join(_pair(key, value) for key, value in values.items() if value is not None)
    infos, data = b"", b""
    for name, tensor in tensors.items():
        dims = struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        infos += _text(name) + dims + struct.pack("<IQ", 0, len(data))
        data += tensor.tobytes() + bytes(-tensor.nbytes % 32)
    count = sum(value is not None for value in values.values())
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + pairs + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _pair(key: str, value: Any) -> bytes:
    kind, content = _value(value)
    return _text(key) + struct.pack("<I", kind) + content


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bytes):  # type and content as they are
        return struct.unpack("<I", value[:4])[0], value[4:]
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (11, struct.pack("<q", value)) if value < 0 else (10, struct.pack("<Q", value))
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        return 8, _text(value)
    kinds = [_value(item) for item in value]
    kind = kinds[0][0] if kinds else 10
    return 9, struct.pack("<IQ", kind, len(value)) + b"".join(content for _, content in kinds)


def nested(depth: int) -> bytes:
    """Arrays of one array, as deep as one likes."""
    return struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 10, 0)


ODD: dict[str, Any] = {
    "text": "x",
    "zero": 0,
    "minus": -1,
    "half": 0.5,
    "infinity": float("inf"),
    "nan": float("nan"),
    "true": True,
    "list": [],
    "texts": ["a", "b"],
    "million": 10**6,
    "billion": 10**9,
    "huge": 2**63,
    "nested": nested(3),
    "deep": nested(100_000),
    "nothing": None,
    "a count beyond the file": struct.pack("<IIQ", 9, 10, 2**60),
    "texts beyond the file": struct.pack("<IIQ", 9, 8, 2**60),
    "arrays beyond the file": struct.pack("<IIQ", 9, 9, 2**60),
    "an unknown type": struct.pack("<I", 99),
}
METADATA: dict[str, dict[str, Any]] = dict.fromkeys(
    (
        *("general.architecture", "general.alignment", "llama.block_count", "llama.embedding_length"),
        *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.layer_norm_rms_epsilon"),
        *("llama.context_length", "llama.rope.dimension_count", "llama.rope.scaling.type", "llama.feed_forward_length"),
        *("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.model"),
        *("tokenizer.ggml.eos_token_id", "tokenizer.ggml.pre", "tokenizer.chat_template"),
    ),
    ODD,
)


def _patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def _info(name: str, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


FIRST, NORM = "token_embd.weight", "output_norm.weight"
VOCAB = len(byte_level_metadata()["tokenizer.ggml.tokens"])
EMBEDDING = _info(FIRST, HIDDEN, VOCAB)
BYTES: dict[str, Callable[[bytes], bytes]] = {
    **{f"{n} tensors": lambda data, n=n: data[:8] + struct.pack("<Q", n) + data[16:] for n in (0, 1, 10**9, 2**63)},
    **{f"{n} pairs": lambda data, n=n: data[:16] + struct.pack("<Q", n) + data[24:] for n in (0, 1, 10**9, 2**63)},
    **{f"cut to {n}": lambda data, n=n: data[: int(n * len(data))] for n in (0.0, 0.01, 0.1, 0.5, 0.9, 0.999)},
    **{f"version {n}": lambda data, n=n: data[:4] + struct.pack("<I", n) + data[8:] for n in (0, 1, 4, 2**31)},
    "a name twice": lambda data: _patched(data, _text(NORM), _text(FIRST[: len(NORM)].ljust(len(NORM), "t"))),
    "many dimensions": lambda data: _patched(data, EMBEDDING, _text(FIRST) + struct.pack("<I", 2**32 - 1)),
    "no dimensions": lambda data: _patched(data, EMBEDDING, _info(FIRST)),
    "huge dimensions": lambda data: _patched(data, EMBEDDING, _info(FIRST, 2**62, 2**62)),
    "an unknown kind": lambda data: _patched(data, EMBEDDING, _info(FIRST, HIDDEN, VOCAB, kind=77)),
    "an offset beyond the file": lambda data: _patched(data, EMBEDDING, _info(FIRST, HIDDEN, VOCAB, offset=2**62)),
    "overlapping tensors": lambda data: data.replace(
        _info(NORM, HIDDEN, offset=VOCAB * HIDDEN * 4), _info(NORM, HIDDEN, offset=32)
    ),
    **{
        f"byte {n} flipped": lambda data, n=n: data[:n] + bytes([data[n] ^ 0xFF]) + data[n + 1 :]
        for n in range(24, 600, 16)
    },
}

gguf.GGUFReader  # noqa: B018 (the package that real files are written with must be there)
