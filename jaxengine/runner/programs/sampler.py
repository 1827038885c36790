"""What chooses tokens: the sampler, its state, and the masks of grammars."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import override

import jax

from jaxengine.runner.input_batch import RowLayout
from jaxengine.runner.placement import abstract
from jaxengine.runner.programs.base import (
    FIRST_STEPS,
    MASKS,
    STEPS,
    Argument,
    Definition,
    Program,
    ProgramContext,
    Rank,
)
from jaxengine.runner.steps import make_sampler
from jaxengine.sampling.sampler import EVERY_FEATURE, FEATURE_SETS, Feature, LogitsProcessor, mask_logits
from jaxengine.sampling.state import SamplingState, SlotValues, set_slot


def feature_sets(context: ProgramContext) -> list[Feature]:
    """Returns the sets of features that this engine has samplers for."""
    # Devices that share the vocabulary would exchange logits to find the largest few.
    is_shared = context.config.model.tensor_parallel_size > 1
    return [features for features in FEATURE_SETS if features & Feature.WIDE or not is_shared]


@dataclasses.dataclass(frozen=True)
class Sampler(Program):
    """The sampler of so many sequences, with the features of one set and users' functions."""

    num_seqs: int
    features: Feature
    processors: tuple[LogitsProcessor, ...]

    @override
    def define(self, context: ProgramContext) -> Definition:
        arrays, rows = context.arrays, RowLayout(self.num_seqs)
        num_top = context.config.max_logprobs
        has_state = self.features == EVERY_FEATURE
        state, last_token = arrays.abstract_state()
        state, outputs = state if has_state else None, context.place.outputs_sharding()
        shardings = jax.tree.map(lambda x: x.sharding, (state, last_token))
        return Definition(
            make_sampler(rows, features=self.features, processors=self.processors, num_top=num_top),
            (
                Argument(state, is_donated=True),
                Argument(last_token, is_donated=True),
                Argument(context.abstract_logits(self.num_seqs)),
                Argument(arrays.per_shard((rows.size,))),
            ),
            (*shardings, outputs, outputs if has_state else None),
        )

    @classmethod
    @override
    def warmup(cls, context: ProgramContext, processors: Sequence[LogitsProcessor]) -> Iterable[tuple[Rank, Program]]:
        for index, bucket in enumerate(context.warmup_order):
            for features in feature_sets(context):
                yield (STEPS, index), cls(bucket.num_seqs, features, tuple(processors))

    @property
    @override
    def can_be_stored(self) -> bool:
        return not self.processors


@dataclasses.dataclass(frozen=True)
class GrammarMask(Program):
    """What applies the masks of grammars to the logits of so many sequences."""

    num_seqs: int

    @override
    def define(self, context: ProgramContext) -> Definition:
        logits = context.abstract_logits(self.num_seqs)
        bitmask = context.arrays.per_shard((self.num_seqs, context.arrays.num_mask_words))
        return Definition(mask_logits, (Argument(logits, is_donated=True), Argument(bitmask)), logits.sharding)

    @classmethod
    @override
    def warmup(cls, context: ProgramContext, processors: Sequence[LogitsProcessor]) -> Iterable[tuple[Rank, Program]]:
        for index, bucket in enumerate(context.warmup_order):
            yield (MASKS, index), cls(bucket.num_seqs)


@dataclasses.dataclass(frozen=True)
class SetSlot(Program):
    """What initialises a row of the sampler's state."""

    @override
    def define(self, context: ProgramContext) -> Definition:
        arrays, replicated = context.arrays, context.place.replicated()
        state, _ = arrays.abstract_state()
        values = SlotValues(*(getattr(state, name) for name in SlotValues._fields))
        values = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), values)
        values = jax.tree.map(lambda x: abstract(x, replicated), values)
        return Definition(
            _set_own_slot,
            (Argument(state, is_donated=True), Argument(arrays.per_shard((1,))), Argument(values, is_shared=True)),
            jax.tree.map(lambda x: x.sharding, state),
        )

    @classmethod
    @override
    def warmup(cls, context: ProgramContext, processors: Sequence[LogitsProcessor]) -> Iterable[tuple[Rank, Program]]:
        yield (FIRST_STEPS, len(context.buckets)), cls()


def _set_own_slot(state: SamplingState, slots: jax.Array, values: SlotValues) -> SamplingState:
    """`set_slot` with a shard's own slot, i32[1]."""
    return set_slot(state, slots[0], values)
