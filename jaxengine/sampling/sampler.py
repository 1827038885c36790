"""Chooses the next token of every row, each with its own parameters.

The order is vLLM's: banned tokens and logit bias, bad words, min_tokens, the user's processors, penalties; then argmax,
or temperature, min-p, top-k, top-p and a draw. Log probabilities are those of the unchanged logits.

The sampler is compiled for sets of features: random draws, those among few tokens (top-k), those with other filters
but a large top-k, and everything. In the last, parts that no row of the step asks for are skipped at run time
(`lax.cond`). The others, which most requests need, do without: on a GPU the host waits for a condition's outcome, and
the device then for the host.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_2x32

from jaxengine.sampling.filters import filter_few, filter_logits, top_few
from jaxengine.sampling.logprobs import Logprobs, empty_logprobs, gather_logprobs
from jaxengine.sampling.state import IN_PROMPT, IS_BANNED, IS_STOP, SamplingState
from jaxengine.sharding.mesh import columns_in_place


class Feature(enum.IntFlag):
    """What a row asks for beyond argmax: the bits of `SamplingRows.features`.

    For what is done each step, take its `value`: an operation of a flag takes Python a microsecond.
    """

    RANDOM = 1
    FILTER = 2
    PENALTIES = 4
    TOKEN_RULES = 8
    """logit_bias or allowed_token_ids."""
    MIN_TOKENS = 16
    """Stop tokens are still forbidden."""
    BAD_WORDS = 32
    LOGPROBS = 64
    PROCESSORS = 128
    WIDE = 256
    """A random draw from what may be more than `filters.FEW` tokens."""
    LARGE_K = 512
    """top_k above `filters.FEW`."""


GREEDY = Feature(0)
# Features that read a row of SamplingState.
USES_STATE = Feature.PENALTIES | Feature.TOKEN_RULES | Feature.MIN_TOKENS | Feature.BAD_WORDS | Feature.PROCESSORS
EVERY_FEATURE = USES_STATE | Feature.RANDOM | Feature.FILTER | Feature.LOGPROBS | Feature.WIDE | Feature.LARGE_K
AMONG_FEW = Feature.RANDOM | Feature.FILTER
# What samplers are compiled for.
FEATURE_SETS = (Feature.RANDOM | Feature.WIDE, AMONG_FEW, Feature.RANDOM | Feature.FILTER | Feature.WIDE, EVERY_FEATURE)
_WITH_OTHERS = [(features, ~features.value) for features in FEATURE_SETS]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Parameters of the S rows of a step; rows that do not sample have no features.

    Attributes:
      slot: i32[S], row of the state.
      samples: i32[S], 1 where a token is sampled.
      features: i32[S], the bits of `Feature`.
      processors: i32[S], bit i for the engine's i-th logits processor.
      seed, position: i32[S], the draw's key is fold_in(seed, position); position counts output tokens.
      top_k: i32[S]; temperature, top_p, min_p, repetition, presence, frequency: f32[S].
    """

    slot: jax.Array
    samples: jax.Array
    features: jax.Array
    processors: jax.Array
    seed: jax.Array
    position: jax.Array
    top_k: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


class LogitsState(NamedTuple):
    """What a user's logits processor may look at, for its own request.

    Attributes:
      num_output_tokens: i32[], tokens output so far.
      last_token: i32[], the newest output token; meaningless while there is none.
      output_counts: i32[V], how often each token was output.
    """

    num_output_tokens: jax.Array
    last_token: jax.Array
    output_counts: jax.Array


LogitsProcessor = Callable[[jax.Array, LogitsState], jax.Array]


