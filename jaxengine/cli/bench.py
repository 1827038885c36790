"""`jaxengine bench`: measures throughput, the time of a decode step, a server, and start-up time."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.bench.presets import CPU_SOURCE, CpuRow, cpu_preset
from jaxengine.cli import bench_serve
from jaxengine.cli.bench_common import (
    DUMMY_MAX_MODEL_LEN,
    add_report_flags,
    add_workload_flags,
    bandwidth,
    bench_engine_args,
    check_positive,
    check_workload,
    make_workload,
    select_rows,
    with_dummy_model,
    write_report,
)
from jaxengine.cli.bench_gpu import run_gpu_preset
from jaxengine.cli.common import Status, make_llm
from jaxengine.cli.engine_flags import add_engine_flags, engine_kwargs
from jaxengine.loading.shapes import model_configs

if TYPE_CHECKING:
    from rich.console import Console

    from jaxengine.llm import LLM

MODEL_HELP = (
    "For a model without its weights: --load-format dummy, and as --model a folder with a config.json, a .json file, "
    f"or one of {', '.join(model_configs())}."
)
MAX_MODEL_LEN_NOTE = f"what the model allows; with dummy weights {DUMMY_MAX_MODEL_LEN}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    throughput = kinds.add_parser(
        "throughput",
        help="run a workload: tokens/s, time to first token, time of a step",
        usage="%(prog)s [--model MODEL] [--workload NAME | --preset NAME] [--json FILE] [other flags]",
        description="Runs a workload, all requests at once, greedily and without stopping at EOS, after everything is "
        f"compiled. {MODEL_HELP}",
    )
    group = add_workload_flags(throughput, default="mixed")
    text = (
        "instead: the rows of the comparison with other engines on CPU, or with vLLM on one GPU, which needs no model"
    )
    group.add_argument("--preset", choices=["cpu", "gpu"], help=text)
    group.add_argument("--only", metavar="TEXT", help="preset: only rows whose name contains this")
    group.add_argument("--models", metavar="A,B", help="preset gpu: only these models")
    throughput.add_argument("--repeat", type=int, default=1, metavar="N", help="runs; the median counts (default: 1)")
    _add_measuring_flags(throughput)
    throughput.set_defaults(run=run_throughput)
    latency = kinds.add_parser(
        "latency",
        help="decode a batch: time of a step, and its share of what the memory allows",
        usage="%(prog)s [--model MODEL] [--batch-size B] [--input-len N] [--output-len M] [--json FILE] [other flags]",
        description="Sends requests at once and measures the steps in which all of them decode and no prompt is "
        f"computed, greedily and without stopping at EOS, after everything is compiled. {MODEL_HELP}",
    )
    latency.add_argument("--batch-size", type=int, default=1, metavar="B", help="requests (default: 1)")
    latency.add_argument("--input-len", type=int, default=1024, metavar="N", help="prompt tokens (default: 1024)")
    text = "decode steps to measure; requests whose prompts are done early generate more (default: 64)"
    latency.add_argument("--output-len", type=int, default=64, metavar="M", help=text)
    _add_measuring_flags(latency)
    latency.set_defaults(run=run_latency)
    bench_serve.add_arguments(kinds.add_parser("serve", help="send requests to a server: latencies, tokens/s"))
    startup = kinds.add_parser(
        "startup",
        help="start fresh processes: seconds to the first token",
        usage="%(prog)s [--model MODEL] [--warm-starts N] [--json FILE] [other flags]",
        description="Starts `jaxengine generate` in fresh processes: once with an empty compilation cache, then with a "
        f"filled one. {MODEL_HELP}",
    )
    startup.add_argument(
        "--warm-starts", type=int, default=1, metavar="N", help="starts with a filled cache (default: 1)"
    )
    add_report_flags(startup)
    add_engine_flags(startup, {"max_model_len": MAX_MODEL_LEN_NOTE}, skip="compilation_cache_dir")
    startup.set_defaults(run=run_startup)


def _add_measuring_flags(parser: argparse.ArgumentParser) -> None:
    text = "what the device's memory moves, read and written, for the floor of a decode step (default: measured; no "
    text += "floor on CPU)"
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help=text)
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write profiler traces of what is measured there")
    add_report_flags(parser)
    notes = {
        "enable_prefix_caching": "False: random prompts share nothing",
        "max_model_len": MAX_MODEL_LEN_NOTE,
    }
    add_engine_flags(parser, notes, skip="warmup")


def run_throughput(args: argparse.Namespace) -> int:
    """Runs `jaxengine bench throughput`.

    Returns:
        0, or 1 if something was compiled while measuring.

    Raises:
        ValueError: A wrong argument, workload or model.
    """
    _check(args)
    if args.preset == "gpu":
        return run_gpu_preset(args)
    rows = select_rows(cpu_preset(), lambda row: row.workload.name, args.only) if args.preset == "cpu" else []
    status = Status(quiet=args.quiet)
    with make_llm(bench_engine_args(engine_kwargs(args)), status) as llm:
        from jaxengine.bench.environment import environment, peak_rss_bytes
        from jaxengine.bench.profile import trace
        from jaxengine.bench.report import print_cpu_preset, print_throughput
        from jaxengine.bench.throughput import measure

        llm.wait_until_warm()
        results = []
        vocab_size = llm.llm_engine.config.model.vocab_size
        for workload in [row.workload for row in rows] or [make_workload(args, vocab_size, llm.get_tokenizer)]:
            status.show(f"measuring {workload.name} ...")
            with trace(args.profile):
                results.append(measure(llm, workload, repeat=args.repeat))
        status.clear()
        about = environment() | _describe(llm)
        peak = peak_rss_bytes()
    report = {"environment": about, "peak_rss_bytes": peak, "results": [result.to_json() for result in results]}
    if rows:
        report["compared_with"] = [_peers(row) for row in rows]
    console = write_report(args, report)
    if console is not None:
        print_throughput(console, results, about)
        if rows:
            print_cpu_preset(console, rows, results, peak)
    return _exit_code(sum(result.num_compilations for result in results), console)


def run_latency(args: argparse.Namespace) -> int:
    """Runs `jaxengine bench latency`.

    Returns:
        0, or 1 if something was compiled while measuring.

    Raises:
        ValueError: A wrong argument or model, or a batch that the engine cannot run together.
    """
    check_positive(args, "batch_size", "input_len", "output_len")
    found = bandwidth(args)
    status = Status(quiet=args.quiet)
    with make_llm(bench_engine_args(engine_kwargs(args)) | {"warmup": "none"}, status) as llm:
        from jaxengine.bench.dry_run import step_shapes
        from jaxengine.bench.environment import environment
        from jaxengine.bench.latency import DecodeBatch, measure_decode, skipped_steps
        from jaxengine.bench.profile import trace
        from jaxengine.bench.report import print_latency

        batch = DecodeBatch(args.batch_size, args.input_len, args.output_len, skipped_steps(llm))
        programs = llm.llm_engine.core.runner.programs
        programs.wait_until_compiled(programs.compile_ahead(step_shapes(llm, batch.workload(llm), batch.window)))
        status.show(f"measuring {batch.name} ...")
        with trace(args.profile):
            result = measure_decode(llm, batch, bandwidth=found["bandwidth"])
        status.clear()
        about = environment() | _describe(llm) | found
    console = write_report(args, {"environment": about, "results": [result.to_json()]})
    if console is not None:
        print_latency(console, result, about)
    return _exit_code(result.num_compilations, console)


def _exit_code(num_compilations: int, console: Console | None) -> int:
    if num_compilations and console is None:
        print(f"wrong figures: {num_compilations} compilations while measuring", file=sys.stderr)
    return 1 if num_compilations else 0


def run_startup(args: argparse.Namespace) -> int:
    """Runs `jaxengine bench startup`.

    Raises:
        ValueError: A wrong argument or model.
    """
    from jaxengine.bench.environment import environment
    from jaxengine.bench.report import print_startup
    from jaxengine.bench.startup import measure_startup

    given = with_dummy_model(engine_kwargs(args))
    if args.warm_starts < 0:
        raise ValueError(f"warm_starts={args.warm_starts}: must be at least 0")
    status = Status(quiet=args.quiet)
    status.show("starting fresh processes ...")
    try:
        results = measure_startup(given, warm_starts=args.warm_starts)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    finally:
        status.clear()
    about = environment() | {"model": getattr(args, "model", "the default model")}
    console = write_report(args, {"environment": about, "results": [dataclasses.asdict(result) for result in results]})
    if console is not None:
        print_startup(console, results, about)
    return 0


def _check(args: argparse.Namespace) -> None:
    check_positive(args, "num_prompts", "input_len", "output_len", "lo", "output_lo", "repeat")
    for name, presets in (("only", ("cpu", "gpu")), ("models", ("gpu",)), ("bandwidth", ("gpu",))):
        if getattr(args, name) is not None and args.preset not in presets:
            raise ValueError(f"{name}={getattr(args, name)!r}: only for --preset {' or '.join(presets)}")
    if args.preset is None:
        check_workload(args)


def _describe(llm: LLM) -> dict[str, Any]:
    engine = llm.llm_engine
    args = {field.name: getattr(engine.args, field.name) for field in dataclasses.fields(engine.args)}
    changed = {f.name: args[f.name] for f in dataclasses.fields(engine.args) if args[f.name] != f.default}
    return {
        "model": engine.checkpoint.path.name,
        "dtype": engine.config.dtype,
        "kv_cache_dtype": engine.config.kv_cache_dtype,
        "engine_args": {name: value if _is_plain(value) else repr(value) for name, value in changed.items()},
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _peers(row: CpuRow) -> dict[str, Any]:
    values = {"source": CPU_SOURCE, **dataclasses.asdict(row)}
    return values | {"workload": row.workload.name}
