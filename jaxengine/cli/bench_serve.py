"""`jaxengine bench serve`: sends a workload to a server and measures its answers."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxengine.bench.workloads import Workload
from jaxengine.cli.bench_common import (
    add_report_flags,
    add_workload_flags,
    check_positive,
    check_workload,
    make_workload,
    write_report,
)
from jaxengine.cli.common import Status

if TYPE_CHECKING:
    from jaxengine.bench.serve import Record, ServerApi, ServerTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.usage = "%(prog)s [--base-url URL] [--model NAME] [--request-rate R] [--max-concurrency C] [other flags]"
    parser.description = (
        "Sends a workload to a server that speaks OpenAI's API, as streams, and measures what their readers see. "
        "Latencies are counted from when a request is sent. The server needs no weights: jaxengine serve qwen3-0.6b "
        "--load-format dummy --skip-tokenizer-init. Exit code 1 if a request has failed or the server has compiled "
        "meanwhile."
    )
    group = parser.add_argument_group("server")
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    group.add_argument("--model", metavar="NAME", help="a name that the server serves (default: its first)")
    group.add_argument("--api-key", metavar="KEY", help="the server's key, if it asks for one")
    text = "completions (prompts of token ids) or chat (the same, as text); as in vLLM a path will do (default: "
    text += "completions)"
    group.add_argument("--endpoint", default="completions", metavar="NAME", help=text)
    group = parser.add_argument_group("load")
    text = "requests a second, sent whether others have been answered or not; inf: all at once (default: inf)"
    group.add_argument("--request-rate", type=float, default=math.inf, metavar="R", help=text)
    text = "of the gaps: 1 is a Poisson process, less comes in bursts, more is steadier (default: 1)"
    group.add_argument("--burstiness", type=float, default=1.0, metavar="X", help=text)
    group.add_argument("--max-concurrency", type=int, metavar="C", help="requests at once at most (default: no limit)")
    add_workload_flags(parser, default="uniform")
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="(default: 0, greedy)")
    text = "generate as many tokens as asked for (default); servers other than jaxengine and vLLM may not know it"
    group.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help=text)
    group.add_argument("--extra-body", metavar="JSON", help="an object: more fields of every request")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the latencies and the course of the run")
    add_report_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0; 1 if a request has failed, or the server has compiled while it was measured.

    Raises:
        ValueError: A wrong argument, a server that does not answer, or one that refuses a first request.
    """
    endpoint, options = _check(args)
    from jaxengine.bench.serve import ServerApi, ServerTokenizer, arrival_times, request_body, summarize

    api = ServerApi(args.base_url, args.api_key)
    status = Status(quiet=args.quiet)
    model, about = _look_at(api, args.model)
    tokenizer = ServerTokenizer(api, model)
    status.show("making the workload ...")
    workload = make_workload(args, None, lambda: tokenizer)
    prompts = _prompts(workload, endpoint, tokenizer)
    bodies = [
        request_body(endpoint, model, prompt, output_len, options)
        for prompt, (_, output_len) in zip(prompts, workload.requests, strict=True)
    ]
    status.show("sending a first request ...")
    _try(api, endpoint, _test_body(bodies[0], endpoint), status)
    due = arrival_times(len(bodies), args.request_rate, burstiness=args.burstiness, seed=args.workload_seed)
    before = api.metrics()
    status.clear()
    records = _send(api, endpoint, bodies, due, max_concurrency=args.max_concurrency, quiet=args.quiet)
    for record, (prompt, _) in zip(records, workload.requests, strict=True):
        record.num_input_tokens = record.num_input_tokens or len(prompt)
    result = summarize(
        workload.name,
        records,
        rate=args.request_rate,
        max_concurrency=args.max_concurrency,
        before=before,
        after=api.metrics(),
    )
    about |= {"endpoint": endpoint, "sampling": options}
    console = write_report(args, {"environment": about, "results": [result.to_json()]})
    if console is not None:
        from jaxengine.bench.report import print_serve

        print_serve(console, result, about)
    if args.plot is not None:
        from jaxengine.bench.plot import plot_serve

        plot_serve(result, f"{model}, {workload.name}", args.plot)
    return 1 if result.num_failed or result.num_compilations else 0


