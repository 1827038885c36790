"""`jaxengine convert`: writes a model in the form that loads fastest."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from jaxengine.cli.common import Status, add_common_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.description = (
        "Writes a model as an Orbax checkpoint with its configuration and tokenizer, which loads fastest and onto any "
        "number of devices: each reads its part. Quantised GGUF files are dequantised."
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with safetensors, a .gguf file or a hub id")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; then a MODEL for every command")
    parser.add_argument(
        "--dtype", default="auto", metavar="TEXT", help="bfloat16, float16 or float32 (default: auto, as it is stored)"
    )
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub model")
    parser.add_argument("--overwrite", action="store_true", help="replace a converted model in OUT")
    add_common_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: A wrong model or folder.
        OSError: The folder cannot be written.
    """
    from jaxengine.loading.convert import convert
    from jaxengine.loading.resolve import resolve_model

    status = Status(quiet=args.quiet)
    started = time.perf_counter()
    status.show(f"opening {args.model} ...")
    try:
        checkpoint = resolve_model(args.model, revision=args.revision)
        num_bytes = convert(checkpoint, args.out, dtype=args.dtype, overwrite=args.overwrite, progress=status.show)
    finally:
        status.clear()
    if not args.quiet:
        seconds = time.perf_counter() - started
        print(f"{args.out}: {num_bytes / 1e9:.2f} GB of weights in {seconds:.1f} s")
    return 0
