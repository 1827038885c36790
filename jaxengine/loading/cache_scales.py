"""Reads the scales of cached keys and values that a checkpoint was quantised with."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.layers.cache_scale import CACHE_LIMITS, CacheScale
from jaxengine.models.layers.param import spec_of
from jaxengine.sharding.layout import ZEROS
from jaxengine.sharding.rules import named_sharding

ENDINGS = (".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale", ".kv_scale")
"""Of names of such tensors: vLLM's, compressed-tensors', and an older form that has one for both."""
STORED_DTYPE = "float8_e4m3fn"
"""What a checkpoint's scales are for."""


def fill_cache_scales(model: CausalLM, checkpoint: Checkpoint | None, cache_dtype: str, mesh: Mesh | None) -> None:
    """Fills the scales of a model whose layers are not stacked; 0 where a checkpoint has none.

    Raises:
        ValueError: A tensor has neither one number nor one for each head, or one that no scale can be.
    """
    available = set() if checkpoint is None else checkpoint.tensor_names()
    for path, variable in nnx.to_flat_state(nnx.state(model, CacheScale)):
        name, spec = ".".join(map(str, path)), spec_of(variable)
        ((part,),) = spec.parts
        stored = np.zeros(part.size, np.float32)
        for candidate in _candidates(model, name):
            if checkpoint is not None and candidate in available:
                stored = _read(checkpoint, candidate, part.size)
                stored *= CACHE_LIMITS[STORED_DTYPE] / CACHE_LIMITS[cache_dtype]
                break
        own = np.array([1.0 if head == ZEROS else stored[head] for head in part.units], np.float32)
        sharding = mesh and named_sharding(mesh, spec.axes, spec.shape)
        if sharding is None:
            variable.set_value(jax.device_put(own))
        else:
            variable.set_value(jax.make_array_from_callback(own.shape, sharding, own.__getitem__))


def _candidates(model: CausalLM, name: str) -> list[str]:
    layer, _, which = name.rpartition(".")
    letter = which[0]
    names = [f"{layer}.{which}", f"{layer}.{letter}_proj.{which}", f"{layer}.attn.{which}"]
    names += [f"{layer}.{letter}_proj.output_scale", f"{layer}.kv_scale"]
    return [prefix + each for each in names for prefix in (model.base_prefix, "")]


def _read(checkpoint: Checkpoint, name: str, num_heads: int) -> np.ndarray:
    """One scale for each head, f32[K]."""
    values = np.asarray(checkpoint.get(name), np.float32).reshape(-1)
    if values.size not in (1, num_heads):
        raise ValueError(f"tensor {name!r} has {values.size} numbers; expected 1, or {num_heads}, one for each head")
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"tensor {name!r} has a scale of {values.min()}; all must be above 0 and finite")
    return np.broadcast_to(values, (num_heads,)).copy()
