"""What is known of the platform before anything runs: the one place for choices made by measurement."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ACCELERATOR_DTYPE = "bfloat16"


def resolve_dtypes(dtype: str, kv_cache_dtype: str, checkpoint_dtype: str | None) -> tuple[str, str]:
    """Dtypes of the weights and of the KV cache.

    "auto" is the checkpoint's dtype, with two exceptions: float32 checkpoints run in bfloat16 on accelerators, as in
    vLLM, and CPUs compute in float32. XLA's bfloat16 matmuls on a CPU without native bfloat16 read weights at 1 GB/s
    for one row, against 20 GB/s in float32, and are no faster for many (2 AVX2 cores, 2026-11-23). The cache keeps the
    checkpoint's dtype there: half the memory to read, and faster than float32 (1.2 against 1.8 ms a layer, 32 x 192).

    Raises:
        ValueError: A name that is not accepted.
    """
    accepted = ("auto", "bfloat16", "float16", "float32", "half", "float")
    names = {"half": "float16", "float": "float32"}
    if dtype not in accepted:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(accepted)}")
    if kv_cache_dtype not in accepted:
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r}: expected one of {', '.join(accepted)}")
    stored = checkpoint_dtype or "float32"
    if dtype == "auto":
        is_cpu = jax.default_backend() == "cpu"
        chosen = "float32" if is_cpu else (ACCELERATOR_DTYPE if stored == "float32" else stored)
        cache = stored if is_cpu else chosen
    else:
        chosen = cache = names.get(dtype, dtype)
    if kv_cache_dtype != "auto":
        cache = names.get(kv_cache_dtype, kv_cache_dtype)
    return jnp.dtype(chosen).name, jnp.dtype(cache).name
