"""The jitted parts of a step: the model up to its most likely tokens, the sampler, log probabilities of prompts.

A step of greedy requests is one call. The other parts are programs of their own, so that the model is compiled once a
bucket and not once a way of sampling, and nothing in a step depends on a condition that the device must tell the host.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxengine.models.step import ModelInputs, StepContext
from jaxengine.pallas_kernels.all_reduce import Workspace
from jaxengine.runner.input_batch import PackedLayout, RowLayout
from jaxengine.sampling.logprobs import Logprobs, gather_logprobs
from jaxengine.sampling.sampler import Feature, LogitsProcessor, greedy, record_last, sample
from jaxengine.sampling.state import SamplingState

PROMPT_LOGPROB_ROWS = 32  # rows whose logits are alive together


class StepCaches(NamedTuple):
    """What the layers keep on the device from step to step.

    Attributes:
        layers: The model's caches (`CacheLayout`); a single one for stacked layers.
        workspace: Of sums over the devices that share the model, if any step adds up so.
    """

    layers: list[tuple[jax.Array, ...]]
    workspace: Workspace | None = None


class ForwardOutputs(NamedTuple):
    """What the model says.

    Attributes:
        logits: f32[S, V] after each sequence's last token.
        hidden: [T, D], the normalised hidden states.
    """

    logits: jax.Array
    hidden: jax.Array


class FlatModel:
    """A model as a static definition and a flat list of arrays, so that a call does not walk modules."""

    def __init__(self, model: nnx.Module):
        self.graphdef, self.state = nnx.split(model)
        self.leaves, self.treedef = jax.tree.flatten(self.state)

    def paths(self) -> list[str]:
        """Returns the dotted path of each leaf."""
        by_variable = {id(variable): ".".join(map(str, path)) for path, variable in nnx.to_flat_state(self.state)}
        variables = jax.tree.leaves(self.state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        return [by_variable[id(variable)] for variable in variables]

    def merge(self, leaves: Sequence[jax.Array]) -> Any:
        """Returns the model with these leaves."""
        return nnx.merge(self.graphdef, self.treedef.unflatten(leaves))


def make_forward(model: FlatModel, layout: PackedLayout, *, sums_over_peers: bool = False):
    """Returns the model's part of a step, for one bucket.

    Args:
        sums_over_peers: Whether the devices that share the model add up through the workspace of `caches`.

    Returns:
        forward(leaves, caches, last_token, packed, reused_outputs) -> (caches, last_token, tokens, ForwardOutputs);
        caches, last_token, i32[R], and reused_outputs are to be donated. The most likely tokens, i32[S], are noted in
        last_token too.
        `reused_outputs` is None, or outputs that nobody needs any more, whose memory the new ones take: see
        `memory.reserve_small_blocks`.
    """

    def forward(
        leaves,
        caches: StepCaches,
        last_token: jax.Array,
        packed: jax.Array,
        reused_outputs: ForwardOutputs | None = None,
    ):
        del reused_outputs
        inputs = layout.unpack(packed)
        lm = model.merge(leaves)
        # Only decodes feed on the token sampled last, and the i-th decode's token is the i-th row.
        num_seqs = layout.bucket.num_seqs
        first = inputs.token_ids[:num_seqs]
        first = jnp.where(first < 0, last_token[inputs.rows.slot], first)
        # Not `.at[:num_seqs].set`, which crashes jaxlib 0.11.2 under `shard_map` over the data axis.
        token_ids = jnp.concatenate([first, inputs.token_ids[num_seqs:]])
        workspace = jax.tree.map(jax.new_ref, caches.workspace) if sums_over_peers else None
        step = StepContext(inputs.attention, inputs.slots, workspace=workspace)
        hidden, _, layers = lm(ModelInputs(token_ids, inputs.positions), caches.layers, step)  # [T, D]
        caches = StepCaches(layers, jax.tree.map(jax.freeze, workspace) if sums_over_peers else caches.workspace)
        logits = lm.compute_logits(hidden[inputs.last_rows])  # f32[S, V]
        tokens = greedy(logits)
        return caches, record_last(tokens, inputs.rows, last_token), tokens, ForwardOutputs(logits, hidden)

    return forward


def make_repeat(forward: Callable[..., Any], sampler: Callable[..., Any] | None, rows_start: int, times: int):
    """Returns a decode step that is run several times in one call.

    Unrolled it would be no faster, for the host launches as many kernels; as a loop it is compiled as fast as one step.

    Args:
        forward: As `make_forward` makes it.
        sampler: As `make_sampler` makes it, without state; None if the most likely tokens are all that is wanted.
        rows_start: Where the sampler's part of a buffer begins.
        times: How often.

    Returns:
        repeat(leaves, caches, last_token, packed) -> (caches, last_token, tokens); caches and last_token are to be
        donated. `packed` holds the buffers of all times one after the other; tokens are i32[S, times].
    """

    def repeat(leaves, caches, last_token: jax.Array, packed: jax.Array):
        def once(carry, packed):
            caches, last_token, tokens, outputs = forward(leaves, *carry, packed)
            if sampler is not None:
                _, last_token, tokens, _ = sampler(None, last_token, outputs.logits, packed[rows_start:])
            return (caches, last_token), tokens

        carry, tokens = lax.scan(once, (caches, last_token), packed.reshape(times, -1))
        return *carry, tokens.T

    return repeat


def make_sampler(layout: RowLayout, *, features: Feature, processors: Sequence[LogitsProcessor], num_top: int):
    """Returns the sampler of steps of S sequences that ask for no other features than these.

    Args:
        processors: Users' logits processors, in the order of the bits of `SamplingRows.processors`.
        num_top: Most likely tokens returned with log probabilities.

    Returns:
        sampler(state, last_token, logits, packed) -> (state, last_token, tokens, logprobs), see `sample`; state and
        last_token are to be donated. `packed` is the rows' part of the step's buffer.
    """

    def sampler(state: SamplingState | None, last_token: jax.Array, logits: jax.Array, packed: jax.Array):
        rows = layout.unpack(packed)
        options: dict[str, Any] = {"features": features, "processors": processors, "num_top": num_top}
        return sample(logits, rows, state, last_token, **options)

    return sampler


def make_prompt_logprobs(model: FlatModel, num_top: int):
    """Returns log probabilities of `targets` i32[T] after each row of `hidden` [T, D], a few rows' logits at a time.

    Returns:
        prompt_logprobs(leaves, hidden, targets) -> Logprobs of T rows.
    """

    def prompt_logprobs(leaves, hidden: jax.Array, targets: jax.Array) -> Logprobs:
        lm = model.merge(leaves)
        num_tokens = targets.shape[0]
        chunk = min(PROMPT_LOGPROB_ROWS, num_tokens)
        pad = -num_tokens % chunk
        hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1])
        targets = jnp.pad(targets, (0, pad)).reshape(-1, chunk)
        chunks = lax.map(lambda x: gather_logprobs(lm.compute_logits(x[0]), x[1], num_top), (hidden, targets))
        return Logprobs(*(x.reshape(-1, *x.shape[2:])[:num_tokens] for x in chunks))

    return prompt_logprobs
