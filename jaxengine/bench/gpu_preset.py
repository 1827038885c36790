"""Runs the rows of the GPU preset, one engine after the other, all in this process."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.bench.dry_run import step_shapes
from jaxengine.bench.latency import DecodeBatch, measure_decode, skipped_steps
from jaxengine.bench.presets import GPU_DECODE_STEPS, GPU_UNITS, GpuRow
from jaxengine.bench.profile import trace
from jaxengine.bench.throughput import measure
from jaxengine.bench.workloads import DEFAULT_VOCAB, Workload, mixed, uniform
from jaxengine.runner.programs import ModelStep
from jaxengine.runner.step_handle import StepShape

if TYPE_CHECKING:
    from jaxengine.bench.gpu_figures import Figures
    from jaxengine.llm import LLM
    from jaxengine.runner.programs import Program

FIRST_TOKEN_RUNS = 5
"""Runs of a single request, of which the median counts: each takes milliseconds."""


@dataclass
class GpuRowResult:
    """What came of a row.

    Attributes:
        row: The row.
        value: In the row's unit; None if it failed.
        floor_ms: The least that a decode step can take on this device; None for other kinds, and without a bandwidth.
        num_compilations: Compilations while measuring. If not 0, the value is wrong.
        wall_s: Seconds that the row took, running in included.
        details: All that was measured.
        error: Why it failed.
    """

    row: GpuRow
    value: float | None = None
    floor_ms: float | None = None
    num_compilations: int = 0
    wall_s: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def floor_share(self) -> float | None:
        """The floor's share of the value; None without a floor or a value."""
        return None if self.floor_ms is None or self.value is None else self.floor_ms / self.value

    @property
    def line(self) -> str:
        """For people who wait."""
        if self.value is None:
            return f"{self.row.name}: failed: {self.error}"
        return f"{self.row.name}: {self.value:.6g} {GPU_UNITS[self.row.kind]}"

    def to_json(self, figures: Figures) -> dict[str, Any]:
        """Returns the row, what it is compared with, and what was measured."""
        names = {"name": self.row.name, "unit": GPU_UNITS[self.row.kind], "floor_share": self.floor_share}
        return (
            names
            | asdict(self.row)
            | asdict(figures)
            | {key: value for key, value in asdict(self).items() if key != "row"}
        )


