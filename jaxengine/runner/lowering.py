"""Lowers the programs of steps for the shapes and places of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxengine.runner.arrays import StepArrays
from jaxengine.runner.buckets import NUM_REPEATS, Bucket
from jaxengine.runner.input_batch import PackedLayout, RowLayout
from jaxengine.runner.placement import abstract
from jaxengine.runner.program_store import ProgramStore
from jaxengine.runner.programs import (
    MaskKey,
    ProgramKey,
    PromptLogprobsKey,
    RepeatKey,
    SamplerKey,
    SetSlotKey,
)
from jaxengine.runner.steps import (
    FlatModel,
    ForwardOutputs,
    make_forward,
    make_prompt_logprobs,
    make_repeat,
    make_sampler,
)
from jaxengine.sampling.sampler import EVERY_FEATURE, mask_logits
from jaxengine.sampling.state import SamplingState, SlotValues, set_slot


def lower(
    key: ProgramKey,
    model: FlatModel,
    leaf_places: Sequence[NamedSharding | None],
    layouts: Mapping[Bucket, PackedLayout],
    arrays: StepArrays,
    num_pages: int,
    store: ProgramStore | None = None,
) -> jax.stages.Lowered:
    """Lowers a program.

    Args:
        key: Which.
        model: The model; its leaves may be abstract.
        leaf_places: Where its leaves are.
        layouts: Of the steps' inputs.
        arrays: What a step needs beside the weights.
        num_pages: Pages of the cache of a shard.
        store: Where programs of one device are looked for, and kept; None for several devices.
    """
    place, num_top, vocab_size = arrays.place, arrays.config.max_logprobs, arrays.vocab_size
    leaves = list(map(abstract, model.leaves, leaf_places))
    state, last_token = arrays.abstract_state()
    logits_place, outputs = place.columns(vocab_size), place.outputs()
    shared: tuple[int, ...]  # arguments that all shards have in common
    donated: tuple[int, ...]
    out_shardings: Any  # what is carried must stay where it is
    match key:
        case Bucket() | RepeatKey():
            shared, donated = (0,), (1, 2) if isinstance(key, RepeatKey) else (1, 2, 4)
            function, rest, out_shardings = _step(key, model, layouts, arrays, num_pages)
            args = leaves, *rest
        case SamplerKey(num_seqs, features, processors):
            rows, shared, donated = RowLayout(num_seqs), (), (0, 1)
            function = make_sampler(rows, features=features, processors=processors, num_top=num_top)
            logits = abstract(arrays.own((num_seqs, vocab_size), jnp.float32), logits_place)
            args = (state if features == EVERY_FEATURE else None), last_token, logits, arrays.own((rows.size,))
            logprobs = outputs if features == EVERY_FEATURE else None
            out_shardings = *jax.tree.map(lambda x: x.sharding, args[:2]), outputs, logprobs
        case MaskKey(num_seqs):
            function, shared, donated = mask_logits, (), (0,)
            logits = abstract(arrays.own((num_seqs, vocab_size), jnp.float32), logits_place)
            args, out_shardings = (logits, arrays.own((num_seqs, arrays.num_mask_words))), logits_place
        case PromptLogprobsKey(num_tokens):
            function, shared, donated = make_prompt_logprobs(model, num_top), (0,), ()
            hidden = arrays.own((num_tokens, arrays.config.model.hidden_size), arrays.config.dtype)
            args = leaves, hidden, arrays.own((num_tokens,))
            out_shardings = outputs
        case SetSlotKey():
            function, shared, donated = _set_own_slot, (2,), (0,)
            values = SlotValues(*(getattr(state, name) for name in SlotValues._fields))
            values = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), values)
            values = jax.tree.map(lambda x: abstract(x, place.replicated()), values)
            args = state, arrays.own((1,)), values
            out_shardings = jax.tree.map(lambda x: x.sharding, state)
    function = place.of_every_shard(function, [i in shared for i in range(len(args))])
    options: dict[str, Any] = {"donate_argnums": donated, "keep_unused": True}
    if place.mesh is not None:
        options["out_shardings"] = out_shardings
    with place.context():
        jitted = jax.jit(function, **options)
        program = None if store is None else store.exported(key, jitted, args)
        if program is not None:
            jitted = jax.jit(_named(function.__name__, program.call), **options)
        return jitted.lower(*args)


def _step(
    key: Bucket | RepeatKey,
    model: FlatModel,
    layouts: Mapping[Bucket, PackedLayout],
    arrays: StepArrays,
    num_pages: int,
) -> tuple[Callable[..., Any], tuple, tuple]:
    """The function of a step, or of several; its arguments after the leaves; and where its results are."""
    place, (_, last_token) = arrays.place, arrays.abstract_state()
    bucket = key.bucket if isinstance(key, RepeatKey) else key
    layout = layouts[bucket]
    forward = make_forward(model, layout, sums_over_peers=arrays.sums_over_peers(bucket.num_tokens))
    caches = jax.eval_shape(lambda: arrays.make_caches(num_pages))
    caches = jax.tree.map(lambda x: abstract(x, place.heads()), caches)
    results = *jax.tree.map(lambda x: x.sharding, (caches, last_token)), place.outputs()
    if isinstance(key, Bucket):
        results = *results, ForwardOutputs(place.columns(arrays.vocab_size), place.shards())  # pyright: ignore[reportArgumentType]
        return forward, (caches, last_token, arrays.own((layout.size,)), arrays.abstract_held(bucket)), results
    sampler = None
    if key.features:
        sampler = make_sampler(layout.rows, features=key.features, processors=(), num_top=0)
    repeat = make_repeat(forward, sampler, layout.rows_start, NUM_REPEATS)
    return repeat, (caches, last_token, arrays.own((NUM_REPEATS * layout.size,))), results


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function by another name: that of the program in XLA's profiles."""

    def call(*args):
        return function(*args)

    call.__name__ = name
    return call


def _set_own_slot(state: SamplingState, slots: jax.Array, values: SlotValues) -> SamplingState:
    """`set_slot` with a shard's own slot, i32[1]."""
    return set_slot(state, slots[0], values)
