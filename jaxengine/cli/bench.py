"""`jaxengine bench`: measures throughput, the time of a decode step, a server, and start-up time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.bench.presets import CPU_SOURCE, CpuRow, cpu_preset
from jaxengine.bench.workloads import DEFAULT_VOCAB, Workload, mixed, sharegpt, uniform
from jaxengine.cli.common import Status, add_common_flags, make_llm
from jaxengine.cli.engine_flags import add_engine_flags, engine_kwargs
from jaxengine.loading.shapes import model_configs

if TYPE_CHECKING:
    from rich.console import Console

    from jaxengine.llm import LLM

MODEL_HELP = (
    "For a model without its weights: --load-format dummy, and as --model a folder with a config.json, a .json file, "
    f"or one of {', '.join(model_configs())}."
)
DUMMY_MAX_MODEL_LEN = 4608
"""Of a model without its weights, unless given: what the other engines were measured with."""
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
    from jaxengine.cli import bench_serve  # which needs what is below

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


def add_workload_flags(parser: argparse.ArgumentParser, *, default: str) -> argparse._ArgumentGroup:
    """Adds what `make_workload` reads; returns the group of these flags."""
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload", choices=["uniform", "mixed", "sharegpt"], default=default, help="(default: %(default)s)"
    )
    group.add_argument("--num-prompts", type=int, metavar="N", help="requests (default: 256)", default=256)
    group.add_argument(
        "--input-len", type=int, default=1024, metavar="N", help="uniform: prompt tokens (default: 1024)"
    )
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="uniform: output tokens (default: 128)")
    group.add_argument("--lo", type=int, default=100, metavar="N", help="mixed: shortest prompt (default: 100)")
    group.add_argument("--hi", type=int, default=1024, metavar="N", help="mixed: longest prompt (default: 1024)")
    group.add_argument("--output-lo", type=int, metavar="N", help="mixed: shortest output (default: as --lo)")
    group.add_argument("--output-hi", type=int, metavar="N", help="mixed: longest output (default: as --hi)")
    text = f"uniform, mixed: largest token id in prompts (default: {DEFAULT_VOCAB}, or the model's largest)"
    group.add_argument("--vocab", type=int, metavar="N", help=text)
    names = ("--workload-seed",) if default == "mixed" else ("--seed", "--workload-seed")
    text = "of the random draws (default: 0)"
    group.add_argument(*names, dest="workload_seed", type=int, default=0, metavar="N", help=text)
    group.add_argument("--dataset", type=Path, metavar="FILE", help="sharegpt: a JSON file of conversations")
    return group


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


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and the flags that every command has."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures there; - for stdout, without tables"
    )
    add_common_flags(parser)


def run_throughput(args: argparse.Namespace) -> int:
    """Runs `jaxengine bench throughput`.

    Returns:
        0, or 1 if something was compiled while measuring.

    Raises:
        ValueError: A wrong argument, workload or model.
    """
    _check(args)
    if args.preset == "gpu":
        from jaxengine.cli.bench_gpu import run_gpu_preset

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


def bench_engine_args(given: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments for a measurement: what was given, and the defaults that `add_arguments` tells."""
    return with_dummy_model({"warmup": "full", "enable_prefix_caching": False, **given})


