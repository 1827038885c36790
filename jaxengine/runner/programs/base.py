"""What every program says of itself, and what it may look at to say so."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxengine.config import EngineConfig
from jaxengine.kv_cache.groups import page_groups
from jaxengine.models.causal_lm import CausalLM
from jaxengine.runner.arrays import StepArrays
from jaxengine.runner.buckets import Bucket, make_buckets, warmup_order
from jaxengine.runner.input_batch import PackedLayout
from jaxengine.runner.page_tables import PageTables
from jaxengine.runner.placement import Placement, abstract, bytes_on_a_device
from jaxengine.runner.platform import compiler_options
from jaxengine.runner.steps import FlatModel
from jaxengine.sampling.sampler import LogitsProcessor


@dataclasses.dataclass(frozen=True)
class ProgramContext:
    """The engine that programs are lowered for. It holds no weights and no cache.

    Attributes:
        buckets: Shapes of the steps.
        layouts: Of their inputs.
        tables: The page tables of its cache groups.
        model: The model; its leaves are abstract.
        is_stacked: Whether its layers run in a loop.
        leaf_shardings: Of the model's leaves.
        arrays: What a step needs beside the weights.
        num_pages: Pages of the KV cache of each data-parallel shard; 0 as long as nobody knows.
    """

    config: EngineConfig
    buckets: list[Bucket]
    layouts: dict[Bucket, PackedLayout]
    tables: PageTables
    model: FlatModel
    is_stacked: bool
    leaf_shardings: list[NamedSharding | None]
    arrays: StepArrays
    num_pages: int

    @classmethod
    def make(cls, model: CausalLM, config: EngineConfig, mesh: Mesh | None = None) -> ProgramContext:
        """Makes the context of an engine.

        Args:
            model: The model without weights, as its class makes it without `rngs`.
            config: The engine's configuration.
            mesh: The devices; None for the default device.
        """
        scheduler, is_cpu = config.scheduler, config.platform == "cpu"
        tables = PageTables(page_groups(config), scheduler.max_model_len)
        buckets = make_buckets(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, coarse=is_cpu)
        is_stacked = is_cpu and model.stack_layers()
        flat, place = FlatModel(model), Placement(mesh)
        return cls(
            config=config,
            buckets=buckets,
            layouts={bucket: PackedLayout(bucket, tables, config.attention_backend) for bucket in buckets},
            tables=tables,
            model=flat,
            is_stacked=is_stacked,
            leaf_shardings=place.parameters(flat.state),
            arrays=StepArrays(config, place, is_stacked=is_stacked),
            num_pages=config.num_pages or 0,
        )

    @property
    def place(self) -> Placement:
        """Where everything is."""
        return self.arrays.place

    @functools.cached_property
    def warmup_order(self) -> list[Bucket]:
        """The shapes of the steps, most needed first."""
        return warmup_order(self.buckets)

    def abstract_leaves(self) -> list[jax.ShapeDtypeStruct]:
        """Returns the model's parameters as programs take them."""
        return list(map(abstract, self.model.leaves, self.leaf_shardings))

    def abstract_logits(self, num_seqs: int) -> jax.ShapeDtypeStruct:
        """Returns logits, f32[S, V] of each shard, as one program hands them to the next."""
        vocab_size = self.arrays.vocab_size
        return abstract(
            self.arrays.per_shard((num_seqs, vocab_size), jnp.float32), self.place.columns_sharding(vocab_size)
        )

    def weight_bytes(self) -> int:
        """Returns the bytes of all weights on one device."""
        return sum(map(bytes_on_a_device, self.model.leaves, self.leaf_shardings))


class Argument(NamedTuple):
    """An argument of a program.

    Attributes:
        value: Its arrays, abstract, with their shardings.
        is_shared: Whether all data-parallel shards have it in common; else its first axis is shared out.
        is_donated: Whether its memory becomes that of results.
    """

    value: Any
    is_shared: bool = False
    is_donated: bool = False


class Definition(NamedTuple):
    """A program for one engine.

    Attributes:
        function: What is traced, with one shard's arrays. Its name is the program's in XLA's profiles.
        arguments: In order.
        out_shardings: Of the results; what is carried from step to step must stay where it is. Of no effect on one
            device.
    """

    function: Callable[..., Any]
    arguments: tuple[Argument, ...]
    out_shardings: Any


Rank = tuple[int, int]
"""A place in the warm-up: one of the stages below, and a place in it. Programs of the same rank come in the order of
`PROGRAMS`."""
FIRST_STEPS, STEPS, LOOPS, PROMPTS, MASKS = range(5)


class Program(abc.ABC):
    """A program that steps call. Each kind is a frozen dataclass of few small fields that can be hashed and pickled.

    An instance names a program and is the key that it is queued, compiled and counted by; processes that lower get it
    through a pipe, and files are named by its `repr`. So it holds no engine: that comes as a `ProgramContext`.
    """

    @abc.abstractmethod
    def define(self, context: ProgramContext) -> Definition:
        """Returns the function, its arguments, and where they and its results are."""

    @classmethod
    @abc.abstractmethod
    def warmup(cls, context: ProgramContext, processors: Sequence[LogitsProcessor]) -> Iterable[tuple[Rank, Program]]:
        """Yields all programs of this kind that steps may need, and when each is compiled.

        Args:
            context: The engine.
            processors: Users' logits processors that it knows by now.
        """

    def compiler_options(self, platform: str) -> dict[str, Any]:
        """Returns XLA's options for it."""
        return compiler_options(platform, 0)

    @property
    def can_be_stored(self) -> bool:
        """Whether its name stands for the same program in other processes, at other times."""
        return True
