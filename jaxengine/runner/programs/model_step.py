"""The model's part of a step: once, or several times in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, override

import jax

from jaxengine.runner.buckets import MAX_REPEATED_SEQS, NUM_REPEATS, Bucket, fitting
from jaxengine.runner.placement import abstract
from jaxengine.runner.platform import compiler_options
from jaxengine.runner.programs.base import (
    FIRST_STEPS,
    LOOPS,
    STEPS,
    Argument,
    Definition,
    Program,
    ProgramContext,
    Rank,
)
from jaxengine.runner.programs.sampler import feature_sets
from jaxengine.runner.steps import ForwardOutputs, make_forward, make_repeat, make_sampler
from jaxengine.sampling.sampler import EVERY_FEATURE, GREEDY, Feature, LogitsProcessor

# What "lazy" compiles ahead: the first small bucket, and the decode of one request.
LAZY_SHAPES = 2


@dataclasses.dataclass(frozen=True)
class ModelStep(Program):
    """The model up to its logits and most likely tokens, for steps of one shape."""

    bucket: Bucket

    def __hash__(self) -> int:
        return hash(self.bucket)  # half the time of a dataclass's own; every step looks up several

    @override
    def define(self, context: ProgramContext) -> Definition:
        arrays, place = context.arrays, context.place
        layout = context.layouts[self.bucket]
        leaves, caches, last_token = _carried(context)
        outputs = ForwardOutputs(place.columns_sharding(arrays.vocab_size), place.shards_sharding())  # pyright: ignore[reportArgumentType]
        return Definition(
            _forward(self.bucket, context),
            (
                leaves,
                caches,
                last_token,
                Argument(arrays.per_shard((layout.size,))),
                Argument(arrays.abstract_reused_outputs(self.bucket), is_donated=True),
            ),
            (*_shardings(caches, last_token), place.outputs_sharding(), outputs),
        )

    @classmethod
    @override
    def warmup(cls, context: ProgramContext, processors: Sequence[LogitsProcessor]) -> Iterable[tuple[Rank, Program]]:
        for index, bucket in enumerate(context.warmup_order):
            yield (FIRST_STEPS if index < LAZY_SHAPES else STEPS, index), cls(bucket)

    @override
    def compiler_options(self, platform: str) -> dict[str, Any]:
        return compiler_options(platform, self.bucket.num_tokens)


@dataclasses.dataclass(frozen=True)
class RepeatedStep(Program):
    """A decode step that is run `NUM_REPEATS` times in one call, with its sampler if there are features."""

    bucket: Bucket
    features: Feature = GREEDY

    @override
    def define(self, context: ProgramContext) -> Definition:
        layout = context.layouts[self.bucket]
        sampler = None
        if self.features:
            sampler = make_sampler(layout.rows, features=self.features, processors=(), num_top=0)
        leaves, caches, last_token = _carried(context)
        return Definition(
            make_repeat(_forward(self.bucket, context), sampler, layout.rows_start, NUM_REPEATS),
            (leaves, caches, last_token, Argument(context.arrays.per_shard((NUM_REPEATS * layout.size,)))),
            (*_shardings(caches, last_token), context.place.outputs_sharding()),
        )

    @classmethod
    @override
    def warmup(cls, context: ProgramContext, processors: Sequence[LogitsProcessor]) -> Iterable[tuple[Rank, Program]]:
        buckets = repeated_buckets(context)
        for index, features in enumerate(repeated_features(context)):
            for bucket in context.warmup_order:
                if bucket in buckets:
                    yield (LOOPS, index), cls(bucket, features)


def repeated_features(context: ProgramContext) -> list[Feature]:
    """Returns the sets of features whose steps are run several times in one call; none is greedy steps'."""
    return [GREEDY, *(f for f in feature_sets(context) if f & Feature.FILTER and f != EVERY_FEATURE)]


def repeated_buckets(context: ProgramContext) -> frozenset[Bucket]:
    """Returns shapes of few decodes, if ever so many steps of them are planned at once that a loop can run them."""
    planned = context.config.scheduler.num_scheduler_steps
    if planned is not None and planned < NUM_REPEATS:
        return frozenset()
    sizes = {bucket.num_seqs for bucket in context.buckets if bucket.num_seqs <= MAX_REPEATED_SEQS}
    return frozenset(fitting(context.buckets, size, size, decode_only=True)[0] for size in sizes)


def _forward(bucket: Bucket, context: ProgramContext):
    sums_over_peers = context.arrays.sums_over_peers(bucket.num_tokens)
    return make_forward(context.model, context.layouts[bucket], sums_over_peers=sums_over_peers)


def _carried(context: ProgramContext) -> tuple[Argument, Argument, Argument]:
    """Returns the first arguments of both: parameters, caches, and the token sampled last in each slot."""
    arrays = context.arrays
    caches = jax.eval_shape(lambda: arrays.make_caches(context.num_pages))
    caches = jax.tree.map(lambda x: abstract(x, context.place.heads_sharding()), caches)
    _, last_token = arrays.abstract_state()
    leaves = Argument(context.abstract_leaves(), is_shared=True)
    return leaves, Argument(caches, is_donated=True), Argument(last_token, is_donated=True)


def _shardings(*carried: Argument) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda x: x.sharding, argument.value) for argument in carried)
