"""What is known of the platform before anything runs: the one place for choices made by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ACCELERATOR_DTYPE = "bfloat16"
MAX_TOKENS_OF_TRITON = 32
EIGHT_BITS = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}
STORED_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Dtypes(NamedTuple):
    """Names of dtypes: of activations and products, of the matrices, of the KV cache."""

    compute: str
    weights: str
    kv_cache: str


def resolve_dtypes(
    dtype: str, kv_cache_dtype: str, checkpoint_dtype: str | None, *, is_loop: bool = False, platform: str | None = None
) -> Dtypes:
    """What a model computes in, and what its matrices and its cache are held in.

    "auto" is the checkpoint's dtype, with two exceptions: float32 checkpoints run in bfloat16 on accelerators, as in
    vLLM, and CPUs without products in bfloat16 compute in float32, as they do for float16. There XLA's bfloat16 matmuls
    are far slower than float32's; on CPUs with such products they are faster. The cache keeps the checkpoint's dtype on
    every CPU: half the memory to read.

    So do a 16-bit checkpoint's matrices under float32 where the layers run in a loop: it copies each layer's matrices
    anyway, and converting them to float32 on the way loses nothing and halves what is read. Unrolled layers
    read float32 in place.

    Args:
        dtype: As in `EngineArgs`.
        kv_cache_dtype: As in `EngineArgs`.
        checkpoint_dtype: What the checkpoint says; None stands for float32.
        is_loop: Whether CPUs run the model's layers in a loop (`LayerStack`).
        platform: "cpu", "gpu" or "tpu"; by default that of JAX's backend.

    Raises:
        ValueError: A name that is not accepted.
    """
    accepted = ("auto", "bfloat16", "float16", "float32", "half", "float")
    names = {"half": "float16", "float": "float32"}
    if dtype not in accepted:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(accepted)}")
    if kv_cache_dtype == "fp8_e5m2":
        raise ValueError(
            "kv_cache_dtype='fp8_e5m2': keys and values have scales, so its range is of no use and its two bits of "
            "precision are too few; 'fp8' (e4m3) takes as little memory"
        )
    if kv_cache_dtype not in (*accepted, *EIGHT_BITS):
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r}: expected one of {', '.join((*accepted, *EIGHT_BITS))}")
    stored = checkpoint_dtype or "float32"
    if stored not in STORED_DTYPES:
        raise ValueError(f"the checkpoint's dtype is {stored!r:.100}; known are {', '.join(STORED_DTYPES)}")
    is_cpu = (platform or jax.default_backend()) == "cpu"
    if dtype == "auto":
        if is_cpu:
            chosen = "bfloat16" if stored == "bfloat16" and cpu_has_bfloat16() else "float32"
        else:
            chosen = ACCELERATOR_DTYPE if stored == "float32" else stored
        cache = stored if is_cpu else chosen
    else:
        chosen = cache = names.get(dtype, dtype)
    if kv_cache_dtype != "auto":
        cache = (names | EIGHT_BITS).get(kv_cache_dtype, kv_cache_dtype)
    is_narrow = is_cpu and is_loop and chosen == "float32" and stored in ("bfloat16", "float16")
    return Dtypes(jnp.dtype(chosen).name, stored if is_narrow else jnp.dtype(chosen).name, jnp.dtype(cache).name)


def compiler_options(platform: str, num_tokens: int) -> dict[str, Any]:
    """XLA's options for a program.

    On CPU, LLVM's level 1 compiles faster, and the step is as fast: the time is in library matmuls.

    On GPUs, XLA chooses for each product between cuBLAS and its own kernels in Triton, of which it compiles and times
    dozens. Up to `MAX_TOKENS_OF_TRITON` tokens these are faster. Beyond, cuBLAS alone is as fast, and a step
    compiles in less than half the time. Autotuning itself stays.

    Args:
        platform: "cpu", "gpu" or "tpu".
        num_tokens: Rows of the program's products.
    """
    if platform == "cpu":
        return {"xla_backend_optimization_level": 1}
    if platform == "gpu" and num_tokens > MAX_TOKENS_OF_TRITON:
        return {"xla_gpu_enable_triton_gemm": False}
    return {}


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 itself: AVX512-BF16 or AMX, as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags
