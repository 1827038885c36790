"""Log probabilities of whole sequences, without a cache: what a loss is made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxengine.models.causal_lm import CausalLM
from jaxengine.models.step import ModelInputs


def token_log_probs(model: CausalLM, token_ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Returns the log probability of each token after those before it in its sequence.

    It is a pure function of the model's parameters, for `flax.nnx.grad`, and equals the engine's log probabilities up
    to rounding. `jax.vmap` over `token_ids` makes it one of a batch; sequences of different lengths are packed instead.

    Args:
        model: The model, with layers that are not stacked or with stacked ones.
        token_ids: i32[T], one sequence after the other; a caller leaves padding out of its loss.
        positions: i32[T], each token's position in its own sequence, as 0 1 2 0 1 for a sequence of three tokens and
            one of two; None for a single sequence.

    Returns:
        f32[T]; 0 for the first token of each sequence, which nothing predicts.
    """
    inputs = ModelInputs(token_ids, jnp.arange(token_ids.shape[0]) if positions is None else positions)
    logits = model.compute_logits(model(inputs).hidden)  # [T, V]
    chosen = jnp.take_along_axis(logits[:-1], token_ids[1:, None], axis=-1)[:, 0]
    log_probs = chosen - jax.nn.logsumexp(logits[:-1], axis=-1)
    segments = inputs.segment_ids()
    return jnp.pad(jnp.where(segments[1:] == segments[:-1], log_probs, 0.0), (1, 0))
