"""What the `jaxengine bench` commands share: flags, workloads, engine arguments and reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.bench.workloads import DEFAULT_VOCAB, Workload, mixed, sharegpt, uniform
from jaxengine.cli.common import add_common_flags
from jaxengine.cli.engine_flags import engine_kwargs
from jaxengine.loading.shapes import model_configs

if TYPE_CHECKING:
    from rich.console import Console

DUMMY_MAX_MODEL_LEN = 4608
"""Of a model without its weights, unless given: what the other engines were measured with."""


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


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and the flags that every command has."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures there; - for stdout, without tables"
    )
    add_common_flags(parser)


def bench_engine_args(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the engine arguments for a measurement: what was given, and the defaults that `add_arguments` tells."""
    return with_dummy_model({"warmup": "full", "enable_prefix_caching": False, **given})


def with_dummy_model(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the engine arguments with what `MODEL_HELP` tells of dummy weights."""
    chosen = dict(given)
    if chosen.get("load_format") == "dummy":
        name = chosen.get("model")
        chosen["model"] = str(model_configs().get(str(name), name)) if name is not None else None
        chosen.setdefault("max_model_len", DUMMY_MAX_MODEL_LEN)
        if str(chosen["model"]).endswith(".json") and "tokenizer" not in chosen:
            chosen.setdefault("skip_tokenizer_init", True)
    return chosen


def make_workload(args: argparse.Namespace, vocab_size: int | None, get_tokenizer: Callable[[], Any]) -> Workload:
    """Returns the workload that the arguments describe.

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
    """Returns bytes that the device's memory moves in a second, and where that is from; both None on CPU.

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
    """Returns those whose name contains a text, whatever its case.

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
