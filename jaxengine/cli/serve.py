"""`jaxengine serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys

from jaxengine.cli.common import Status, add_common_flags
from jaxengine.cli.engine_flags import add_engine_flags, engine_kwargs

NEEDED = ("fastapi", "httptools", "httpx", "uvicorn", "zmq", "msgspec", "prometheus_client")
"""Modules of the extra `server`."""
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to its parser."""
    parser.usage = "%(prog)s [MODEL] [--host HOST] [--port N] [--api-key KEY] [other flags]"
    text = "what --model takes: a folder, a .gguf file or a hub id (default: SmolLM2-135M-Instruct)"
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=text)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for all networks (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    text = "clients must bring this key, or one of them: can be repeated (default: the server is open)"
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help=text)
    text = "scripts of web pages from there may call the server, as https://example.com, or * for all: can be repeated "
    text += "(default: only those of its own page)"
    group.add_argument("--allowed-origins", action="append", default=[], metavar="ORIGIN", help=text)
    text = "a name of the model in requests: can be repeated (default: MODEL as given)"
    group.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=text)
    text = "completions that may wait for a place; beyond, requests are answered 429 (default: %(default)s)"
    group.add_argument("--max-queue", type=int, default=1024, metavar="N", help=text)
    text = "a request may take so long, then it is answered 504 (default: as long as it takes)"
    group.add_argument("--request-timeout", type=float, metavar="SECONDS", help=text)
    text = "size of a request's body at most (default: %(default)s)"
    group.add_argument("--max-body-size", type=int, default=16 * 2**20, metavar="BYTES", help=text)
    text = "how long the engine may be silent before /health says that it is not well (default: %(default)s)"
    group.add_argument("--health-timeout", type=float, default=60.0, metavar="SECONDS", help=text)
    text = "what requests in flight get to finish after SIGTERM or Ctrl-C (default: %(default)s)"
    group.add_argument("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS", help=text)
    text = "answers of /v1/responses kept in memory, the oldest go first; 0 keeps none (default: %(default)s)"
    group.add_argument("--response-store-size", type=int, default=64 * 2**20, metavar="BYTES", help=text)
    _add_chat_flags(parser)
    text = "log every request with its id when it begins and when it ends"
    group.add_argument("--enable-log-requests", action="store_true", help=text)
    text = "of the HTTP server; from info on it logs every call (default: error, with --debug info)"
    group.add_argument("--uvicorn-log-level", choices=LOG_LEVELS, help=text)
    text = "send OpenTelemetry spans of requests there, over HTTP: http://localhost:4318/v1/traces"
    group.add_argument("--otlp-traces-endpoint", metavar="URL", help=text)
    text = "let clients rule the engine: /sleep, /wake_up, /pause, /resume, /reset_prefix_cache, /start_profile, ..."
    group.add_argument("--enable-dev-endpoints", action="store_true", help=text)
    add_common_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversations")
    text = "let the model call tools; needs --tool-call-parser"
    group.add_argument("--enable-auto-tool-choice", action="store_true", help=text)
    text = "how it writes calls: hermes (also qwen3, ...), llama3_json, mistral or gemma (also pythonic)"
    group.add_argument("--tool-call-parser", metavar="NAME", help=text)
    text = "how it writes what it thinks: qwen3, deepseek_r1 or mistral (default: that is content)"
    group.add_argument("--reasoning-parser", metavar="NAME", help=text)
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja template (default: the model's own)")
    text = "let requests bring chat templates, which are programs, though in a sandbox"
    group.add_argument("--trust-request-chat-template", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 after a signal, 1 if the engine has died or could not start.

    Raises:
        ValueError: A wrong argument or model, or the extra `server` is not installed.
        OSError: The address is not free.
    """
    check_installed()
    from jaxengine.engine.async_llm import AsyncLLM, EngineDeadError
    from jaxengine.engine_args import EngineArgs
    from jaxengine.loading.chat_template import read_template
    from jaxengine.loading.resolve import DEFAULT_MODEL
    from jaxengine.server.run import bind, run_server
    from jaxengine.server.state import ServerSettings

    given = engine_kwargs(args)
    if args.positional_model is not None:
        if given.get("model", args.positional_model) != args.positional_model:
            raise ValueError(f"model={given['model']!r}: another one than MODEL, {args.positional_model!r}; give one")
        given["model"] = args.positional_model
    settings = ServerSettings(
        served_model_names=tuple(args.served_model_name) or (given.get("model") or DEFAULT_MODEL,),
        api_keys=tuple(args.api_key),
        allowed_origins=tuple(args.allowed_origins),
        max_queue=args.max_queue,
        request_timeout=args.request_timeout,
        max_body_size=args.max_body_size,
        health_timeout=args.health_timeout,
        shutdown_timeout=args.shutdown_timeout,
        enable_auto_tool_choice=args.enable_auto_tool_choice,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        chat_template=None if args.chat_template is None else read_template(args.chat_template),
        trust_request_chat_template=args.trust_request_chat_template,
        response_store_size=args.response_store_size,
        log_requests=args.enable_log_requests,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
        enable_dev_endpoints=args.enable_dev_endpoints,
    )
    if args.otlp_traces_endpoint is not None and not _has_opentelemetry():
        raise ValueError("otlp_traces_endpoint: traces need OpenTelemetry: pip install 'jaxengine[otel]'")
    # Until the server has its own handlers, even while the model loads: whatever was started is ended.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    status = Status(quiet=args.quiet)
    try:
        with bind(args.host, args.port) as sock:
            status.show(f"loading {settings.served_model_names[0]} and compiling (a first start takes longer) ...")
            with AsyncLLM(EngineArgs(**given)) as llm:
                status.clear()
                level = args.uvicorn_log_level or ("info" if args.debug else "error")
                before = signal.SIG_IGN  # from here on the end is under way, or the server has its own handlers
                return run_server(llm, settings, sock, uvicorn_log_level=level, ends_process=True)
    except EngineDeadError as error:
        print(f"jaxengine serve: error: {error}", file=sys.stderr)
        return 1
    finally:
        status.clear()
        signal.signal(signal.SIGTERM, before)


def check_installed() -> None:
    """Raises ValueError unless the extra `server` is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this command needs {', '.join(missing)}: pip install 'jaxengine[server]'")


def _has_opentelemetry() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # of a parent
        return False
