"""Models without weights."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.dense import Dense
from jaxengine.models.layers.matrix import Formats
from jaxengine.models.registry import model_class


def abstract_model(
    config: ModelConfig, dtype: DTypeLike, weight_dtype: DTypeLike | None = None, formats: Formats | None = None
) -> CausalLM:
    """Returns a model without weights, for the loader to fill and the runner to compile.

    Args:
        config: The model.
        dtype: Dtype of activations, and of norms and biases.
        weight_dtype: Dtype of the matrices that are held as they are; by default `dtype`.
        formats: Chooses the format of each matrix; by default all are held as they are.
    """
    dense = Dense(jnp.dtype(weight_dtype or dtype).name)
    return model_class(config.architecture)(config, dtype=dtype, formats=formats or (lambda path, parts: dense))
