"""The programs that a step is compiled into. Each kind is one class, which says all there is to know of it.

To add a kind, write its class and name it in `PROGRAMS`: lowering, the store on disk, the processes that lower, the
warm-up and the count of compilations need nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxengine.runner.programs.base import Argument, Definition, Program, ProgramContext
from jaxengine.runner.programs.model_step import (
    LAZY_SHAPES,
    ModelStep,
    RepeatedStep,
    repeated_buckets,
    repeated_features,
)
from jaxengine.runner.programs.prompt_logprobs import PromptLogprobs
from jaxengine.runner.programs.sampler import GrammarMask, Sampler, SetSlot
from jaxengine.sampling.sampler import LogitsProcessor

__all__ = [
    "LAZY_SHAPES",
    "PROGRAMS",
    "Argument",
    "Definition",
    "GrammarMask",
    "ModelStep",
    "Program",
    "ProgramContext",
    "PromptLogprobs",
    "RepeatedStep",
    "Sampler",
    "SetSlot",
    "repeated_buckets",
    "repeated_features",
    "warmup_programs",
]

PROGRAMS: tuple[type[Program], ...] = (ModelStep, SetSlot, Sampler, RepeatedStep, PromptLogprobs, GrammarMask)


def warmup_programs(context: ProgramContext, processors: Sequence[LogitsProcessor]) -> list[Program]:
    """Returns every program that steps may need, each once, most needed first: steps of `LAZY_SHAPES` begin.

    Args:
        context: The engine.
        processors: Users' logits processors that it knows by now.
    """
    ranked = [pair for kind in PROGRAMS for pair in kind.warmup(context, processors)]
    ranked.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys(program for _, program in ranked))
