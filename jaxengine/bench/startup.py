"""How long a newcomer waits: from the start of a fresh process to its first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxengine.bench.environment import max_rss_bytes

PROMPT = "The capital of France is"
PROMPT_TOKEN_IDS = [5, 6, 7, 8, 9]


@dataclass
class StartupResult:
    """One start.

    Attributes:
        cache: "cold" with an empty compilation cache, "warm" with what the start before has left in it.
        first_token_s: Seconds from the start of the process to the first text on its stdout.
        exit_s: Seconds until it had ended.
        peak_rss_bytes: The most memory it held; None where the system does not count it.
    """

    cache: str
    first_token_s: float
    exit_s: float
    peak_rss_bytes: int | None


def measure_startup(engine_args: Mapping[str, Any], *, warm_starts: int = 1) -> list[StartupResult]:
    """Starts `jaxengine generate` once with an empty compilation cache, then with a filled one.

    Without a tokenizer (`skip_tokenizer_init`) a program starts that generates from token ids.

    Args:
        engine_args: Fields of `EngineArgs` that a shell can express.
        warm_starts: How often to start with the filled cache.

    Raises:
        RuntimeError: The command failed.
    """
    with tempfile.TemporaryDirectory(prefix="jaxengine-startup-") as folder:
        command = _command({**engine_args, "compilation_cache_dir": folder})
        return [_start(kind, command) for kind in ["cold"] + ["warm"] * warm_starts]


def _command(engine_args: Mapping[str, Any]) -> list[str]:
    if engine_args.get("skip_tokenizer_init"):
        return [sys.executable, "-m", "jaxengine.bench.startup", json.dumps(engine_args)]
    flags = ["--max-tokens", "16", "--ignore-eos"]
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return [sys.executable, "-m", "jaxengine.cli.main", "generate", PROMPT, *flags]


def _start(kind: str, command: Sequence[str]) -> StartupResult:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH")])))
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        assert process.stdout is not None
        try:
            first = process.stdout.read(1)
            first_token_s = time.perf_counter() - started
            process.stdout.read()
            peak = _wait(process)
        finally:
            process.kill()
            process.stdout.close()
        exit_s = time.perf_counter() - started
        if not first or process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {errors.read().decode(errors='replace')}")
    return StartupResult(kind, first_token_s, exit_s, peak)


def _wait(process: subprocess.Popen) -> int | None:
    """Waits for a process; returns the most memory it held."""
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return max_rss_bytes(usage)


def _root() -> str:
    """Returns the folder that holds this package: the child imports the same one."""
    return str(Path(__file__).resolve().parents[2])


def _generate(engine_args: dict[str, Any]) -> None:
    """What the process without a tokenizer does: prints token ids as they come."""
    from jaxengine import LLM, RequestOutputKind, SamplingParams

    with LLM(**engine_args) as llm:
        delta = RequestOutputKind.DELTA
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, output_kind=delta)
        llm.llm_engine.add_request("0", {"prompt_token_ids": PROMPT_TOKEN_IDS}, params)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                print(*output.outputs[0].token_ids, flush=True)


if __name__ == "__main__":
    _generate(json.loads(sys.argv[1]))
