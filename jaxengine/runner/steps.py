"""The jitted step: embed, layers, logits, sample. One call a step, caches and state donated."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxengine.runner.input_batch import PackedLayout
from jaxengine.sampling.logprobs import Logprobs, empty_logprobs, gather_logprobs
from jaxengine.sampling.sampler import LogitsProcessor, greedy, record_last, sample
from jaxengine.sampling.state import SamplingState

PROMPT_LOGPROB_ROWS = 32  # rows whose logits are alive together


class StepOutputs(NamedTuple):
    """What a step returns to the host.

    Attributes:
        tokens: i32[S].
        logprobs: of the sampled tokens; None in the greedy variant.
        prompt_logprobs: of `targets`, one row a token; None in the greedy variant.
    """

    tokens: jax.Array
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


class FlatModel:
    """A model as a static definition and a flat list of arrays, so that a call does not walk modules."""

    def __init__(self, model: nnx.Module):
        self.graphdef, self.state = nnx.split(model)
        self.leaves, self.treedef = jax.tree.flatten(self.state)

    def merge(self, leaves: Sequence[jax.Array]) -> Any:
        return nnx.merge(self.graphdef, self.treedef.unflatten(leaves))


def make_step(
    model: FlatModel, layout: PackedLayout, *, full: bool, processors: Sequence[LogitsProcessor], num_top: int
):
    """The step for one bucket.

    Args:
        full: With the whole sampler; without, for steps in which every row is plain argmax.
        processors: Users' logits processors, in the order of the bits of `SamplingRows.processors`.
        num_top: Most likely tokens returned with log probabilities.

    Returns:
        step(leaves, caches, state, packed) -> (caches, state, StepOutputs); arguments 1 and 2 are to be donated.
    """

    def step(leaves, caches, state: SamplingState, packed: jax.Array):
        inputs = layout.unpack(packed)
        rows = inputs.rows
        lm = model.merge(leaves)
        # Only decodes feed on the token sampled last, and the i-th decode's token is the i-th row.
        num_seqs = layout.bucket.num_seqs
        first = inputs.token_ids[:num_seqs]
        first = jnp.where(first < 0, state.last_token[rows.slot], first)
        # Not `.at[:num_seqs].set`, which crashes jaxlib 0.11.2 under `shard_map` over the data axis.
        token_ids = jnp.concatenate([first, inputs.token_ids[num_seqs:]])
        hidden, caches = lm(token_ids, inputs.positions, caches, inputs.meta)  # [T, D]
        logits = lm.compute_logits(hidden[inputs.last_rows])  # f32[S, V]
        if not full:
            tokens = greedy(logits)
            state = dataclasses.replace(state, last_token=record_last(tokens, rows, state.last_token))
            return caches, state, StepOutputs(tokens, None, None)
        tokens, logprobs, state = sample(logits, rows, state, processors, num_top)
        prompt_logprobs = lax.cond(
            (inputs.targets >= 0).any(),
            lambda: _prompt_logprobs(lm.compute_logits, hidden, inputs.targets, num_top),
            lambda: empty_logprobs(hidden.shape[0], num_top),
        )
        return caches, state, StepOutputs(tokens, logprobs, prompt_logprobs)

    return step


def _prompt_logprobs(compute_logits, hidden: jax.Array, targets: jax.Array, num_top: int) -> Logprobs:
    """Log probabilities of `targets` i32[T] after each row, a few rows' logits at a time."""
    num_tokens = targets.shape[0]
    chunk = min(PROMPT_LOGPROB_ROWS, num_tokens)
    pad = -num_tokens % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets = jnp.pad(jnp.maximum(targets, 0), (0, pad)).reshape(-1, chunk)
    chunks = lax.map(lambda x: gather_logprobs(compute_logits(x[0]), x[1], num_top), (hidden, targets))
    return Logprobs(*(x.reshape(-1, *x.shape[2:])[:num_tokens] for x in chunks))