def with_dummy_model(given: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments with what `MODEL_HELP` tells of dummy weights."""
    chosen = dict(given)
    if chosen.get("load_format") == "dummy":
        name = chosen.get("model")
        chosen["model"] = str(model_configs().get(str(name), name)) if name is not None else None
        chosen.setdefault("max_model_len", DUMMY_MAX_MODEL_LEN)
        if str(chosen["model"]).endswith(".json") and "tokenizer" not in chosen:
            chosen.setdefault("skip_tokenizer_init", True)
    return chosen


def make_workload(args: argparse.Namespace, vocab_size: int | None, get_tokenizer: Callable[[], Any]) -> Workload:
    """The workload that the arguments describe.

    Args:
        vocab_size: The model's; None if it is not known.
        get_tokenizer: Called if tokens are to be counted.

    Raises:
        ValueError: They do not fit together.
    """
    known = DEFAULT_VOCAB if vocab_size is None else min(DEFAULT_VOCAB, vocab_size - 1)
    vocab = known if args.vocab is None else args.vocab
    if args.workload == "sharegpt":
        return sharegpt(args.dataset, get_tokenizer(), args.num_prompts, seed=args.workload_seed)
    if args.workload == "uniform":
        return uniform(args.num_prompts, args.input_len, args.output_len, vocab=vocab, seed=args.workload_seed)
    return mixed(
        args.num_prompts,
        args.lo,
        args.hi,
        output_lo=args.output_lo,
        output_hi=args.output_hi,
        vocab=vocab,
        seed=args.workload_seed,
    )


def bandwidth(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that the device's memory moves in a second, and where that is from; both None on CPU.

    To be called before an engine takes the memory.

    Raises:
        ValueError: What is given is no bandwidth.
    """
    if args.bandwidth is not None:
        if not 0 < args.bandwidth < float("inf"):
            raise ValueError(f"bandwidth={args.bandwidth}: must be a number of GB/s above 0")
        return {"bandwidth": args.bandwidth * 1e9, "bandwidth_source": "given"}
    from jaxengine.bench.floor import copy_bandwidth
    from jaxengine.engine_args import EngineArgs
    from jaxengine.runner.memory import reserve_device_memory

    reserve_device_memory(engine_kwargs(args).get("gpu_memory_utilization", EngineArgs.gpu_memory_utilization))
    measured = copy_bandwidth()
    return {"bandwidth": measured, "bandwidth_source": None if measured is None else "measured with large copies"}


def select_rows[Row](rows: list[Row], name: Callable[[Row], str], text: str | None) -> list[Row]:
    """Those whose name contains a text, whatever its case.

    Raises:
        ValueError: There is none.
    """
    chosen = [row for row in rows if text is None or text.lower() in name(row).lower()]
    if not chosen:
        raise ValueError(f"only={text!r}: no row's name contains it; there are: {', '.join(map(name, rows))}")
    return chosen


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError unless these arguments are at least 1, or None."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


def _check(args: argparse.Namespace) -> None:
    check_positive(args, "num_prompts", "input_len", "output_len", "lo", "output_lo", "repeat")
    for name, presets in (("only", ("cpu", "gpu")), ("models", ("gpu",)), ("bandwidth", ("gpu",))):
        if getattr(args, name) is not None and args.preset not in presets:
            raise ValueError(f"{name}={getattr(args, name)!r}: only for --preset {' or '.join(presets)}")
    if args.preset is None:
        check_workload(args)


def check_workload(args: argparse.Namespace) -> None:
    """Raises ValueError unless a workload's arguments fit together."""
    output_lo = args.lo if args.output_lo is None else args.output_lo
    output_hi = args.hi if args.output_hi is None else args.output_hi
    for low_name, low, high_name, high in (
        ("lo", args.lo, "hi", args.hi),
        ("output_lo", output_lo, "output_hi", output_hi),
    ):
        if high < low:
            raise ValueError(f"{high_name}={high}: must be at least {low_name}={low}")
    if args.workload == "sharegpt" and args.dataset is None:
        raise ValueError("workload='sharegpt' needs --dataset FILE, a JSON file of conversations")
    if args.vocab is not None and args.vocab < 0:
        raise ValueError(f"vocab={args.vocab}: must be at least 0")


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


def write_report(args: argparse.Namespace, report: dict[str, Any]) -> Console | None:
    """Writes the report where `--json` says; returns where tables go, or None if stdout is taken."""
    from rich.console import Console

    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if args.json is not None and str(args.json) == "-":
        sys.stdout.write(text)
        return None
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text, encoding="utf-8")
    return Console()
