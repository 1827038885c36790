"""`jaxengine generate`: continues prompts."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jaxengine.cli.common import (
    Statistics,
    Status,
    add_common_flags,
    completions_json,
    fast_start,
    logprobs_json,
    make_llm,
)
from jaxengine.cli.engine_flags import add_engine_flags, add_sampling_flags, engine_kwargs, sampling_kwargs
from jaxengine.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxengine.llm import LLM
    from jaxengine.outputs import RequestOutput

# Greedy: the same command gives the same text, and a small model's best.
DEFAULTS = {"max_tokens": 64, "temperature": 0.0}
EXIT_INTERRUPTED = 130  # 128 + SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.usage = "%(prog)s [PROMPT ...] [--model MODEL] [--max-tokens N] [--json] [other flags]"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text to continue; none: read one from stdin")
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="more prompts: one a line, or in a .jsonl file one JSON object a line with prompt or prompt_token_ids",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line and prompt, instead of text")
    add_common_flags(parser)
    add_sampling_flags(
        parser, {"max_tokens": "64", "temperature": "0: greedy", "seed": "a fresh one for every prompt and run"}
    )
    notes = {
        "max_num_seqs": "as many as there are completions, up to 64",
        "warmup": "lazy for up to 8 completions, else background",
    }
    add_engine_flags(parser, notes, skip="seed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: A wrong argument, prompt or model.
    """
    prompts = read_prompts(args)
    params = make_params({**DEFAULTS, **sampling_kwargs(args)}, len(prompts))
    status = Status(quiet=args.quiet)
    with make_llm(fast_start(engine_kwargs(args), len(prompts) * params[0].n), status) as llm:
        printer = JSONPrinter() if args.json else TextPrinter(sys.stdout, titles=len(prompts) > 1)
        statistics, interrupted = stream(llm, prompts, params, printer, status)
        if not args.quiet:
            print(statistics.line(), file=sys.stderr)
    return EXIT_INTERRUPTED if interrupted else 0


def read_prompts(args: argparse.Namespace) -> list[Any]:
    """Returns all prompts of the command line, of the file, and, if there are none, of stdin.

    Raises:
        ValueError: There are none, or a line of the file is no prompt.
    """
    prompts: list[Any] = list(args.prompts)
    if args.prompts_file is not None:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        is_json = args.prompts_file.suffix in (".jsonl", ".json", ".ndjson")
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompts.append(_json_prompt(line, args.prompts_file, number) if is_json else line)
    elif not prompts and not sys.stdin.isatty():
        text = sys.stdin.read().rstrip("\n")
        prompts += [text] if text else []
    if not prompts:
        raise ValueError("no prompt: give one as an argument, with --prompts-file, or on stdin")
    return prompts


def _json_prompt(line: str, path: Path, number: int) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(value, str | dict):
        raise ValueError(f"{path}, line {number}: expected a string or an object, got {line}")
    return value


def make_params(fields: dict[str, Any], count: int) -> list[SamplingParams]:
    """Returns the parameters for each prompt. Without a seed every prompt gets one of its own, another in every run.

    Raises:
        ValueError: A field is out of range.
    """
    made = []
    for _ in range(count):
        params = SamplingParams(**fields, output_kind=RequestOutputKind.DELTA)
        if params.seed is None and not params.is_greedy:
            params.seed = secrets.randbits(31)
        made.append(params)
    return made


def stream(
    llm: LLM,
    prompts: Sequence[Any],
    params: Sequence[SamplingParams],
    printer: TextPrinter | JSONPrinter,
    status: Status,
) -> tuple[Statistics, bool]:
    """Runs the prompts and prints as tokens come. After Ctrl-C, what there is so far is printed.

    Returns:
        The statistics, and whether it was interrupted.

    Raises:
        ValueError: A prompt or parameter is wrong; then nothing has run.
    """
    engine = llm.llm_engine
    # All are checked before one runs.
    processed = engine.input_processor.process_batch(
        prompts, params, request_ids=str, priority=None, arrival_time=time.time()
    )
    statistics = Statistics(time.perf_counter(), num_prompt_tokens=sum(len(p.prompt_token_ids) for p in processed))
    interrupted = False
    try:
        for index, item in enumerate(processed):
            printer.open(index, item.prompt_text, params[index].n)
            engine.add_processed(item)
        while engine.has_unfinished_requests():
            for output in engine.step():
                statistics.add(output)
                status.clear()
                printer.add(output)
    except KeyboardInterrupt:
        interrupted = True
        for output in engine.abort_request(engine.unfinished_request_ids):
            printer.add(output)
    status.clear()
    printer.close()
    return statistics, interrupted


