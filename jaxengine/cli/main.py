"""The `jaxengine` command."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from jaxengine import __version__

# A command's module is imported when the command is called: `jaxengine --help` answers at once.
COMMANDS = {
    "generate": "continue prompts, streaming the text as it is generated",
    "chat": "talk with a model",
    "serve": "serve a model to OpenAI's clients over HTTP",
    "run-batch": "answer a file of calls in OpenAI's batch format",
    "convert": "write a model in the form that loads fastest, onto any number of devices",
    "compile": "plan for TPUs and GPUs on a machine that has none",
    "bench": "measure throughput, decode steps, servers and start-up time",
}
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it: 128 + SIGINT."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line.

    Returns:
        The arguments; `run` is the command's function `(arguments) -> exit code`.

    Raises:
        SystemExit: Wrong arguments, or `--help` or `--version`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser("jaxengine", description="Runs large language models with JAX.")
    parser.add_argument("--version", action="version", version=f"jaxengine {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == called:
            module = importlib.import_module(f"jaxengine.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0; 2 for wrong arguments, models and prompts, with one line on stderr; 130 after Ctrl-C.
    """
    args = parse_args(argv)
    level = "DEBUG" if args.debug else "ERROR" if args.quiet else "WARNING"
    logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("jaxengine").setLevel(level)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left. Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"jaxengine {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
