"""What sampling keeps on the device from step to step, one row a running request."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.sampling_params import MAX_BAD_WORD_LEN, MAX_BAD_WORDS

# Bits of SamplingState.token_flags.
IN_PROMPT = 1
IS_STOP = 2
IS_BANNED = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """R = max_num_seqs rows, with stale data in those whose request does not use them.

    Attributes:
      recent_tokens: i32[R, MAX_BAD_WORD_LEN - 1], the newest output tokens, newest last; -1 where there are fewer.
      output_counts: i32[R, V], how often each token was output.
      token_flags: u8[R, V], IN_PROMPT | IS_STOP | IS_BANNED.
      logit_bias: f32[R, V].
      bad_words: i32[R, MAX_BAD_WORDS, MAX_BAD_WORD_LEN], aligned right, padded with -1.
    """

    recent_tokens: jax.Array
    output_counts: jax.Array
    token_flags: jax.Array
    logit_bias: jax.Array
    bad_words: jax.Array


def make_sampling_state(num_rows: int, vocab_size: int) -> SamplingState:
    """Returns the state of so many rows that nobody uses yet."""
    return SamplingState(
        recent_tokens=jnp.full((num_rows, MAX_BAD_WORD_LEN - 1), -1, jnp.int32),
        output_counts=jnp.zeros((num_rows, vocab_size), jnp.int32),
        token_flags=jnp.zeros((num_rows, vocab_size), jnp.uint8),
        logit_bias=jnp.zeros((num_rows, vocab_size), jnp.float32),
        bad_words=jnp.full((num_rows, MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, jnp.int32),
    )


class SlotValues(NamedTuple):
    """One row of the state, built on the host."""

    recent_tokens: np.ndarray
    output_counts: np.ndarray
    token_flags: np.ndarray
    logit_bias: np.ndarray
    bad_words: np.ndarray


def set_slot(state: SamplingState, slot: jax.Array, values: SlotValues) -> SamplingState:
    """Initialises one row when a request that uses it takes the slot, i32[]; out of range, it is nobody's."""
    changed = {name: getattr(state, name).at[slot].set(value, mode="drop") for name, value in values._asdict().items()}
    return dataclasses.replace(state, **changed)


def slot_values(request, vocab_size: int) -> SlotValues:
    """Builds the row of a request from its sampling parameters and the tokens known so far.

    `SamplingParams.bad_words_token_ids` holds the tokenised bad words; the front end has checked their limits.
    """
    params = request.sampling_params
    outputs = np.asarray(request.output_token_ids, np.int64)
    recent = np.full(MAX_BAD_WORD_LEN - 1, -1, np.int32)
    newest = outputs[-len(recent) :]
    recent[len(recent) - len(newest) :] = newest
    flags = np.zeros(vocab_size, np.uint8)
    flags[np.asarray(request.prompt_token_ids, np.int64)] |= IN_PROMPT
    stops = [t for t in request.stop_token_ids if t < vocab_size]
    flags[stops] |= IS_STOP
    if params.allowed_token_ids is not None:
        banned = np.full(vocab_size, IS_BANNED, np.uint8)
        banned[params.allowed_token_ids] = 0
        flags |= banned
    bias = np.zeros(vocab_size, np.float32)
    for token_id, value in (params.logit_bias or {}).items():
        bias[token_id] = value
    bad_words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_LEN), -1, np.int32)
    for i, word in enumerate(params.bad_words_token_ids or ()):
        bad_words[i, MAX_BAD_WORD_LEN - len(word) :] = word
    counts = np.bincount(outputs, minlength=vocab_size).astype(np.int32)
    return SlotValues(recent, counts, flags, bias, bad_words)
