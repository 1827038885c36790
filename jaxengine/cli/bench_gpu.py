"""`jaxengine bench throughput --preset gpu`: the comparison with vLLM, on one GPU or two that share a model."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxengine.bench.gpu_figures import comparison
from jaxengine.bench.presets import GPU_ENGINE_ARGS, GpuRow, gpu_preset
from jaxengine.cli.bench_common import bandwidth, bench_engine_args, select_rows, write_report
from jaxengine.cli.common import Status
from jaxengine.cli.engine_flags import engine_kwargs

if TYPE_CHECKING:
    from jaxengine.bench.gpu_preset import GpuRowResult
    from jaxengine.llm import LLM


def run_gpu_preset(args: argparse.Namespace) -> int:
    """Runs the rows; each is told on stderr, and written to the file, when it is done.

    Returns:
        0, or 1 if a row failed or something was compiled while measuring.

    Raises:
        ValueError: A wrong argument.
    """
    given = engine_kwargs(args)
    rows = chosen_rows(args, given)
    engine_args = GPU_ENGINE_ARGS | given | {"warmup": "none"}
    started, status = time.perf_counter(), Status(quiet=args.quiet)
    status.show("measuring the memory's bandwidth ...")
    found = bandwidth(args)
    from jaxengine.bench.environment import environment
    from jaxengine.bench.gpu_preset import GpuPreset
    from jaxengine.bench.report import print_gpu_preset

    def make(model: str) -> LLM:
        from jaxengine.llm import LLM

        return LLM(**bench_engine_args(engine_args | {"model": model}))

    about = environment() | found | {"engine_args": engine_args}
    compared = comparison(about["devices"], given.get("tensor_parallel_size", 1))
    preset = GpuPreset(rows, make, bandwidth=found["bandwidth"], show=status.show, profile=args.profile)
    results: list[GpuRowResult] = []

    def report() -> dict[str, Any]:
        wall_s = round(time.perf_counter() - started, 2)
        return {"environment": about, "compared_with": compared.note, "wall_s": wall_s, "engines": preset.engines} | {
            "results": [result.to_json(compared.of(result.row)) for result in results]
        }

    try:
        for result in preset.run():
            results.append(result)
            status.clear()
            if not args.quiet:
                print(result.line, file=sys.stderr, flush=True)
            if str(args.json) != "-":
                write_report(args, report())
    finally:  # also after Ctrl-C
        status.clear()
        console = write_report(args, report())
        if console is not None:
            print_gpu_preset(console, results, report(), compared)
    return 1 if any(result.error is not None or result.num_compilations for result in results) else 0


def chosen_rows(args: argparse.Namespace, engine_args: dict[str, Any]) -> list[GpuRow]:
    """Returns the rows that the arguments leave, for an engine with these of its own.

    Raises:
        ValueError: They leave none, or do not go with this preset.
    """
    if hasattr(args, "model"):
        raise ValueError(f"model={args.model!r}: preset 'gpu' has its own models; choose some of them with --models")
    if args.repeat != 1:
        raise ValueError(f"repeat={args.repeat}: must be 1 for preset 'gpu'")
    if engine_args.get("data_parallel_size", 1) != 1:
        size = engine_args["data_parallel_size"]
        raise ValueError(f"data_parallel_size={size}: preset 'gpu' compares one copy of a model")
    rows = gpu_preset(engine_args.get("tensor_parallel_size", 1))
    models = list(dict.fromkeys(row.model for row in rows))
    wanted = models if args.models is None else [name.strip() for name in args.models.split(",")]
    for name in wanted:
        if name not in models:
            raise ValueError(f"models={args.models!r}: {name!r} is none of {', '.join(models)}")
    return select_rows([row for row in rows if row.model in wanted], lambda row: row.name, args.only)
