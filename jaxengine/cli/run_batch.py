"""`jaxengine run-batch`: answers the calls of a file."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from jaxengine.cli.common import Status, add_common_flags
from jaxengine.cli.engine_flags import add_engine_flags, engine_kwargs
from jaxengine.cli.serve import check_installed

MAX_QUEUE = 2**31 - 1
"""Completions that may wait: lines are worked on a few at a time, so none is refused for others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.usage = "%(prog)s -i IN.jsonl -o OUT.jsonl [--model MODEL] [other flags]"
    parser.description = (
        "Answers the calls of a file in OpenAI's batch format, in the order in which answers are ready. Lines whose "
        "custom_id the output has already are skipped: run the same command again to go on. Lines that are wrong get "
        "an error as their answer."
    )
    text = 'calls, one JSON object a line: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}'
    parser.add_argument("--input-file", "-i", type=Path, required=True, metavar="FILE", help=text)
    text = "answers, one JSON object a line: id, custom_id, response, error"
    parser.add_argument("--output-file", "-o", type=Path, required=True, metavar="FILE", help=text)
    text = "a name of the model in bodies: can be repeated (default: the model as given)"
    parser.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=text)
    add_common_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0, also if answers are errors; 1 if the engine has died.

    Raises:
        ValueError: A wrong argument, model or file.
        OSError: A file cannot be read or written.
    """
    check_installed()
    from tqdm import tqdm

    from jaxengine.engine.async_llm import AsyncLLM, EngineDeadError
    from jaxengine.engine_args import EngineArgs
    from jaxengine.loading.resolve import DEFAULT_MODEL
    from jaxengine.server.app import make_app
    from jaxengine.server.batch import answered, check_batch, read_batch, run_batch
    from jaxengine.server.state import ServerSettings

    given = engine_kwargs(args)
    keys = check_batch(args.input_file)
    if args.output_file.exists() and args.output_file.samefile(args.input_file):
        raise ValueError(f"output_file={str(args.output_file)!r}: is the input")
    done = answered(args.output_file)
    num_left = sum(key not in done for key in keys)
    names = tuple(args.served_model_name) or (given.get("model") or DEFAULT_MODEL,)
    settings = ServerSettings(names, max_queue=MAX_QUEUE, max_body_size=MAX_QUEUE)
    lines = (line for line in read_batch(args.input_file) if line.key not in done)
    status, num_good, num_answered = Status(quiet=args.quiet), 0, 0
    with args.output_file.open("a", encoding="utf-8", errors="backslashreplace") as output:
        if num_left == 0:
            _say(args, f"{len(keys)} lines, all answered before")
            return 0
        status.show(f"loading {names[0]} and compiling (a first start takes longer) ...")
        try:
            llm = AsyncLLM(EngineArgs(**given))
        except EngineDeadError as error:
            print(f"jaxengine run-batch: error: {error}", file=sys.stderr)
            return 1
        finally:
            status.clear()
        with llm, tqdm(total=num_left, desc="lines", disable=args.quiet or None) as bar:

            def count(is_good: bool) -> None:
                nonlocal num_good, num_answered
                num_good += is_good
                num_answered += 1
                bar.update()

            # Twice as many as can run: the next ones are ready when some end.
            num_at_once = min(num_left, 2 * llm.limits.max_num_seqs)
            app = make_app(llm, settings)
            work = run_batch(
                app, lines, output, num_at_once=num_at_once, on_done=count, is_dead=lambda: llm.dead_error is not None
            )
            asyncio.run(work)
            error = llm.dead_error
    _say(
        args, f"{len(keys)} lines: {num_good} answered, {num_answered - num_good} errors, {len(keys) - num_left} before"
    )
    if error is not None:
        print(f"jaxengine run-batch: error: {error}; run the command again to go on", file=sys.stderr)
    return 0 if error is None else 1


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr)
