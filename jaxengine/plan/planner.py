"""Compiles an engine's real steps for a target, and works out what fits and what bounds each step's time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from jaxengine.bench.floor import decode_bytes, tokens_seen
from jaxengine.kv_cache.groups import PageGroup, most_pages, page_groups
from jaxengine.plan.targets import Chip

if TYPE_CHECKING:
    from jax.stages import Compiled

    from jaxengine.config import EngineConfig
    from jaxengine.runner.buckets import Bucket
    from jaxengine.runner.programs import ProgramContext

PLACEHOLDER_PAGES = 1024
"""Pages that steps are compiled with: how many there are changes nothing but the size of an argument."""
COLLECTIVE = re.compile(
    r"= (?P<shapes>\S[^=\n]*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
SHAPE = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,]*)\]")
COMMENT = re.compile(r"/\*.*?\*/")
BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class StepPlan:
    """One compiled step.

    Attributes:
        num_tokens, num_seqs, decode_only: Its shape.
        compile_s: Seconds to trace, lower and compile it here.
        temporary_bytes: On each device, beside weights and cache, without the sampler's.
        collectives: By kind: how many, and bytes of their results on one device.
        read_bytes: The least a device reads: its weights, and its part of keys and values of all sequences.
        flops: Of a device's products.
        roofline_ms: The longer of the times that these two take.
    """

    num_tokens: int
    num_seqs: int
    decode_only: bool
    compile_s: float
    temporary_bytes: int
    collectives: dict[str, tuple[int, int]]
    read_bytes: float
    flops: float
    roofline_ms: float


@dataclass
class Plan:
    """What a model needs on each device of a target.

    Attributes:
        weight_bytes, page_bytes: Of weights, and of one page, on one device.
        memory_bytes: What the engine may use of a device, states of layers left out.
        context: Tokens of every sequence that `read_bytes` and `flops` of steps assume.
        sampler_bytes: What the largest sampler needs beside the step's.
        sampler_collectives: Its collectives, as in `StepPlan`.
        groups: The cache groups: tokens of a page, and window.
        num_pages: Pages that fit beside the weights, states and the largest temporaries; 0 if nothing fits.
    """

    target: str
    device_kind: str
    num_devices: int
    tensor_parallel_size: int
    block_size: int
    max_model_len: int
    context: int
    weight_bytes: int
    page_bytes: int
    memory_bytes: int
    groups: tuple[PageGroup, ...]
    sampler_bytes: int = 0
    sampler_collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_pages: int = 0
    steps: list[StepPlan] = field(default_factory=list)

    @property
    def largest_temporaries(self) -> int:
        """Bytes beside weights and pages that the largest step and its sampler need."""
        return max(step.temporary_bytes for step in self.steps) + self.sampler_bytes

    def num_sequences(self, num_tokens: int) -> int:
        """Returns sequences of so many tokens that the pages hold while they decode."""
        return self.num_pages // most_pages(self.groups, num_tokens, 1)

    def to_json(self) -> dict[str, Any]:
        """Returns all figures."""
        return asdict(self) | {
            "num_sequences_of_max_model_len": self.num_sequences(self.max_model_len),
            "num_sequences_of_context": self.num_sequences(self.context),
        }


def make_plan(
    config: EngineConfig,
    target: str,
    devices: list[Any],
    chip: Chip,
    *,
    context: int,
    every_step: bool,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compiles steps and adds up what they need.

    Args:
        config: The engine, resolved for the target's platform, with `PLACEHOLDER_PAGES`.
        target: The target's name.
        devices: Of the target; the first `tensor_parallel_size` of them share the model. Of data-parallel shards each
            is as the first.
        chip: What one of them can do.
        context: Tokens of each sequence, for the rooflines.
        every_step: All step shapes; else the smallest and the largest of decodes, and the largest of prompts.
        progress: Is told what is being compiled.

    Raises:
        ValueError: There are fewer devices than it takes.
    """
    from jaxengine.runner.lowering import compile_program, temporary_bytes
    from jaxengine.runner.programs import Sampler
    from jaxengine.sampling.sampler import EVERY_FEATURE

    engine = _program_context(config, target, devices)
    plan = _empty_plan(config, target, devices, chip, context, engine.weight_bytes())
    all_buckets = engine.buckets
    buckets = all_buckets if every_step else _main_buckets(all_buckets)
    for number, bucket in enumerate(buckets, 1):
        progress(f"step {number} of {len(buckets)}: {bucket.num_tokens} tokens, {bucket.num_seqs} sequences ...")
        plan.steps.append(_plan_step(engine, bucket, chip, context))
    progress("the sampler ...")
    sampler = compile_program(Sampler(all_buckets[-1].num_seqs, EVERY_FEATURE, ()), engine)
    plan.sampler_bytes = temporary_bytes(sampler)
    plan.sampler_collectives = _collectives(sampler)
    plan.num_pages = max(plan.memory_bytes - plan.weight_bytes - plan.largest_temporaries, 0) // plan.page_bytes
    return plan