class GpuPreset:
    """The rows, and how to measure them.

    Attributes:
        engines: Of every engine made: the model, seconds to start it and to compile for its rows, and what it had.
    """

    def __init__(
        self,
        rows: Sequence[GpuRow],
        make_llm: Callable[[str], LLM],
        *,
        bandwidth: float | None,
        show: Callable[[str], None],
        profile: Path | None = None,
    ):
        """Takes what it needs.

        Args:
            rows: What to measure.
            make_llm: Makes the engine of a model; nothing must be compiled ahead.
            bandwidth: Bytes that the device's memory moves in a second; None if unknown.
            show: Is told what is going on.
            profile: Folder for traces, one folder a row.
        """
        self.rows = list(rows)
        self.engines: list[dict[str, Any]] = []
        self._make_llm, self._bandwidth, self._show, self._profile = make_llm, bandwidth, show, profile

    def run(self) -> Iterator[GpuRowResult]:
        """Gives each row's result when it is there. A row that fails does not keep the next from running."""
        for model in dict.fromkeys(row.model for row in self.rows):
            waiting = [row for row in self.rows if row.model == model]
            while waiting:
                gc.collect()  # the engine before this one holds device memory until then
                for result in self._run_engine(model, waiting[:]):
                    waiting.remove(result.row)
                    yield result

    def _run_engine(self, model: str, rows: Sequence[GpuRow]) -> Iterator[GpuRowResult]:
        """Yields rows of one model.

        Ends after one that failed while it ran: nobody knows what state the engine is in.
        """
        self._show(f"{model}: loading ...")
        started = time.perf_counter()
        try:
            llm = self._make_llm(model)
        except Exception as error:  # whatever it is, the other models can be measured
            yield from [GpuRowResult(row, error=_text(error)) for row in rows]
            return
        try:
            start_s = time.perf_counter() - started
            self._show(f"{model}: compiling ...")
            errors = self._compile(llm, rows, {"model": model, "start_s": round(start_s, 2)})
            for row in rows:
                if row in errors:
                    yield GpuRowResult(row, error=errors[row])
                    continue
                self._show(f"{row.name}: running ...")
                started = time.perf_counter()
                try:
                    result = self._measure(llm, row)
                except Exception as error:
                    yield GpuRowResult(row, error=_text(error), wall_s=round(time.perf_counter() - started, 2))
                    return
                result.wall_s = round(time.perf_counter() - started, 2)
                yield result
        finally:
            with contextlib.suppress(Exception):  # of a row that has been told already
                llm.shutdown()

    def _compile(self, llm: LLM, rows: Sequence[GpuRow], about: dict[str, Any]) -> dict[GpuRow, str]:
        """Compiles what the rows need, all at once; returns why some cannot run."""
        programs = llm.llm_engine.core.runner.programs
        keys: dict[GpuRow, list[Program]] = {}
        errors: dict[GpuRow, str] = {}
        started = time.perf_counter()
        for row in rows:
            try:
                keys[row] = programs.compile_ahead(sorted(row_shapes(llm, row)))
            except ValueError as error:
                errors[row] = _text(error)
        for row, needed in keys.items():
            try:
                programs.wait_until_compiled(needed)
            except Exception as error:  # the compiler's own kinds
                errors[row] = _text(error)
        num_shapes = len({key for needed in keys.values() for key in needed if isinstance(key, ModelStep)})
        compile_s = round(time.perf_counter() - started, 2)
        self.engines.append(about | {"compile_s": compile_s, "num_shapes": num_shapes, "num_pages": programs.num_pages})
        return errors

    def _measure(self, llm: LLM, row: GpuRow) -> GpuRowResult:
        folder = None if self._profile is None else self._profile / re.sub(r"[^\w.-]+", "_", row.name)
        if row.kind == "decode":
            with trace(folder):
                decoded = measure_decode(llm, decode_batch(llm, row), bandwidth=self._bandwidth)
            value, floor_ms = decoded.step_ms["mean"], decoded.floor_ms
            return GpuRowResult(row, value, floor_ms, decoded.num_compilations, details=decoded.to_json())
        running_in, workload = run_workloads(llm, row)
        measure(llm, running_in)
        with trace(folder):
            result = measure(llm, workload, repeat=FIRST_TOKEN_RUNS if row.kind == "first token" else 1)
        values = {
            "mixed": result.output_tokens_per_s,
            "prefill": result.input_tokens_per_s,
            "first token": result.first_token_ms["p50"],
        }
        return GpuRowResult(row, round(values[row.kind], 3), None, result.num_compilations, details=result.to_json())


def row_shapes(llm: LLM, row: GpuRow) -> set[StepShape]:
    """Returns the numbers of tokens and sequences of all steps of a row.

    Raises:
        ValueError: The engine cannot run it.
    """
    if row.kind == "decode":
        batch = decode_batch(llm, row)
        return step_shapes(llm, batch.workload(llm), batch.window)
    return set().union(*(step_shapes(llm, workload) for workload in run_workloads(llm, row)))


def decode_batch(llm: LLM, row: GpuRow) -> DecodeBatch:
    """Returns the requests of a decode row, whose contexts grow from `row.context` on average.

    While the last prompts are computed, the first requests decode already, one token a step. So that as many keys and
    values are read as in the row, prompts are shorter by half the steps that all of them take.
    """
    assert row.context is not None
    prefill_steps = row.batch_size * row.context // llm.llm_engine.config.scheduler.max_num_batched_tokens
    num_skipped = skipped_steps(llm)
    input_len = max(1, row.context - num_skipped - prefill_steps // 2)
    return DecodeBatch(row.batch_size, input_len, GPU_DECODE_STEPS, num_skipped)


def run_workloads(llm: LLM, row: GpuRow) -> tuple[Workload, Workload]:
    """Returns what to run in with, so that each program has run before, and what to measure."""
    vocab = min(DEFAULT_VOCAB, llm.llm_engine.config.model.vocab_size - 1)
    if row.context is not None:
        workload = uniform(row.batch_size, row.context, 1, vocab=vocab, name=row.name)
        return workload, workload
    workload = mixed(row.batch_size, vocab=vocab, name=row.name)
    # An eighth of the tokens passes through the same numbers of decoding sequences.
    shorter = [(prompt[:8], max(1, output_len // 8)) for prompt, output_len in workload.requests]
    return Workload(f"{row.name}, running in", shorter), workload


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
