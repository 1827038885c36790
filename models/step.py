"""What the model and its layers are called with: a step's inputs, its context, and what comes of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxengine.models.layers.rope import RopeTable
from jaxengine.pallas_kernels.all_reduce import Workspace
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
    """The tokens of a step, sequence after sequence.

    Attributes:
        token_ids: i32[T]; what stands at padding is not looked at.
        positions: i32[T], each token's position in its own sequence.
        embeds: `[T, D]`, vectors that replace the embeddings of tokens, such as those of an image; None without any.
            They are not scaled; learned positions are added to them.
        embeds_mask: bool[T], the rows of `embeds` that do; None if and only if `embeds` is None.

    Raises:
        ValueError: `embeds` or `embeds_mask` comes without the other, or they do not have T rows.
    """

    token_ids: jax.Array
    positions: jax.Array
    embeds: jax.Array | None = None
    embeds_mask: jax.Array | None = None

    def __post_init__(self) -> None:
        if (self.embeds is None) != (self.embeds_mask is None):
            given, lacking = ("embeds", "embeds_mask") if self.embeds_mask is None else ("embeds_mask", "embeds")
            raise ValueError(f"{given} is given without {lacking}; give both or neither")

    def replace_rows(self, x: jax.Array) -> jax.Array:
        """Returns embeddings `[T, D]` with the rows of `embeds` in place of those that the mask names.

        Raises:
            ValueError: `embeds` is not like them.
        """
        if self.embeds is None or self.embeds_mask is None:
            return x
        if self.embeds.shape != x.shape or self.embeds_mask.shape != x.shape[:1]:
            raise ValueError(
                f"embeds is {self.embeds.shape}, embeds_mask {self.embeds_mask.shape}; they must be {x.shape} and "
                f"{x.shape[:1]}"
            )
        return jnp.where(self.embeds_mask[:, None], self.embeds.astype(x.dtype), x)

    def segment_ids(self) -> jax.Array:
        """Returns the number of each token's sequence, i32[T]: one begins where positions do not go on by one."""
        begins = self.positions[1:] != self.positions[:-1] + 1
        return jnp.pad(jnp.cumsum(begins, dtype=jnp.int32), (1, 0))


class ModelOutputs(NamedTuple):
    """What a model makes of a step.

    Attributes:
        hidden: `[T, D]`, after the final norm.
        taps: `[T, D]` for each of `ModelConfig.taps`: the residual between layers, before any norm.
        caches: The caches with the new keys and values.
    """

    hidden: jax.Array
    taps: tuple[jax.Array, ...]
    caches: list[Any]


class SlotRows(NamedTuple):
    """Where layers with a `SlotState` keep what, for the sequences of a step.

    Attributes:
        slots: i32[S], each sequence's row of the states; out of range, to be dropped, where there is no sequence.
        starts: i32[S], tokens that each sequence has had before this step. Where it is 0, the state is zeros, whatever
            the row holds.
        query_starts: i32[S + 1], row of each sequence's first new token; constant behind the last sequence.
    """

    slots: jax.Array
    starts: jax.Array
    query_starts: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepContext:
    """What all layers of a step read: made once a step, and passed to every layer.

    None, and an entry that no layer reads, compile to nothing.

    Attributes:
        attention: For each cache group (`CacheLayout.groups`): which tokens belong to which sequences and pages. The
            model adds the plans. A layer gets its own group's alone: see `of_group`.
        slots: Which rows of states belong to which sequences.
        rope: For each rotation (`ModelConfig.rotations`): cos and sin of the T positions. The model makes them.
        workspace: Where devices that share the model hand each other their parts of a sum, as `jax.Ref`s. Without, the
            compiler adds up what is shared.
        segment_ids: i32[T], of a step without caches: a token sees those before it with its own number. No kernel runs
            in such a step, so that gradients can be taken. None with caches.
    """

    attention: tuple[AttentionMetadata, ...] = ()
    slots: SlotRows | None = None
    rope: tuple[RopeTable, ...] = ()
    workspace: Workspace | None = None
    segment_ids: jax.Array | None = None

    @property
    def is_differentiable(self) -> bool:
        """Whether gradients may be taken, and no kernel may run."""
        return self.segment_ids is not None

    def of_group(self, group: int) -> StepContext:
        """Returns the context of a layer of a cache group.

        The layer does not see which group it is, so layers that are alike are traced once.
        """
        return dataclasses.replace(self, attention=self.attention[group : group + 1])


NO_CONTEXT = StepContext()
"""For a layer by itself, whose input no other device shares."""
