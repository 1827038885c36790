"""A worker process: reads jobs from stdin, a line of JSON each, and answers on stdout. Imports neither jax nor zmq."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from typing import Any

from jaxengine.messages import shorten
from jaxengine.workers.jobs import Jobs, memory_bytes

STACK_BYTES = 2 * 2**20
"""A quarter of what threads usually have: nesting that fits here does not overflow the engine's own stack."""
MAX_MESSAGE = 500
NICE = 5
"""Others go first: they have shown what they cost."""


def main() -> None:
    """Runs jobs until stdin ends."""
    setup = json.loads(sys.stdin.buffer.readline())
    with contextlib.suppress(AttributeError, OSError):  # Windows has none
        os.nice(NICE)
    jobs = Jobs(setup)
    _limit_memory(setup["memory_bytes"])
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_work, args=(jobs, waiting), daemon=True).start()
    _answer({"pid": os.getpid(), "memory": memory_bytes()})
    # The parent may end while a job runs: then stdin ends, and with it this process.
    for line in sys.stdin.buffer:
        waiting.put(line)
    os._exit(0)


def _work(jobs: Jobs, waiting: queue.SimpleQueue[bytes]) -> None:
    while True:
        line = waiting.get()
        try:
            answer: dict[str, Any] = {"result": jobs.run(json.loads(line))}
        except ValueError as error:
            answer = {"error": shorten(str(error), MAX_MESSAGE)}
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except RecursionError:
            answer = {"error": "it is nested too deeply"}
        except Exception as error:  # whatever a job's input made a library raise
            answer = {"error": shorten(f"{type(error).__name__}: {error}", MAX_MESSAGE)}
        _answer(answer | {"memory": memory_bytes()})


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _limit_memory(num_bytes: int) -> None:
    """Lets this process take so much more memory than it has now; where the system has no such limit, nothing."""
    try:
        import resource
        from pathlib import Path

        sizes = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        limit = int(sizes["VmData"].split()[0]) * 1024 + num_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, KeyError, ValueError):  # not Linux: time alone bounds jobs there
        return


if __name__ == "__main__":
    main()
