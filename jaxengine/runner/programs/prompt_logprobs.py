"""Log probabilities of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import override

from jaxengine.runner.programs.base import PROMPTS, Argument, Definition, Program, ProgramContext, Rank
from jaxengine.runner.steps import make_prompt_logprobs
from jaxengine.sampling.sampler import LogitsProcessor


@dataclasses.dataclass(frozen=True)
class PromptLogprobs(Program):
    """The log probabilities of prompts' tokens, in steps of so many."""

    num_tokens: int

    @override
    def define(self, context: ProgramContext) -> Definition:
        config, arrays = context.config, context.arrays
        hidden = arrays.per_shard((self.num_tokens, config.model.hidden_size), config.dtype)
        leaves = Argument(context.abstract_leaves(), is_shared=True)
        return Definition(
            make_prompt_logprobs(context.model, config.max_logprobs),
            (leaves, Argument(hidden), Argument(arrays.per_shard((self.num_tokens,)))),
            context.place.outputs_sharding(),
        )

    @classmethod
    @override
    def warmup(cls, context: ProgramContext, processors: Sequence[LogitsProcessor]) -> Iterable[tuple[Rank, Program]]:
        for index, bucket in enumerate(context.warmup_order):
            yield (PROMPTS, index), cls(bucket.num_tokens)
