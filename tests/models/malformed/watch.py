"""Runs damaged models in processes of their own, and gives what came of each."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SECONDS = 5.0
START_SECONDS = 300.0


def run_cases(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the runner's line of each case; a hang or a dead process is an outcome too."""
    results: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left:
        done = _run(left)
        results |= done
        left = [name for name in left if name not in done]
        if not done:
            raise RuntimeError("the runner does not start")
    return results


def _run(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results up to the end, or to the first case that hangs or ends the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.models.malformed.runner"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(list(names)) + "\n")
    process.stdin.flush()
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    results: dict[str, dict[str, Any]] = {}
    begun: str | None = None
    while True:
        try:
            line = lines.get(timeout=START_SECONDS if begun is None else 2 * SECONDS)
        except queue.Empty:
            if begun is not None:
                results[begun] = {"name": begun, "outcome": "hang", "seconds": 2 * SECONDS, "mib": 0.0}
            break
        if line is None:
            if begun is not None:
                code = process.wait()
                results[begun] = {"name": begun, "outcome": f"the process ended: {code}", "seconds": 0.0, "mib": 0.0}
            break
        found = json.loads(line)
        begun = found["name"] if "begun" in found else None
        if begun is None:
            results[found["name"]] = found
    process.kill()
    process.wait()
    reader.join()
    process.stdin.close()
    process.stdout.close()
    return results