class TextPrinter:
    """Prints completions one after the other, each as it comes, though they grow side by side.

    The first completion that has not ended is shown live; the others wait until it is their turn.
    """

    def __init__(self, file: TextIO, *, titles: bool):
        """Args: file: Where to print. titles: Print every prompt above its completions."""
        self._file, self._titles = file, titles
        self._places: dict[tuple[str, int], int] = {}  # (request, completion) -> its place in the order
        self._heads: list[str] = []
        self._waiting: list[list[str]] = []  # text that has not been printed, by place
        self._ended: list[bool] = []
        self._live = 0
        self._started = False

    def open(self, index: int, prompt: str | None, num_completions: int) -> None:
        """Announces a prompt, in the order in which they are to be printed."""
        title = f"{'' if index == 0 else chr(10)}### {prompt if prompt is not None else f'prompt {index}'}\n"
        for completion in range(num_completions):
            head = title if self._titles and completion == 0 else ""
            if num_completions > 1:
                head += f"[{completion}]"
            self._places[str(index), completion] = len(self._heads)
            self._heads.append(head)
            self._waiting.append([])
            self._ended.append(False)

    def add(self, output: RequestOutput) -> None:
        """Takes a DELTA output."""
        for completion in output.outputs:
            place = self._places[output.request_id, completion.index]
            self._waiting[place].append(completion.text)
            self._ended[place] = completion.finish_reason is not None
        self._print()

    def close(self) -> None:
        """Prints whatever is left: after an interruption, completions that have not ended."""
        self._ended = [True] * len(self._ended)
        self._print()

    def _print(self) -> None:
        while self._live < len(self._heads):
            text = "".join(self._waiting[self._live])
            self._waiting[self._live].clear()
            if text and not self._started:
                self._file.write(self._heads[self._live])
                self._started = True
            self._file.write(text)
            if not self._ended[self._live]:
                break
            self._file.write("\n" if self._started or self._heads[self._live] == "" else self._heads[self._live] + "\n")
            self._live += 1
            self._started = False
        self._file.flush()


class JSONPrinter:
    """Prints one JSON object per prompt when it has finished, in the order of the prompts."""

    def __init__(self) -> None:
        self._prompts: list[str | None] = []
        self._outputs: dict[int, RequestOutput] = {}
        self._next = 0

    def open(self, index: int, prompt: str | None, num_completions: int) -> None:
        """Announces a prompt."""
        self._prompts.append(prompt)

    def add(self, output: RequestOutput) -> None:
        """Takes a DELTA output."""
        index = int(output.request_id)
        if index in self._outputs:
            self._outputs[index].add(output, aggregate=True)
        else:
            self._outputs[index] = output
        self._print(only_finished=True)

    def close(self) -> None:
        """Prints what is left."""
        self._print(only_finished=False)

    def _print(self, *, only_finished: bool) -> None:
        while (output := self._outputs.get(self._next)) is not None and (output.finished or not only_finished):
            metrics = output.metrics
            line = {
                "index": self._next,
                "prompt": self._prompts[self._next],
                "outputs": completions_json(output),
                "num_prompt_tokens": len(output.prompt_token_ids or ()),
                "num_cached_tokens": output.num_cached_tokens,
                "seconds_to_first_token": round(metrics.first_token_latency, 4) if metrics is not None else None,
            }
            if output.prompt_logprobs is not None:
                line["prompt_logprobs"] = logprobs_json(output.prompt_logprobs)
            print(json.dumps(line, ensure_ascii=False), flush=True)
            self._next += 1