def _check(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the endpoint's name and the fields of all bodies."""
    check_positive(args, "num_prompts", "input_len", "output_len", "max_concurrency", "lo", "output_lo")
    check_workload(args)
    for name in ("request_rate", "burstiness"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)}: must be above 0")
    names = {"completions": "completions", "chat": "chat", "/v1/completions": "completions"}
    endpoint = (names | {"/v1/chat/completions": "chat"}).get(args.endpoint)
    if endpoint is None:
        raise ValueError(f"endpoint={args.endpoint!r}: expected completions or chat")
    if importlib.util.find_spec("aiohttp") is None:
        raise ValueError("bench serve needs aiohttp: pip install 'jaxengine[server]'")
    if args.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(f"plot={args.plot}: plots need matplotlib: pip install 'jaxengine[plot]'")
        if args.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"plot={args.plot}: expected a name that ends with .png, .svg or .pdf")
    options: dict[str, Any] = {"temperature": args.temperature} | ({"ignore_eos": True} if args.ignore_eos else {})
    if args.extra_body is not None:
        try:
            extra = json.loads(args.extra_body)
        except json.JSONDecodeError as error:
            raise ValueError(f"extra_body={args.extra_body!r}: no JSON: {error}") from error
        if not isinstance(extra, dict):
            raise ValueError(f"extra_body={args.extra_body!r}: expected a JSON object")
        options |= extra
    return endpoint, options


def _look_at(api: ServerApi, model: str | None) -> tuple[str, dict[str, Any]]:
    """Returns the model's name, and what is to be said about server and client."""
    from jaxengine.bench.environment import host_environment

    served: list[str] = [entry["id"] for entry in api.call("/v1/models")["data"]]
    if model is not None and model not in served:
        raise ValueError(f"model={model!r}: the server has {', '.join(served)}")
    try:
        version = api.call("/version")["version"]
    except (ValueError, KeyError, TypeError):
        version = None
    name = served[0] if model is None else model
    return name, host_environment() | {"base_url": api.base_url, "server_version": version, "model": name}


def _prompts(workload: Workload, endpoint: str, tokenizer: ServerTokenizer) -> Sequence[list[int] | str]:
    """Returns the workload's prompts, as the endpoint takes them."""
    prompts = [prompt for prompt, _ in workload.requests]
    return prompts if endpoint == "completions" else [tokenizer.decode(prompt) for prompt in prompts]


def _test_body(body: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """Returns a short request whose prompt is another one than the first's, which the prefix cache must not know."""
    from jaxengine.bench.serve import TEST_LEN

    short = body | {"max_tokens": min(TEST_LEN, body["max_tokens"])}
    if endpoint == "chat":
        content = body["messages"][0]["content"]
        return short | {"messages": [{"role": "user", "content": content[::-1]}]}
    return short | {"prompt": body["prompt"][::-1]}


def _try(api: ServerApi, endpoint: str, body: dict[str, Any], status: Status) -> None:
    """Sends one request, so that what is wrong with all of them is said at once."""
    try:
        (record,) = _send(api, endpoint, [body], [0.0], quiet=True)
    finally:
        status.clear()
    if record.error is not None:
        hint = "; --vocab bounds the token ids of prompts" if "token" in record.error else ""
        raise ValueError(f"a first request has failed: {record.error}{hint}")


def _send(
    api: ServerApi,
    endpoint: str,
    bodies: Sequence[Any],
    due: Sequence[float],
    *,
    max_concurrency: int | None = None,
    quiet: bool,
) -> list[Record]:
    from tqdm import tqdm

    from jaxengine.bench.serve import LoadGenerator

    async def send(on_done: Any) -> list[Record]:
        return await LoadGenerator(api, endpoint, max_concurrency=max_concurrency).run(bodies, due, on_done)

    with tqdm(total=len(bodies), desc="requests", disable=quiet or None) as bar:
        return asyncio.run(send(lambda record: bar.update()))
