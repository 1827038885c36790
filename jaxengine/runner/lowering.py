"""Lowers and compiles programs for an engine, and measures what they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxengine.models.abstract import abstract_model
from jaxengine.runner.placement import bytes_on_a_device
from jaxengine.runner.program_store import ProgramStore, open_store
from jaxengine.runner.programs import ModelStep, Program, ProgramContext, Sampler
from jaxengine.sampling.sampler import EVERY_FEATURE, LogitsProcessor


def lower(program: Program, context: ProgramContext, store: ProgramStore | None = None) -> jax.stages.Lowered:
    """Lowers a program.

    Args:
        program: Which.
        context: The engine.
        store: Where programs of one device are looked for, and kept; None for several devices.
    """
    place, (function, arguments, out_shardings) = context.place, program.define(context)
    values = tuple(argument.value for argument in arguments)
    donated = tuple(i for i, argument in enumerate(arguments) if argument.is_donated)
    function = place.of_every_shard(function, [argument.is_shared for argument in arguments])
    options: dict[str, Any] = {"donate_argnums": donated, "keep_unused": True}
    if place.mesh is not None:
        options["out_shardings"] = out_shardings
    with place.context():
        jitted = jax.jit(function, **options)
        exported = None if store is None else store.exported(program, jitted, values)
        if exported is not None:
            jitted = jax.jit(_named(function.__name__, exported.call), **options)
        return jitted.lower(*values)


def compile_lowered(program: Program, context: ProgramContext, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles what `lower` has made of a program."""
    return lowered.compile(program.compiler_options(context.config.platform))


def compile_program(
    program: Program, context: ProgramContext, store: ProgramStore | None = None
) -> jax.stages.Compiled:
    """Lowers a program and compiles it, at once."""
    return compile_lowered(program, context, lower(program, context, store))


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Returns the memory of one device that a program needs beside its arguments.

    Raises:
        RuntimeError: The backend does not tell.
    """
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("this backend does not tell a program's memory: give kv_cache_memory_bytes")
    return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)


def bytes_beside_cache(
    context: ProgramContext, processors: tuple[LogitsProcessor, ...], when_nothing_is_stored: Callable[[], object]
) -> int:
    """Returns the memory of one device that the weights need, and the largest step and its sampler.

    A model of two layers tells: each layer's temporaries take the place of the one's before it.

    Args:
        context: The engine.
        processors: Users' functions in its samplers.
        when_nothing_is_stored: Called before the compilations if the programs of the small model are not in a store
            that there is: then those of the engine are not there either.
    """
    config, mesh, buckets = context.config, context.place.mesh, context.buckets
    model = config.model.first_layers(2)
    config = dataclasses.replace(config, model=model, num_pages=16, warmup="none")
    small = ProgramContext.make(abstract_model(model, config.dtype, config.weight_dtype), config, mesh)
    store = open_store(config, small.num_pages) if mesh is None else None
    step, sampler = ModelStep(buckets[-1]), Sampler(buckets[-1].num_seqs, EVERY_FEATURE, processors)
    if store is not None and store.lacks(step):
        when_nothing_is_stored()

    def measure(program: Program) -> int:
        return temporary_bytes(compile_program(program, small, store))

    with ThreadPoolExecutor() as pool:
        used = sum(pool.map(measure, (step, sampler)))
    reused_outputs = [x for bucket in buckets for x in jax.tree.leaves(context.arrays.abstract_reused_outputs(bucket))]
    return context.weight_bytes() + used + sum(bytes_on_a_device(x, x.sharding) for x in reused_outputs)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function by another name: that of the program in XLA's profiles."""

    def call(*args):
        return function(*args)

    call.__name__ = name
    return call
