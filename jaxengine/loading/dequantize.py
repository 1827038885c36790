"""Turns the quantised bytes of a GGUF tensor into bfloat16.

The most common formats are written out here, bit for bit as `gguf.quants` computes them but over thousands of blocks
at a time instead of 16 rows, and without importing that package; it is the fallback for every other format.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import ml_dtypes
import numpy as np

# Blocks of 32 handled at once. Fewer, and threads spend their time waiting for the interpreter lock; more, and the
# temporaries (about 2.5 MB a thread) leave the cache. Measured on 2 cores: 2.9 ns a weight at 4096, 1.9 at 8192.
_CHUNK_BLOCKS = 8192
_BLOCK = 32


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= scale


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    scale_min = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    _nibbles(blocks[:, 4:], out)
    out *= scale_min[:, :1]
    out += scale_min[:, 1:]


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    np.copyto(out, blocks[:, 2:].view(np.int8))
    out *= scale


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """Unpacks `packed` u8[n, 16] into `out` f32[n, 32]: the low halves of all bytes, then the high halves."""
    packed = packed.copy()  # contiguous: the two operations below then run at full vector width
    np.copyto(out[:, :16], packed & 15)
    np.copyto(out[:, 16:], packed >> 4)


_FORMATS: dict[str, tuple[int, Callable[[np.ndarray, np.ndarray], None]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
}


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="dequantize")


def dequantize(raw: np.ndarray, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantises one tensor.

    Args:
        raw: u8 of any shape, C-ordered: the stored blocks.
        type_name: The ggml type, such as `"Q4_1"`.
        shape: Shape of the result.

    Returns:
        `ml_dtypes.bfloat16[shape]`: the float32 values rounded to nearest, ties to even. Large tensors are done in
        several threads. Above the result, only a few MB a thread are used.

    Raises:
        ValueError: `gguf.quants` cannot dequantise that type.
    """
    out = np.empty(shape, ml_dtypes.bfloat16)
    if not out.size:
        return out
    if type_name in _FORMATS:
        block_bytes, convert = _FORMATS[type_name]
        block, chunk = _BLOCK, _CHUNK_BLOCKS
    else:
        block_bytes, block, convert = _fallback(type_name)
        chunk = _CHUNK_BLOCKS * _BLOCK // block
    blocks, flat = raw.reshape(-1, block_bytes), out.reshape(-1, block)

    def run(start: int) -> None:
        part = blocks[start : start + chunk]
        values = np.empty((len(part), block), np.float32)
        convert(part, values)
        flat[start : start + chunk] = values

    starts = range(0, len(blocks), chunk)
    if len(starts) == 1:
        run(0)
    else:
        list(_pool().map(run, starts))
    return out


def _fallback(type_name: str) -> tuple[int, int, Callable[[np.ndarray, np.ndarray], None]]:
    """(bytes of a block, elements of a block, converter) of a format by way of the `gguf` package."""
    import gguf

    kind = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]

    def convert(blocks: np.ndarray, out: np.ndarray) -> None:
        # As one long row: gguf would otherwise work on 16 short rows at a time.
        out[...] = gguf.dequantize(blocks.reshape(1, -1), kind).reshape(out.shape)

    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
        raise ValueError(f"tensors of type {type_name} cannot be dequantised; save the file as Q8_0 or BF16") from error
    return block_bytes, block, convert
