"""Log probabilities of chosen tokens and of the most likely ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxengine.sharding.mesh import MODEL, model_axis_size


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
    """Returns zeros in the form of log probabilities."""
    return Logprobs(
        jnp.zeros((num_rows, 1 + num_top), jnp.int32),
        jnp.zeros((num_rows, 1 + num_top), jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
    )


def gather_logprobs(logits: jax.Array, token_ids: jax.Array, num_top: int) -> Logprobs:
    """Returns the log softmax of f32[R, V] logits at `token_ids` i32[R] and at the `num_top` best."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token_ids[:, None], axis=-1)
    ranks = jnp.sum(logprobs >= chosen, axis=-1, dtype=jnp.int32)
    best, best_ids = top_k(logprobs, num_top)
    return Logprobs(
        jnp.concatenate([token_ids[:, None], best_ids.astype(jnp.int32)], axis=1),
        jnp.concatenate([chosen, best], axis=1),
        ranks,
    )


GROUP = 128  # columns


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest of f32[R, V] and where they are, equal ones in order.

    Of devices that share the columns, each finds its own first.
    """
    size = model_axis_size()
    width = x.shape[1] // size
    if size == 1 or x.shape[1] % size or k > width:
        return _top_k(x, k)

    def of_one_device(part):  # [R, V / size]
        best, ids = _top_k(part, k)
        return best, ids + lax.axis_index(MODEL) * width

    columns = PartitionSpec(None, MODEL)
    best, ids = jax.shard_map(of_one_device, in_specs=columns, out_specs=(columns, columns))(x)  # [R, size * k]
    best, chosen = lax.top_k(best, k)
    return best, jnp.take_along_axis(ids, chosen, axis=1)


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """As `lax.top_k`, which sorts all columns; here only those of the k groups with the largest maxima."""
    num_rows, width = x.shape
    num_groups = -(-width // GROUP)
    if num_groups <= 2 * k:
        return lax.top_k(x, k)
    groups = jnp.pad(x, ((0, 0), (0, num_groups * GROUP - width)), constant_values=-jnp.inf)
    groups = groups.reshape(num_rows, num_groups, GROUP)
    _, chosen = lax.top_k(groups.max(axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal columns the first is found
    best, at = lax.top_k(jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(num_rows, -1), k)
    return best, jnp.take_along_axis(chosen, at // GROUP, axis=1) * GROUP + at % GROUP
