"""The programs that a step is compiled into, each named by a key, and what they need."""

from __future__ import annotations

import dataclasses

import jax

from jaxengine.runner.buckets import Bucket
from jaxengine.sampling.sampler import LogitsProcessor


@dataclasses.dataclass(frozen=True)
class RepeatKey:
    """A decode step that is run `NUM_REPEATS` times in one call, its sampler included; `features` 0 stands for none."""

    bucket: Bucket
    features: int = 0


@dataclasses.dataclass(frozen=True)
class SamplerKey:
    """One compiled sampler."""

    num_seqs: int
    features: int
    processors: tuple[LogitsProcessor, ...]


@dataclasses.dataclass(frozen=True)
class MaskKey:
    """What applies the masks of grammars to the logits of so many sequences."""

    num_seqs: int


@dataclasses.dataclass(frozen=True)
class PromptLogprobsKey:
    """The compiled log probabilities of prompts in steps of so many tokens."""

    num_tokens: int


@dataclasses.dataclass(frozen=True)
class SetSlotKey:
    """What initialises a row of the sampler's state."""


# Buckets stand for the model's part of a step.
ProgramKey = Bucket | RepeatKey | SamplerKey | MaskKey | PromptLogprobsKey | SetSlotKey


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """Memory of one device that a program needs beside its arguments.

    Raises:
        RuntimeError: The backend does not tell.
    """
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("this backend does not tell a program's memory: give kv_cache_memory_bytes")
    return memory.temp_size_in_bytes + max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
