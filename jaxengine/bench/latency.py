"""Measures the steps in which all requests decode together."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxengine.bench.throughput import StepClock, percentiles, request_params
from jaxengine.bench.workloads import DEFAULT_VOCAB, Workload, uniform

if TYPE_CHECKING:
    from jaxengine.engine.core import EngineCore
    from jaxengine.llm import LLM

SKIPPED_STEPS = 3
"""First decode steps that are not counted: what a device does once for a new program is done then."""
PACING_STEPS = 64
"""As many where the engine finds out how many steps to plan at once (`StepPacer`): by then it has, and has run them.
The first call of a program takes a GPU 20 to 70 ms."""


def skipped_steps(llm: LLM) -> int:
    """Returns how many decode steps of an engine are not counted at first."""
    return PACING_STEPS if llm.llm_engine.config.scheduler.num_scheduler_steps is None else SKIPPED_STEPS


class DecodeWindow(NamedTuple):
    """A part of a run: the first `num_steps` steps in which `num_seqs` sequences decode and no prompt is computed."""

    num_seqs: int
    num_steps: int


@dataclass(frozen=True)
class DecodeBatch:
    """Requests that decode together.

    Attributes:
        batch_size: B, requests sent at once.
        input_len: Tokens of each prompt.
        num_steps: Decode steps that are measured. Requests whose prompts are computed early generate more tokens.
        num_skipped: Decode steps before them.
    """

    batch_size: int
    input_len: int
    num_steps: int
    num_skipped: int = SKIPPED_STEPS

    @property
    def name(self) -> str:
        """What is measured, for people."""
        return f"{self.batch_size} x {self.input_len}/{self.num_steps}"

    @property
    def window(self) -> DecodeWindow:
        """The steps in which all requests decode."""
        return DecodeWindow(self.batch_size, self.num_skipped + self.num_steps)

    def workload(self, llm: LLM) -> Workload:
        """Returns requests that go on until they are aborted.

        Raises:
            ValueError: The engine cannot run them together.
        """
        config = llm.llm_engine.config
        limits = config.scheduler
        if self.batch_size > limits.max_num_seqs:
            raise ValueError(f"batch_size={self.batch_size}: must be at most max_num_seqs={limits.max_num_seqs}")
        output_len = limits.max_model_len - self.input_len
        if output_len < self.window.num_steps:
            raise ValueError(
                f"input_len={self.input_len} and output_len={self.num_steps}: with {self.num_skipped} steps before "
                f"they must be at most max_model_len={limits.max_model_len}"
            )
        vocab = min(DEFAULT_VOCAB, config.model.vocab_size - 1)
        prompts = uniform(self.batch_size, self.input_len, self.num_steps, vocab=vocab, name=self.name)
        return replace(prompts, requests=[(prompt, output_len) for prompt, _ in prompts.requests])


@dataclass
class LatencyResult:
    """What was measured of a `DecodeBatch`.

    Attributes:
        batch_size: See there.
        input_len: See there.
        num_steps: Decode steps measured.
        context: Tokens that a sequence attended to in them, on average.
        step_ms: "mean", "p50" and "p99" of them, in milliseconds. The mean is their whole time by their number.
        first_token_ms: "p50" and "p99" of the time from a request's arrival to its first token, waiting included.
        seconds: Of the whole run.
        num_compilations: Compilations while measuring. If not 0, the figures are wrong.
        floor_ms: The least that such a step can take on this device; None if its bandwidth is not known.
    """

    batch_size: int
    input_len: int
    num_steps: int
    context: float
    step_ms: dict[str, float]
    first_token_ms: dict[str, float]
    seconds: float
    num_compilations: int
    floor_ms: float | None = None

    @property
    def output_tokens_per_s(self) -> float:
        """While all decode."""
        return 1000 * self.batch_size / self.step_ms["mean"]

    @property
    def floor_share(self) -> float | None:
        """The floor's share of the mean step; None without a floor."""
        return None if self.floor_ms is None else self.floor_ms / self.step_ms["mean"]

    def to_json(self) -> dict[str, Any]:
        """Returns all figures."""
        rates = {"output_tokens_per_s": round(self.output_tokens_per_s, 3), "floor_share": self.floor_share}
        return asdict(self) | {"seconds": round(self.seconds, 4)} | rates


class _Steps(Protocol):
    def has_unfinished_requests(self) -> bool: ...
    def step(self) -> Any: ...


def run_steps(engine: _Steps, core: EngineCore, window: DecodeWindow | None) -> StepClock:
    """Steps until all requests have finished, or until the window is over."""
    clock = StepClock(core, None if window is None else window.num_seqs)
    while engine.has_unfinished_requests() and (window is None or len(clock.decode_ms) < window.num_steps):
        engine.step()
        clock.tick()
    return clock


def measure_decode(llm: LLM, batch: DecodeBatch, *, bandwidth: float | None = None) -> LatencyResult:
    """Runs a batch until its steps are measured, then aborts it. The engine must be idle, its steps compiled.

    Args:
        llm: The engine.
        batch: What to run.
        bandwidth: Bytes that the device's memory moves in a second, for the floor.

    Raises:
        ValueError: The batch does not fit in the engine.
        RuntimeError: The run ended early.
    """
    from jaxengine.bench.floor import decode_bytes

    engine = llm.llm_engine
    workload = batch.workload(llm)
    engine.reset_prefix_cache()
    num_compilations, started = engine.compilations.count, time.perf_counter()
    for prompt, output_len in workload.requests:
        params = request_params(output_len, detokenize=engine.tokenizer is not None)
        engine.add_request(engine.next_request_id(), prompt, params)
    clock = run_steps(engine, engine.core, batch.window)
    outputs = engine.abort_request(engine.unfinished_request_ids)
    engine.core.drain()
    seconds = time.perf_counter() - started
    num_beyond = len(clock.decode_ms) - batch.window.num_steps  # of the steps that were planned at once with the last
    step_ms = clock.decode_ms[batch.num_skipped : batch.window.num_steps]
    if len(step_ms) != batch.num_steps or len(outputs) != batch.batch_size:
        raise RuntimeError(f"{len(step_ms)} steps of {batch.batch_size} requests instead of {batch.num_steps}")
    # The token sampled last has not been attended to; a step before it, each sequence was one token shorter.
    last = statistics.mean(batch.input_len + len(output.outputs[0].token_ids) for output in outputs) - 1 - num_beyond
    context = last - (batch.num_steps - 1) / 2
    floor_ms = None if bandwidth is None else 1000 * decode_bytes(engine.config, batch.batch_size, context) / bandwidth
    return LatencyResult(
        batch_size=batch.batch_size,
        input_len=batch.input_len,
        num_steps=batch.num_steps,
        context=round(context, 3),
        step_ms={"mean": round(statistics.mean(step_ms), 3), **percentiles(step_ms)},
        first_token_ms=percentiles([o.metrics.first_token_latency * 1000 for o in outputs if o.metrics is not None]),
        seconds=seconds,
        num_compilations=engine.compilations.count - num_compilations,
        floor_ms=floor_ms,
    )
