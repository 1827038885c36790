"""A step seen from the host: what shape it needs, and what it gives once it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxengine.runner.buckets import Bucket
from jaxengine.runner.steps import ForwardOutputs
from jaxengine.sampling.logprobs import Logprobs
from jaxengine.scheduler.batch import ScheduledBatch


class StepShape(NamedTuple):
    """What decides which buckets hold a step: the most that any shard needs."""

    num_tokens: int
    num_seqs: int
    decode_only: bool

    @classmethod
    def of(cls, batches: Sequence[ScheduledBatch]) -> StepShape:
        """Returns the shape that holds the batches of all shards."""
        return cls(
            max(batch.num_tokens for batch in batches),
            max(len(batch.sequences) for batch in batches),
            all(batch.decode_only for batch in batches),
        )


class ForwardStep(NamedTuple):
    """A step whose tokens are still to be sampled.

    Attributes:
        orders: Of each shard: the rows of the step, as indices of its batch's sequences.
        packed: The step's buffer.
        tokens: The most likely ones, i32[S] of each shard.
    """

    batches: Sequence[ScheduledBatch]
    orders: list[list[int]]
    bucket: Bucket
    packed: np.ndarray
    tokens: jax.Array
    outputs: ForwardOutputs


class StepOutputs(NamedTuple):
    """What a step returns to the host, of all shards, one after the other.

    Attributes:
        tokens: i32[S], by row, or i32[S, times] of a step that ran several times; of no meaning where a row does not
            sample.
        logprobs: of the sampled tokens, if a request asks for any.
        prompt_logprobs: of the prompts' tokens, one row a token, if a request asks for any.
    """

    tokens: jax.Array
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


class ShardResult(NamedTuple):
    """What a step gave one shard.

    Attributes:
        sampled: Tokens of each of the batch's sequences; none where it does not sample.
        logprobs: Of the sampled tokens, by sequence; None if no sequence of the step asks.
        prompt_logprobs: Of prompt tokens, by row of the step, the sequences one after the other in the order of the
            step; None if no sequence asks.
        row_starts: First row of each of the batch's sequences in the step; zeros without `prompt_logprobs`.
    """

    sampled: list[list[int]]
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None
    row_starts: list[int]


class StepHandle:
    """A step under way. Its results are being copied to the host already."""

    def __init__(self, outputs: Sequence[StepOutputs], orders: list[list[int]], batches: Sequence[ScheduledBatch]):
        """Starts copying.

        Args:
            outputs: Of all shards, of each call; if the step runs several times, tokens alone.
            orders: Of each shard: indices of its sequences in the order of their rows.
            batches: Of each shard.
        """
        self._outputs, self._orders, self._batches = outputs, orders, batches
        for array in jax.tree.leaves(outputs):
            array.copy_to_host_async()

    def results(self) -> list[ShardResult]:
        """Waits for the step; one result for each shard."""
        num_shards = len(self._batches)
        outputs = jax.tree.map(lambda x: np.asarray(x).reshape(num_shards, -1, *x.shape[1:]), list(self._outputs))
        # i32[shards, S, times]
        tokens = np.concatenate([x.tokens.reshape(*x.tokens.shape[:2], -1) for x in outputs], axis=-1)
        return [
            _shard_result(tokens[i], jax.tree.map(lambda x, i=i: x[i], outputs[-1]), order, batch)
            for i, (order, batch) in enumerate(zip(self._orders, self._batches, strict=True))
        ]


def _shard_result(tokens: np.ndarray, outputs: StepOutputs, order: list[int], batch: ScheduledBatch) -> ShardResult:
    inverse = np.argsort(order)
    by_sequence = tokens[inverse].tolist()
    sampled = [own if sequence.samples else [] for own, sequence in zip(by_sequence, batch.sequences, strict=True)]
    logprobs = None if outputs.logprobs is None else Logprobs(*(x[inverse] for x in outputs.logprobs))
    starts, row = [0] * len(order), 0
    if outputs.prompt_logprobs is not None:
        for index in order:
            starts[index] = row
            row += batch.sequences[index].num_new_tokens
    return ShardResult(sampled, logprobs, outputs.prompt_logprobs, starts)
