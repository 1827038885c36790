"""Which step shapes a workload needs, found out by running it without a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxengine.bench.latency import DecodeWindow, run_steps
from jaxengine.bench.throughput import request_params
from jaxengine.bench.workloads import Workload
from jaxengine.engine.core import EngineCore
from jaxengine.runner.step_handle import ShardResult, StepShape
from jaxengine.scheduler.batch import ScheduledBatch
from jaxengine.scheduler.shards import make_scheduler

if TYPE_CHECKING:
    from jaxengine.llm import LLM


def step_shapes(llm: LLM, workload: Workload, window: DecodeWindow | None = None) -> set[StepShape]:
    """Returns the shapes of all steps that the engine will run for a workload.

    The engine's own loop and scheduler plan them, with as many pages as the engine has; lengths alone decide, because
    nothing stops early.

    Args:
        llm: The engine.
        workload: The requests.
        window: Where the run ends before all have finished.

    Raises:
        ValueError: A request does not fit in the engine, or the run ends before the window does.
    """
    engine = llm.llm_engine
    # Steps planned at once have the shapes of steps planned one by one, or of some of them.
    limits = dataclasses.replace(engine.config.scheduler, num_scheduler_steps=1)
    config, runner = dataclasses.replace(engine.config, scheduler=limits), _Recorder()
    num_pages = engine.core.runner.programs.num_pages
    scheduler = make_scheduler(config, num_pages)
    core = EngineCore(scheduler, runner, engine.core.grammars)  # pyright: ignore[reportArgumentType]
    for index, (prompt, output_len) in enumerate(workload.requests):
        params = request_params(output_len, detokenize=False)
        for request in engine.input_processor.process_one(str(index), prompt, params).children:
            core.add_request(request)
    clock = run_steps(core, core, window)
    if window is not None and len(clock.decode_ms) < window.num_steps:
        raise ValueError(
            f"{workload.name}: {window.num_seqs} requests never decode {window.num_steps} tokens together with "
            f"max_model_len={config.scheduler.max_model_len}, max_num_seqs={config.scheduler.max_num_seqs}, "
            f"max_num_batched_tokens={config.scheduler.max_num_batched_tokens} and a KV cache of "
            f"{num_pages} pages of {config.block_size} tokens: lower batch_size, input_len or "
            "output_len, or raise what is too small"
        )
    return runner.shapes


class _Recorder:
    """Stands in for the runner: notes what steps would run, and "samples" token 0."""

    def __init__(self) -> None:
        self.shapes: set[StepShape] = set()
        self.programs = self  # all of them ready

    def max_ready_tokens(self) -> None:
        return None

    def execute(self, batches: Sequence[ScheduledBatch]) -> _Zeros:
        self.shapes.add(StepShape.of(batches))
        sampled = [[[0] if sequence.samples else [] for sequence in batch.sequences] for batch in batches]
        return _Zeros([ShardResult(tokens, None, None, []) for tokens in sampled])


class _Zeros(NamedTuple):
    shards: list[ShardResult]

    def results(self) -> list[ShardResult]:
        return self.shards
