"""How long a newcomer waits: from the start of a fresh process to its first token."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxengine.bench.environment import max_rss_bytes

PROMPT = "The capital of France is"


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


def measure_startup(arguments: Sequence[str] = (), *, warm_starts: int = 1) -> list[StartupResult]:
    """Starts `jaxengine generate` once with an empty compilation cache, then with a filled one.

    Args:
        arguments: Further arguments of the command, such as `--model`.
        warm_starts: How often to start with the filled cache.

    Raises:
        RuntimeError: The command failed.
    """
    with tempfile.TemporaryDirectory(prefix="jaxengine-startup-") as folder:
        kinds = ["cold"] + ["warm"] * warm_starts
        return [_start(kind, [*arguments, "--compilation-cache-dir", folder]) for kind in kinds]


def _start(kind: str, arguments: Sequence[str]) -> StartupResult:
    command = [sys.executable, "-m", "jaxengine.cli.main", "generate", PROMPT, "--max-tokens", "16", *arguments]
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
    """The folder that holds this package: the child imports the same one."""
    return str(Path(__file__).resolve().parents[2])