def greedy(logits: jax.Array) -> jax.Array:
    """Returns i32[S] of f32[S, V]: the whole sampler of a step in which no row has any feature."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def mask_logits(logits: jax.Array, bitmask: jax.Array) -> jax.Array:
    """Sets to -inf the f32[S, V] logits of tokens whose bits are not set in i32[S, ceil(V / 32)], lowest bit first."""
    num_rows, vocab_size = logits.shape
    allowed = (bitmask[:, :, None] >> jnp.arange(32)) & 1  # [S, V / 32, 32]
    return jnp.where(allowed.reshape(num_rows, -1)[:, :vocab_size] == 1, logits, -jnp.inf)


def feature_set(wanted: int) -> Feature:
    """Returns the smallest of `FEATURE_SETS` that has all wanted features."""
    return next(features for features, others in _WITH_OTHERS if not wanted & others)


def sample(
    logits: jax.Array,
    rows: SamplingRows,
    state: SamplingState | None,
    last_token: jax.Array,
    *,
    features: Feature,
    processors: Sequence[LogitsProcessor],
    num_top: int,
) -> tuple[SamplingState | None, jax.Array, jax.Array, Logprobs | None]:
    """Samples one token a row and notes it.

    Args:
      logits: f32[S, V].
      state: None unless `features` is EVERY_FEATURE.
      last_token: i32[R], the token sampled last in each slot.
      features: one of `FEATURE_SETS`; no row asks for others.
      num_top: most likely tokens returned with the log probabilities.

    Returns:
      the state with outputs counted; last_token; tokens i32[S]; their log probabilities (zeros unless some row asks),
      None unless `features` is EVERY_FEATURE.
    """
    if features != EVERY_FEATURE:
        if features == AMONG_FEW:
            tokens = _draw_among_few(logits, rows)
        else:
            tokens = _draw(
                logits, rows, lambda x: _filter(x, rows, has_small_k=True) if features & Feature.FILTER else x
            )
        return None, record_last(tokens, rows, last_token), tokens, None
    assert state is not None
    wanted = jnp.bitwise_or.reduce(rows.features)

    def when(feature: Feature, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        def apply(x):
            return columns_in_place(jnp.where((rows.features & feature.value != 0)[:, None], change(x), x))

        return columns_in_place(lax.cond(wanted & feature.value != 0, apply, columns_in_place, x))

    raw = logits
    logits = when(Feature.TOKEN_RULES, lambda x: _token_rules(x, rows, state), logits)
    logits = when(Feature.BAD_WORDS, lambda x: _ban_words(x, rows, state), logits)
    logits = when(Feature.MIN_TOKENS, lambda x: jnp.where(state.token_flags[rows.slot] & IS_STOP, -jnp.inf, x), logits)
    if processors:
        logits = when(Feature.PROCESSORS, lambda x: _apply_processors(x, rows, state, last_token, processors), logits)
    logits = when(Feature.PENALTIES, lambda x: _penalise(x, rows, state), logits)
    draw = functools.partial(_draw, rows=rows, filtered=lambda x: when(Feature.FILTER, lambda y: _filter(y, rows), x))
    tokens = lax.cond(wanted & Feature.RANDOM.value != 0, draw, greedy, logits)
    logprobs = lax.cond(
        wanted & Feature.LOGPROBS.value != 0,
        lambda x: gather_logprobs(x, tokens, num_top),
        lambda x: empty_logprobs(x.shape[0], num_top),
        raw,
    )
    return _record(tokens, rows, state), record_last(tokens, rows, last_token), tokens, logprobs


def _token_rules(logits, rows, state):
    logits = jnp.where(state.token_flags[rows.slot] & IS_BANNED, -jnp.inf, logits)
    return logits + state.logit_bias[rows.slot]


def _ban_words(logits, rows, state):
    """Bans the last token of a bad word where the newest outputs are the tokens before it."""
    words = state.bad_words[rows.slot]  # [S, B, W]
    before = words[:, :, :-1]
    matches = ((before == -1) | (before == state.recent_tokens[rows.slot][:, None])).all(axis=-1)  # [S, B]
    banned = jnp.where(matches & (words[:, :, -1] >= 0), words[:, :, -1], logits.shape[-1])
    return jax.vmap(lambda x, ids: x.at[ids].set(-jnp.inf, mode="drop"))(logits, banned)


def _apply_processors(logits, rows, state, last_token, processors):
    states = LogitsState(rows.position, last_token[rows.slot], state.output_counts[rows.slot])
    for i, processor in enumerate(processors):
        chosen = (rows.processors >> i) & 1 == 1
        logits = jnp.where(chosen[:, None], jax.vmap(processor)(logits, states), logits)
    return logits


def _penalise(logits, rows, state):
    """Repetition penalty (arXiv 1909.05858) over prompt and output; presence and frequency over the output."""
    counts = state.output_counts[rows.slot]
    seen = (counts > 0) | (state.token_flags[rows.slot] & IN_PROMPT != 0)
    factor = jnp.where(seen, rows.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    return logits - rows.frequency[:, None] * counts - rows.presence[:, None] * (counts > 0)


def _filter(scaled, rows, *, has_small_k=False):
    return filter_logits(scaled, rows.top_k, rows.top_p, rows.min_p, has_small_k=has_small_k)


def _draw(logits, rows, filtered):
    """Gumbel-max sampling; rows without RANDOM get their argmax."""
    is_random = (rows.features & Feature.RANDOM.value != 0)[:, None]
    scaled = logits / jnp.where(is_random, rows.temperature[:, None], 1.0)

    def noise(seed, position):
        return jax.random.gumbel(_key(seed, position), (logits.shape[-1],))

    drawn = filtered(scaled) + jax.vmap(noise)(rows.seed, rows.position)
    return greedy(jnp.where(is_random, drawn, logits))


def _draw_among_few(logits, rows):
    """Returns what `_draw` with filters gives where every random row has a `top_k` of at most `FEW`."""
    is_random = rows.features & Feature.RANDOM.value != 0
    values, ids = top_few(logits)
    scaled = values / jnp.where(is_random, rows.temperature, 1.0)[:, None]
    filtered = filter_few(scaled, rows.top_k, rows.top_p, rows.min_p)
    drawn = filtered + jax.vmap(_gumbel_of)(jax.vmap(_key)(rows.seed, rows.position), ids)
    chosen = jnp.take_along_axis(ids, drawn.argmax(axis=-1, keepdims=True), axis=1)[:, 0]
    return jnp.where(is_random, chosen, greedy(logits)).astype(jnp.int32)


def _key(seed, position):
    return jax.random.fold_in(jax.random.key(seed), position)


def _gumbel_of(key: jax.Array, ids: jax.Array) -> jax.Array:
    """`jax.random.gumbel(key, (V,))[ids]`, computed for those alone: each number is a hash of the key and its index."""
    count = jnp.concatenate([jnp.zeros_like(ids), ids]).astype(jnp.uint32)
    high, low = jnp.split(threefry_2x32(jax.random.key_data(key), count), 2)
    mantissa = (high ^ low) >> 9  # 23 bits, of a number in [1, 2)
    uniform = lax.bitcast_convert_type(mantissa | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def _record(tokens, rows, state):
    """Notes the sampled tokens in the rows that sample."""
    slot = jnp.where(rows.samples == 1, rows.slot, state.recent_tokens.shape[0])  # out of range: dropped
    recent = jnp.concatenate([state.recent_tokens[rows.slot][:, 1:], tokens[:, None]], axis=1)
    return dataclasses.replace(
        state,
        recent_tokens=state.recent_tokens.at[slot].set(recent, mode="drop"),
        output_counts=state.output_counts.at[slot, tokens].add(1, mode="drop"),
    )


def record_last(tokens: jax.Array, rows: SamplingRows, last_token: jax.Array) -> jax.Array:
    """Writes the sampled tokens where the next step will read them."""
    slot = jnp.where(rows.samples == 1, rows.slot, last_token.shape[0])
    return last_token.at[slot].set(tokens, mode="drop")