def _program_context(config: EngineConfig, target: str, devices: list[Any]) -> ProgramContext:
    """Returns what the steps are compiled for: the model over as many of the devices as it takes."""
    from jaxengine.models.abstract import abstract_model
    from jaxengine.runner.programs import ProgramContext
    from jaxengine.sharding.mesh import make_mesh

    num_shards, size = config.data_parallel_size, config.model.tensor_parallel_size
    if num_shards * size > len(devices):
        shards = f"data_parallel_size={num_shards} x " if num_shards > 1 else ""
        raise ValueError(f"{shards}tensor_parallel_size={size}: {target} has {len(devices)} devices")
    model = abstract_model(config.model, config.dtype, config.weight_dtype)
    return ProgramContext.make(model, config, make_mesh(num_shards, size, devices=devices))


def _empty_plan(
    config: EngineConfig, target: str, devices: list[Any], chip: Chip, context: int, weight_bytes: int
) -> Plan:
    """Returns a plan before anything is compiled."""
    from jaxengine.runner.memory import page_bytes, state_bytes

    return Plan(
        target=target,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        tensor_parallel_size=config.model.tensor_parallel_size,
        block_size=config.block_size,
        max_model_len=config.scheduler.max_model_len,
        context=context,
        weight_bytes=weight_bytes,
        page_bytes=page_bytes(config),
        memory_bytes=int(chip.memory_bytes * config.gpu_memory_utilization) - state_bytes(config),
        groups=page_groups(config),
    )


def _main_buckets(buckets: list[Bucket]) -> list[Bucket]:
    """Returns the smallest and the largest step of decodes, the largest of prompts with few and with all sequences."""
    decodes = [bucket for bucket in buckets if bucket.decode_only]
    largest = [b for b in buckets if b.num_tokens == buckets[-1].num_tokens and not b.decode_only]
    return list(dict.fromkeys([decodes[0], decodes[-1], largest[0], largest[-1]]))


def _plan_step(engine: ProgramContext, bucket: Bucket, chip: Chip, context: int) -> StepPlan:
    from jaxengine.runner.lowering import compile_program, temporary_bytes
    from jaxengine.runner.programs import ModelStep

    config = engine.config
    started = time.perf_counter()
    compiled = compile_program(ModelStep(bucket), engine)
    seconds = time.perf_counter() - started
    read_bytes = decode_bytes(config, bucket.num_seqs, context)
    flops = _flops(config, bucket, context)
    return StepPlan(
        *bucket,
        compile_s=round(seconds, 2),
        temporary_bytes=temporary_bytes(compiled),
        collectives=_collectives(compiled),
        read_bytes=read_bytes,
        flops=flops,
        roofline_ms=1000 * max(read_bytes / chip.bandwidth, flops / chip.flops),
    )


def _collectives(compiled: Compiled) -> dict[str, tuple[int, int]]:
    program = compiled.as_text()
    assert program is not None
    return find_collectives(program)


def find_collectives(program: str) -> dict[str, tuple[int, int]]:
    """Returns how many collectives of each kind a compiled program has, and bytes of their results."""
    found: dict[str, tuple[int, int]] = {}
    for match in COLLECTIVE.finditer(COMMENT.sub("", program)):
        shapes = SHAPE.findall(match["shapes"])
        if match["start"] and len(shapes) > 1:  # operands, results, and perhaps numbers that tell where they are
            shapes = [shape for shape in shapes if shape != ("u32", "")]
            shapes = shapes[len(shapes) // 2 :]
        count, total = found.get(match["kind"], (0, 0))
        found[match["kind"]] = (count + 1, total + sum(_bytes(*shape) for shape in shapes))
    return found


def _bytes(dtype: str, sizes: str) -> int:
    bits = BITS.search(dtype)  # none in "pred"
    return math.prod(int(n) for n in BITS.findall(sizes)) * max(int(bits[0]) if bits else 8, 8) // 8


def _flops(config: EngineConfig, bucket: Bucket, context: int) -> float:
    """Of one device's products: with the matrices, of attention, and of the logits."""
    model = config.model
    qkv = (model.heads.num_heads + 2 * model.heads.num_kv_heads) * model.head_dim
    attention = model.heads.num_heads * model.head_dim
    gated = 2 if model.architecture == "GPT2LMHeadModel" else 3
    matrices = model.hidden_size * (qkv + attention + gated * model.intermediate_size) * model.num_layers
    logits = bucket.num_seqs * model.hidden_size * model.vocab_size
    scores = 2 * bucket.num_tokens * attention * tokens_seen(config, context)
    return 2 * (bucket.num_tokens * matrices + scores + logits) / model.tensor_parallel_size
