"""`jaxengine chat`: a conversation."""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxengine.cli.common import Statistics, Status, add_common_flags, fast_start, make_llm
from jaxengine.cli.engine_flags import add_engine_flags, add_sampling_flags, engine_kwargs, sampling_kwargs
from jaxengine.engine.chat import render_chat
from jaxengine.engine.inputs import Prompt
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxengine.llm import LLM

DEFAULTS = {"max_tokens": 512}
HELP = """\
/help           show this
/reset          forget the conversation (a system message stays)
/system TEXT    set the system message and forget the conversation; without TEXT: remove it
/exit           leave; so does Ctrl-D
Ctrl-C          stop the answer that is being written; the chat goes on"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.usage = "%(prog)s [--model MODEL] [--system TEXT] [--json] [other flags]"
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: the model's own, if it has one)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and answer, instead of text")
    add_common_flags(parser)
    own = "as the model recommends"
    notes = {"max_tokens": "512", "temperature": f"{own}, else 0: greedy", "top_p": own, "top_k": own, "min_p": own}
    add_sampling_flags(parser, {**notes, "repetition_penalty": own, "seed": "a fresh one for every answer"})
    add_engine_flags(parser, {"max_num_seqs": "1", "warmup": "lazy"}, skip="seed")
    parser.epilog = "Each line of stdin is a message. " + "; ".join(" ".join(line.split()) for line in HELP.split("\n"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: A wrong argument or model.
    """
    given = sampling_kwargs(args)
    SamplingParams(**given)  # a wrong value is told before the model is loaded
    if given.get("n", 1) != 1:
        raise ValueError(f"n={given['n']}: a chat has one answer to each message; use generate for several completions")
    status = Status(quiet=args.quiet)
    with make_llm(fast_start(engine_kwargs(args), 1), status) as llm:
        status.clear()
        Chat(llm, given, system=args.system, as_json=args.json, quiet=args.quiet).loop()
    return 0


class Chat:
    """One conversation on a terminal or through pipes."""

    def __init__(self, llm: LLM, sampling: dict[str, Any], *, system: str | None, as_json: bool, quiet: bool):
        """Starts an empty conversation.

        Args:
            llm: The model.
            sampling: Fields of `SamplingParams` that the user gave.
            system: The system message.
            as_json: Print an object a line instead of text.
            quiet: Print no statistics.
        """
        self._llm = llm
        self._sampling = {**DEFAULTS, **recommended_sampling(llm), **sampling}
        self._as_json, self._quiet = as_json, quiet
        self._is_interactive = sys.stdin.isatty()
        self._messages: list[dict[str, str]] = []
        self._reset(system)

    def loop(self) -> None:
        """Reads messages and answers them until stdin ends or the user leaves."""
        if self._is_interactive and not self._quiet:
            print("Type a message; /help lists commands, Ctrl-D leaves.", file=sys.stderr)
        for line in self._lines():
            text = line.strip()
            if not text:
                continue
            if text.startswith("/"):
                if text == "/exit":
                    return
                self._command(text)
                continue
            self._messages.append({"role": "user", "content": text})
            try:
                answer = self._answer()
            except ValueError as error:  # too long for the model, as a rule
                self._messages.pop()
                self._say(f"error: {error} (/reset forgets the conversation so far)")
            else:
                self._messages.append({"role": "assistant", "content": answer})

    def _lines(self) -> Iterator[str]:
        """Messages, until stdin ends. On a terminal lines can be edited, and Ctrl-C drops the line."""
        if not self._is_interactive:
            yield from sys.stdin
            return
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401  (gives input() its line editing)
        while True:
            try:
                line = input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                self._say("\n(Ctrl-D or /exit leaves)")
                continue
            yield line

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name == "/help":
            self._say(HELP)
        elif name == "/reset":
            self._reset(self._system)
            self._say("(the conversation is forgotten)")
        elif name == "/system":
            self._reset(rest.strip() or None)
            self._say("(the conversation starts anew)")
        else:
            self._say(f"there is no command {name}; /help lists them")

    def _reset(self, system: str | None) -> None:
        self._system = system
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _answer(self) -> str:
        """Answers the last message, printing as the text grows. Ctrl-C ends the answer, which stays as it is then.

        Raises:
            ValueError: The conversation is too long, or the template refuses it.
        """
        engine = self._llm.llm_engine
        params = SamplingParams(**self._sampling, output_kind=RequestOutputKind.DELTA)
        if params.seed is None and not params.is_greedy:
            params.seed = secrets.randbits(31)
        text = render_chat(self._llm.get_tokenizer(), self._messages)
        request_id = engine.next_request_id()
        statistics = Statistics(time.perf_counter())
        engine.add_request(request_id, Prompt(text=text, add_special_tokens=False), params)
        answer: RequestOutput | None = None
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    answer = self._take(answer, output, statistics)
        except KeyboardInterrupt:
            for output in engine.abort_request(request_id):
                answer = self._take(answer, output, statistics)
        assert answer is not None  # a request gives at least its last output
        statistics.num_prompt_tokens = len(answer.prompt_token_ids or ())
        self._end(answer, statistics)
        return answer.outputs[0].text

    def _take(self, answer: RequestOutput | None, output: RequestOutput, statistics: Statistics) -> RequestOutput:
        statistics.add(output)
        if not self._as_json:
            print("".join(completion.text for completion in output.outputs), end="", flush=True)
        if answer is None:
            return output
        answer.add(output, aggregate=True)
        return answer

    def _end(self, answer: RequestOutput, statistics: Statistics) -> None:
        completion = answer.outputs[0]
        if not self._as_json:
            print(flush=True)
        else:
            line = {
                "role": "assistant",
                "content": completion.text,
                "finish_reason": completion.finish_reason,
                "num_prompt_tokens": statistics.num_prompt_tokens,
                "num_cached_tokens": answer.num_cached_tokens,
                "num_output_tokens": len(completion.token_ids),
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)
        if not self._quiet:
            self._say(f"({statistics.line()})")


def recommended_sampling(llm: LLM) -> dict[str, Any]:
    """Returns what the model's `generation_config.json` recommends; greedy if it says nothing of the temperature."""
    default, recommended = SamplingParams(), llm.get_default_sampling_params()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    differing = {name: getattr(recommended, name) for name in names}
    differing = {name: value for name, value in differing.items() if value != getattr(default, name)}
    return differing if differing else {"temperature": 0.0}
