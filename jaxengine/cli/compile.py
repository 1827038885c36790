"""`jaxengine compile`: plan for TPUs and GPUs on a machine that has none."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxengine.cli.common import Status, add_common_flags
from jaxengine.cli.engine_flags import add_engine_flags, engine_kwargs
from jaxengine.plan.targets import EXAMPLES, open_target

if TYPE_CHECKING:
    from jaxengine.plan.planner import Plan

DEFAULT_MAX_MODEL_LEN = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.description = (
        "Compiles an engine's real steps, kernels included, for TPUs or GPUs that need not be there, and prints what "
        "fits on them. Weights are not needed: --model is a folder with a config.json, a .json file, or one of the "
        "shapes that come along."
    )
    group = parser.add_argument_group("plan")
    group.add_argument("--target", required=True, metavar="TARGET", help=f"TPU topology, or GPUs: {EXAMPLES}, ...")
    group.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens of a sequence, for rooflines (default: 1024)"
    )
    group.add_argument("--every-step", action="store_true", help="compile all step shapes, not only four")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures there; - for stdout, without tables"
    )
    add_common_flags(parser)
    add_engine_flags(parser, {"max_model_len": str(DEFAULT_MAX_MODEL_LEN), "max_num_seqs": "64"}, skip="warmup")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs `jaxengine compile`.

    Raises:
        ValueError: A wrong argument, target or model.
    """
    if args.context < 1:
        raise ValueError(f"context={args.context}: must be at least 1")
    status = Status(quiet=args.quiet)
    status.show("loading the compiler ...")
    devices, chip = open_target(args.target)
    plan = _make_plan(args, devices, chip, status)
    status.clear()
    report = json.dumps(plan.to_json(), indent=2)
    if args.json is not None and str(args.json) != "-":
        args.json.write_text(report + "\n", encoding="utf-8")
    if args.json is not None and str(args.json) == "-":
        print(report)
    else:
        _print(plan)
    if plan.num_pages == 0:
        print(f"{args.target}: weights and steps leave no room for a KV cache", file=sys.stderr)
        return 1
    return 0


def _make_plan(args: argparse.Namespace, devices, chip, status: Status) -> Plan:
    from jaxengine.engine_args import EngineArgs
    from jaxengine.loading.resolve import resolve_model
    from jaxengine.loading.shapes import model_configs
    from jaxengine.plan.planner import PLACEHOLDER_PAGES, make_plan

    given = {"max_model_len": DEFAULT_MAX_MODEL_LEN, "max_num_seqs": 64, **engine_kwargs(args)}
    given |= {"num_gpu_blocks_override": PLACEHOLDER_PAGES, "warmup": "none", "load_format": "dummy"}
    if not given.get("model"):
        raise ValueError(f"model: name a model; shapes that come along: {', '.join(model_configs())}")
    engine_args = EngineArgs(**given)
    checkpoint = resolve_model(engine_args.model, revision=engine_args.revision, load_format="dummy")
    config = engine_args.resolve(checkpoint, devices[0].platform)
    return make_plan(
        config, args.target, devices, chip, context=args.context, every_step=args.every_step, progress=status.show
    )


def _print(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    memory = Table(title=f"memory of one of {plan.tensor_parallel_size} {plan.device_kind} (GiB)", title_justify="left")
    for name in ("may be used", "weights", "largest temporaries", "left for pages"):
        memory.add_column(name, justify="right")
    largest = plan.largest_temporaries
    left = plan.memory_bytes - plan.weight_bytes - largest
    memory.add_row(*(f"{n / 2**30:.2f}" for n in (plan.memory_bytes, plan.weight_bytes, largest, left)))
    console.print(memory)
    console.print(
        f"{plan.num_pages} pages of {plan.block_size} tokens: {plan.num_sequences(plan.max_model_len)} sequences of "
        f"{plan.max_model_len} tokens, or {plan.num_sequences(plan.context)} of {plan.context}"
    )
    steps = Table(title=f"steps, rooflines at {plan.context} tokens a sequence", title_justify="left")
    for name in ("tokens", "sequences", "roofline ms", "read GB", "TFLOP", "temporaries MB", "compiled in s"):
        steps.add_column(name, justify="right")
    for step in plan.steps:
        steps.add_row(
            str(step.num_tokens),
            str(step.num_seqs),
            f"{step.roofline_ms:.2f}",
            f"{step.read_bytes / 1e9:.2f}",
            f"{step.flops / 1e12:.3f}",
            f"{step.temporary_bytes / 1e6:.0f}",
            f"{step.compile_s:.0f}",
        )
    console.print(steps)
    console.print(f"The largest sampler needs {plan.sampler_bytes / 1e6:.0f} MB beside. Collectives:")
    collectives = {f"{step.num_tokens} x {step.num_seqs}": step.collectives for step in plan.steps}
    for name, found in (collectives | {"sampler": plan.sampler_collectives}).items():
        moved = [f"{n} {kind}, {size / 1e6:.2f} MB" for kind, (n, size) in sorted(found.items())]
        console.print(f"  {name}: {'; '.join(moved) or 'none'}")
