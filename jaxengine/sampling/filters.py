"""Top-k, top-p and min-p without sorting the vocabulary."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxengine.sharding.mesh import COLUMNS, MODEL, model_axis_size, on_each_device

FEW = 64
"""A row whose `top_k` is at most this needs no more than its `top_few`."""
GROUPS = 128, 16
"""Neighbours that are looked at together: in the search for the largest few, and in what that leaves."""
BITS = 2
"""Of a threshold, found in one pass over the logits on accelerators: 3 sums take no longer than to read them."""


def top_few(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the `FEW` largest of each row; of equal ones any may be left out.

    They are in the `FEW` groups of neighbours whose maxima are largest, so it takes one pass over the logits, and the
    sorting of some hundred numbers.

    Args:
      logits: f32[S, V].

    Returns:
      f32[S, FEW], descending, and their columns, i32[S, FEW]; V of each if V is less.
    """
    ids = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32), logits.shape)
    values = logits
    for size in GROUPS:
        if values.shape[1] > FEW * size:
            padding = (0, 0), (0, -values.shape[1] % size)
            groups = jnp.pad(values, padding, constant_values=-jnp.inf).reshape(len(values), -1, size)
            groups_ids = jnp.pad(ids, padding).reshape(groups.shape)
            chosen = lax.top_k(groups.max(axis=-1), FEW)[1][:, :, None]
            values = jnp.take_along_axis(groups, chosen, axis=1).reshape(len(values), -1)
            ids = jnp.take_along_axis(groups_ids, chosen, axis=1).reshape(values.shape)
    values, places = lax.top_k(values, min(FEW, values.shape[1]))
    return values, jnp.take_along_axis(ids, places, axis=1)


def filter_few(values: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Returns what `filter_logits` makes of a row's `top_few`, f32[S, n], where `top_k` is 1 to n.

    It compares each pair of them.
    """
    top = values.max(axis=-1, keepdims=True)
    values = jnp.where(values - top >= jnp.log(min_p)[:, None], values, -jnp.inf)
    is_greater = values[:, None, :] > values[:, :, None]  # [S, n, n], whether the last axis's is
    kept = is_greater.sum(axis=-1) < top_k[:, None]
    weights = jnp.where(kept, jnp.exp(values - top), 0.0)
    mass_above = jnp.where(is_greater, weights[:, None, :], 0.0).sum(axis=-1)
    mass = top_p * weights.sum(axis=-1)
    kept &= (mass_above < mass[:, None]) | (top_p >= 1.0)[:, None]
    return jnp.where(kept, values, -jnp.inf)


def filter_logits(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, *, has_small_k: bool = False
) -> jax.Array:
    """Sets to -inf what the three filters leave out, in vLLM's order: min-p, then top-k, then top-p of what is left.

    A kept set is always "every token at or above a threshold", so ties with the last one are kept too. The threshold, a
    logit for top-k and a probability for top-p, is found a few bits at a time, in passes over the logits, for every row
    at once, and exact.

    Args:
      logits: f32[S, V], already divided by the temperature.
      top_k: i32[S]; 0 or V for all.
      top_p: f32[S] in (0, 1].
      min_p: f32[S] in [0, 1].
      has_small_k: whether every `top_k` is 0, or at most `FEW`, which is cheaper.
    """
    vocab_size = logits.shape[-1]
    top = logits.max(axis=-1, keepdims=True)
    logits = jnp.where(logits - top >= jnp.log(min_p)[:, None], logits, -jnp.inf)
    k = jnp.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    if has_small_k and model_axis_size() == 1:  # devices that share the columns would exchange them
        few = top_few(logits)[0]
        last = jnp.take_along_axis(few, jnp.clip(k - 1, 0, few.shape[1] - 1)[:, None], axis=1)
        kept = (logits >= last) | (k == vocab_size)[:, None]
    else:
        keys = _sortable(logits)
        kept = keys >= _threshold(keys, jnp.ones_like(logits), k.astype(jnp.float32), num_bits=32)[:, None]
    logits = jnp.where(kept, logits, -jnp.inf)
    weights = jnp.exp(logits - top)
    mass = top_p * weights.sum(axis=-1)
    # The bits of floats from 0 to 1 are in their order, and 30. So each pass reads one array, and not the logits too.
    keys = lax.bitcast_convert_type(weights, jnp.uint32)
    kept = (keys >= _threshold(keys, weights, mass, num_bits=30)[:, None]) | (top_p >= 1.0)[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def _sortable(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 so that the order is kept."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys: jax.Array, weights: jax.Array, target: jax.Array, *, num_bits: int) -> jax.Array:
    """Largest t with sum(weights where keys >= t) >= target, for each row of keys of so many bits: u32[S]."""
    # On a CPU the comparisons take the time, so 1 bit a pass, in a loop. On accelerators it is memory and launches:
    # several bits, a sum for each of their values in a pass, and no loop, since a GPU's host would launch the passes of
    # a loop one by one.
    by_platform = [functools.partial(find, num_bits=num_bits) for find in (_bit_by_bit, _several_bits_at_a_time)]
    return lax.platform_dependent(keys, weights, target, cpu=by_platform[0], default=by_platform[1])


def _bit_by_bit(keys: jax.Array, weights: jax.Array, target: jax.Array, *, num_bits: int = 32) -> jax.Array:
    def set_bit(i, t):
        candidate = t | (jnp.uint32(1) << (num_bits - 1 - i).astype(jnp.uint32))
        above = jnp.where(keys >= candidate[:, None], weights, 0.0).sum(axis=-1)
        return jnp.where(above >= target, candidate, t)

    return lax.fori_loop(0, num_bits, set_bit, jnp.zeros(keys.shape[0], jnp.uint32))


def _several_bits_at_a_time(keys: jax.Array, weights: jax.Array, target: jax.Array, *, num_bits: int = 32) -> jax.Array:
    found = jnp.zeros(keys.shape[0], jnp.uint32)
    for shift in reversed(range(0, num_bits, BITS)):
        candidates = [found | jnp.uint32(digit << shift) for digit in range(1, 2 ** min(BITS, num_bits - shift))]
        above = _sums([jnp.where(keys >= candidate[:, None], weights, 0.0) for candidate in candidates])
        # Sums fall as candidates rise: as many digits as have sums that are large enough.
        digit = sum((x >= target).astype(jnp.uint32) for x in above)
        found |= digit << shift
    return found


def _sums(rows: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Sums over the last axis of [S, V], in one pass over what the operands have in common.

    Devices that share the columns exchange all their sums at once.
    """

    def of_one_device(*parts):
        zeros = [jnp.zeros((), x.dtype) for x in parts]
        return lax.reduce(list(parts), zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], dimensions=(1,))

    size = model_axis_size()
    if size == 1 or rows[0].shape[1] % size:
        return of_one_device(*rows)

    def of_all(*parts):
        return lax.psum(tuple(of_one_device(*parts)), MODEL)

    return on_each_device(of_all, (COLUMNS,) * len(rows))(*rows)
