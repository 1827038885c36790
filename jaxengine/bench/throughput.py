"""Runs workloads on an engine and measures them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from jaxengine.bench.workloads import Workload
from jaxengine.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxengine.engine.core import EngineCore
    from jaxengine.llm import LLM


@dataclass
class ThroughputResult:
    """One workload's figures; of several runs, those of the run with the median time.

    Attributes:
        workload: Its name.
        num_requests: Requests sent at once.
        num_input_tokens: Tokens of their prompts.
        num_output_tokens: Tokens generated.
        seconds: From the first request added to the last finished.
        requests_per_s: Requests finished a second.
        input_tokens_per_s: Prompt tokens a second.
        output_tokens_per_s: Generated tokens a second.
        total_tokens_per_s: Both.
        first_token_ms: "p50" and "p99" of the time from a request's arrival to its first token, waiting included.
        decode_step_ms: The same of steps without prompt tokens; None if there were none.
        num_steps: Steps, of which `num_decode_steps` without prompt tokens.
        num_decode_steps: See there.
        num_preemptions: Requests preempted.
        num_compilations: Compilations while measuring. If not 0, the figures are wrong.
        all_seconds: Every run's time.
    """

    workload: str
    num_requests: int
    num_input_tokens: int
    num_output_tokens: int
    seconds: float
    first_token_ms: dict[str, float]
    decode_step_ms: dict[str, float] | None
    num_steps: int
    num_decode_steps: int
    num_preemptions: int
    num_compilations: int
    all_seconds: list[float] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        """Requests completed in a second."""
        return self.num_requests / self.seconds

    @property
    def input_tokens_per_s(self) -> float:
        """Tokens of prompts in a second."""
        return self.num_input_tokens / self.seconds

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens generated in a second."""
        return self.num_output_tokens / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        """Tokens of prompts and outputs in a second."""
        return self.input_tokens_per_s + self.output_tokens_per_s

    def to_json(self) -> dict[str, Any]:
        """Returns all figures, rounded to what the clock can tell."""
        rates = ("requests_per_s", "input_tokens_per_s", "output_tokens_per_s", "total_tokens_per_s")
        values = asdict(self) | {name: round(getattr(self, name), 3) for name in rates}
        values["seconds"] = round(self.seconds, 4)
        values["all_seconds"] = [round(seconds, 4) for seconds in self.all_seconds]
        return values


def measure(llm: LLM, workload: Workload, *, repeat: int = 1) -> ThroughputResult:
    """Runs a workload, all requests at once, greedily and without stopping at EOS. The engine must be idle and warm.

    The prefix cache is emptied before every run.

    Args:
        llm: The engine, after `wait_until_warm()`.
        workload: What to run.
        repeat: Runs; the median counts.

    Raises:
        ValueError: A request is too long for the engine, or a token id is outside its vocabulary.
        RuntimeError: The engine generated another number of tokens than it was asked for.
    """
    runs = [_run(llm, workload) for _ in range(repeat)]
    median = statistics.median_low(run.seconds for run in runs)
    chosen = next(run for run in runs if run.seconds == median)
    chosen.all_seconds = [run.seconds for run in runs]
    chosen.num_compilations = sum(run.num_compilations for run in runs)
    return chosen


def _run(llm: LLM, workload: Workload) -> ThroughputResult:
    engine = llm.llm_engine
    engine.reset_prefix_cache()
    steps = StepClock(engine.core)
    before = _counters(llm)
    started = time.perf_counter()
    for prompt, output_len in workload.requests:
        engine.add_request(
            engine.next_request_id(), prompt, request_params(output_len, detokenize=engine.tokenizer is not None)
        )
    latencies, num_output = [], 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        steps.tick()
        for output in outputs:
            if output.finished and output.metrics is not None:
                latencies.append(output.metrics.first_token_latency * 1000)
                num_output += sum(len(completion.token_ids) for completion in output.outputs)
    seconds = time.perf_counter() - started
    after = _counters(llm)
    if num_output != workload.num_output_tokens:
        raise RuntimeError(f"{num_output} tokens were generated instead of {workload.num_output_tokens}")
    return ThroughputResult(
        workload=workload.name,
        num_requests=len(workload.requests),
        num_input_tokens=workload.num_input_tokens,
        num_output_tokens=num_output,
        seconds=seconds,
        first_token_ms=percentiles(latencies),
        decode_step_ms=percentiles(steps.decode_ms) if steps.decode_ms else None,
        num_steps=int(after["steps"] - before["steps"]),
        num_decode_steps=len(steps.decode_ms),
        num_preemptions=int(after["num_preemptions"] - before["num_preemptions"]),
        num_compilations=int(after["compilations"] - before["compilations"]),
    )


def request_params(output_len: int, *, detokenize: bool) -> SamplingParams:
    """Returns parameters that are greedy and do not stop at EOS."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=output_len,
        ignore_eos=True,
        detokenize=detokenize,  # text is made wherever there is a tokenizer, as users have it
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _counters(llm: LLM) -> dict[str, float]:
    metrics = {metric.name: metric.value for metric in llm.get_metrics()}
    found = {name: metrics[f"jaxengine:{name}"] for name in ("steps", "num_preemptions", "prompt_tokens")}
    return found | {"compilations": metrics["jaxengine_compilations_total"]}


class StepClock:
    """Times the steps that only decode.

    A call of `step()` takes in what was dispatched before and dispatches what runs meanwhile: the time from call to
    call is a step's time once both are decodes, or that of several if so many are planned at once. The counter of
    prompt tokens grows with every dispatch of a step that has some.

    Attributes:
        decode_ms: Milliseconds of each such step.
    """

    def __init__(self, core: EngineCore, num_seqs: int | None = None):
        """Starts the clock.

        Args:
            core: The loop that is timed.
            num_seqs: Count only steps after which so many sequences run on.
        """
        self.decode_ms: list[float] = []
        self._scheduler, self._stats, self._num_seqs = core.scheduler, core.stats, num_seqs
        self._num_prompt_tokens = [self._stats.num_prompt_tokens] * 2
        self._num_done = self._stats.num_steps_done
        self._calls = 0
        self._last = time.perf_counter()

    def tick(self) -> None:
        """Takes the time after a step; to be called after every `step()`."""
        now, count = time.perf_counter(), self._stats.num_prompt_tokens
        self._calls += 1
        num_steps = self._stats.num_steps_done - self._num_done
        is_decode = self._calls > 2 and count == self._num_prompt_tokens[0]
        if is_decode and self._num_seqs in (None, self._scheduler.num_running):
            self.decode_ms += [(now - self._last) * 1000 / max(num_steps, 1)] * num_steps
        self._num_prompt_tokens = [self._num_prompt_tokens[1], count]
        self._num_done += num_steps
        self._last = now


def percentiles(values: Sequence[float], ranks: Sequence[int] = (50, 99)) -> dict[str, float]:
    """Returns the values at these percents of the order (the nearest rank, so always a value that was measured)."""
    ordered = sorted(values)
    return {f"p{rank}": round(ordered[max(0, -(-len(ordered) * rank // 100) - 1)], 3) for rank in ranks}
