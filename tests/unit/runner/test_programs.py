"""Programs as keys, and that one more kind needs one class."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jaxengine.engine_args import EngineArgs
from jaxengine.loading.resolve import resolve_model
from jaxengine.models.abstract import abstract_model
from jaxengine.runner import programs as programs_module
from jaxengine.runner.compiler import CompilationCounter
from jaxengine.runner.lowering import lower
from jaxengine.runner.program_store import open_store
from jaxengine.runner.programs import (
    LAZY_SHAPES,
    PROGRAMS,
    Argument,
    Definition,
    ModelStep,
    Program,
    ProgramContext,
    PromptLogprobs,
    RepeatedStep,
    Sampler,
    SetSlot,
    warmup_programs,
)
from jaxengine.runner.programs.base import PROMPTS
from jaxengine.runner.step_programs import StepPrograms
from jaxengine.sampling.sampler import FEATURE_SETS, Feature


@pytest.fixture
def engine(tiny) -> dict[str, Any]:
    """What `StepPrograms` and `ProgramContext.make` take."""
    args = EngineArgs(
        model=str(tiny),
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        num_scheduler_steps=4,
    )
    config = dataclasses.replace(args.resolve(resolve_model(tiny)), warmup="none", num_pages=20)
    return {"model": abstract_model(config.model, config.dtype, config.weight_dtype), "config": config}


def test_keys_are_small_and_mean_the_same_elsewhere(engine):
    keys = warmup_programs(ProgramContext.make(**engine), ())
    assert {type(key) for key in keys} == set(PROGRAMS)
    assert len({repr(key) for key in keys}) == len(keys)  # the store names files by them
    for key in keys:
        sent = pickle.dumps(key)
        assert len(sent) < 300
        assert pickle.loads(sent) == key
        assert hash(pickle.loads(sent)) == hash(key)
    assert all(a != b for a, b in itertools.combinations(keys, 2))


def test_users_functions_have_no_name_in_other_processes():
    assert Sampler(4, Feature.RANDOM, ()).can_be_stored
    assert not Sampler(4, Feature.RANDOM, (lambda logits, state: logits,)).can_be_stored


def test_what_steps_need_first_is_compiled_first(engine):
    context = ProgramContext.make(**engine)
    keys = warmup_programs(context, ())
    steps = [key.bucket for key in keys if isinstance(key, ModelStep)]
    assert steps == context.warmup_order
    assert keys[: LAZY_SHAPES + 1] == [*map(ModelStep, steps[:LAZY_SHAPES]), SetSlot()]
    for bucket, after in itertools.pairwise(steps[LAZY_SHAPES - 1 :]):  # with each step come its samplers
        for features in FEATURE_SETS:
            assert keys.index(Sampler(bucket.num_seqs, features, ())) < keys.index(ModelStep(after))
    kinds = [kind for kind, _ in itertools.groupby(map(type, keys))]
    assert [kind for kind in kinds if kind not in (ModelStep, Sampler, SetSlot)] == [
        RepeatedStep,
        PromptLogprobs,
        PROGRAMS[-1],
    ]


@dataclasses.dataclass(frozen=True)
class ShiftTokens(Program):
    """A kind that nobody but this test knows: changes the token sampled last in each slot."""

    distance: int

    def define(self, context: ProgramContext) -> Definition:
        def shift_tokens(last_token: jax.Array, by: jax.Array) -> jax.Array:
            return last_token + by[0] * self.distance

        _, last_token = context.arrays.abstract_state()
        by = jax.ShapeDtypeStruct((1,), np.int32, sharding=context.place.replicated())
        arguments = Argument(last_token, is_donated=True), Argument(by, is_shared=True)
        return Definition(shift_tokens, arguments, last_token.sharding)

    @classmethod
    def warmup(cls, context: ProgramContext, processors) -> Iterator[tuple[tuple[int, int], Program]]:
        yield (PROMPTS, -1), cls(3)


def test_one_more_kind_is_one_class(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(programs_module, "PROGRAMS", (*PROGRAMS, ShiftTokens))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        counter = CompilationCounter()
        with contextlib.closing(StepPrograms(**engine)) as programs:
            keys = warmup_programs(programs.context, ())
            assert isinstance(keys[keys.index(ShiftTokens(3)) + 1], PromptLogprobs)
            store = open_store(programs.config, programs.num_pages)
            assert store is not None
            assert store.lacks(ShiftTokens(3))
            start = counter.count
            shift = programs.get(ShiftTokens(3))
            assert counter.count == start + 1
            assert programs.get(ShiftTokens(3)) is shift
            assert not store.lacks(ShiftTokens(3))
            assert store.lacks(ShiftTokens(4))
            tokens = jax.numpy.arange(4, dtype=np.int32)
            assert shift(tokens, np.full(1, 2, np.int32)).tolist() == [6, 7, 8, 9]
            assert tokens.is_deleted()
        text = lower(ShiftTokens(3), programs.context).as_text()
        assert "jit_shift_tokens" in text
        assert "tf.aliasing_output" in text
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
