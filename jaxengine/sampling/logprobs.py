"""Log probabilities of chosen tokens and of the most likely ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Logprobs(NamedTuple):
    """Column 0 is the chosen token, then the K most likely, best first.

    Attributes:
      token_ids: i32[R, 1 + K].
      logprobs: f32[R, 1 + K].
      ranks: i32[R], 1 for the most likely token.
    """

    token_ids: jax.Array
    logprobs: jax.Array
    ranks: jax.Array


def empty_logprobs(num_rows: int, num_top: int) -> Logprobs:
    return Logprobs(
        jnp.zeros((num_rows, 1 + num_top), jnp.int32),
        jnp.zeros((num_rows, 1 + num_top), jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
    )


def gather_logprobs(logits: jax.Array, token_ids: jax.Array, num_top: int) -> Logprobs:
    """Log softmax of f32[R, V] logits at `token_ids` i32[R] and at the `num_top` best."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token_ids[:, None], axis=-1)
    ranks = jnp.sum(logprobs >= chosen, axis=-1, dtype=jnp.int32)
    best, best_ids = lax.top_k(logprobs, num_top)
    return Logprobs(
        jnp.concatenate([token_ids[:, None], best_ids.astype(jnp.int32)], axis=1),
        jnp.concatenate([chosen, best], axis=1),
        ranks,
    )
