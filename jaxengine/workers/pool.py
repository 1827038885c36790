"""The parent's side of worker processes: starts them, hands out jobs, and ends what takes too long."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import IO, Any

NUM_WORKERS = 2
"""One may be busy with something hard: others do not wait for it."""
JOB_SECONDS = 10.0
MEMORY_BYTES = 512 * 2**20
"""That a job may take beside what a worker has at its start."""
MAX_KEPT_BYTES = 16 * 2**20
"""That a worker may keep of what its jobs took; else the next job gets a fresh one."""
START_SECONDS = 120.0
MAX_WAITING = 256
MAX_FAILED_STARTS = 3


class WorkerError(RuntimeError):
    """No worker could do a job: they are too many, or no process can be started."""


class WorkerPool:
    """Worker processes of one engine. Its methods may be called from any thread.

    A job that takes too long, too much memory or its process down is an error of its own; the next job gets a fresh
    process.
    """

    def __init__(self, make_setup: Callable[[], dict[str, Any]], *, job_seconds: float = JOB_SECONDS):
        """Starts nothing yet.

        Args:
            make_setup: Gives what `Jobs` takes; called once, by the first thread that starts a worker.
            job_seconds: What a job may take.
        """
        self._make_setup, self._job_seconds = make_setup, job_seconds
        self._setup: bytes | None = None
        self._waiting: queue.Queue[tuple[dict[str, Any], Future[Any]] | None] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._num_failed_starts = 0

    def start(self) -> None:
        """Starts the workers, so that the first jobs do not wait for them. Can be called again."""
        with self._lock:
            while len(self._threads) < NUM_WORKERS and not self._closed:
                self._threads.append(threading.Thread(target=self._serve, daemon=True, name="jaxengine-worker"))
                self._threads[-1].start()

    def submit(self, **job: Any) -> Future[Any]:
        """Queues a job: its kind and arguments, as `Jobs` has them.

        Returns:
            Its result to come. A ValueError in it says what is wrong with the job, a WorkerError that there is no
            worker for it.

        Raises:
            WorkerError: Too many jobs wait.
        """
        if self._closed or self._waiting.qsize() >= MAX_WAITING:
            raise WorkerError("too many grammars and templates wait to be looked at; try again later")
        self.start()
        future: Future[Any] = Future()
        self._waiting.put((job, future))
        return future

    def check(self) -> None:
        """Raises WorkerError if no worker can be started."""
        if self._num_failed_starts >= MAX_FAILED_STARTS:
            raise WorkerError("worker processes cannot be started")

    def close(self) -> None:
        """Ends the processes at once; jobs that wait fail. Can be called again."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()
        for _ in self._threads:
            self._waiting.put(None)

    def _serve(self) -> None:
        """Does jobs one after the other, in a process that belongs to this thread."""
        worker = self._try_start()
        while (item := self._waiting.get()) is not None:
            job, future = item
            if not future.set_running_or_notify_cancel():
                continue
            worker = worker or self._try_start()
            if worker is None:
                future.set_exception(WorkerError("worker processes cannot be started"))
                continue
            try:
                future.set_result(worker.run(job, self._job_seconds))
            except ValueError as error:
                future.set_exception(error)
            except OSError as error:  # it died between two jobs
                future.set_exception(WorkerError(f"a worker process has ended: {error}"))
            if worker.is_dead:
                self._workers.discard(worker)
                worker = self._try_start()
        if worker is not None:
            worker.kill()

    def _try_start(self) -> _Worker | None:
        if self._closed:
            return None
        try:
            with self._lock:
                if self._setup is None:
                    self._setup = json.dumps(self._make_setup() | {"memory_bytes": MEMORY_BYTES}).encode() + b"\n"
            worker = _Worker(self._setup)
        except (OSError, ValueError):
            self._num_failed_starts += 1
            return None
        self._num_failed_starts = 0
        with self._lock:
            if not self._closed:
                self._workers.add(worker)
                return worker
        worker.kill()
        return None


class _Worker:
    """One process.

    Attributes:
        is_dead: It has ended, or has been ended.
    """

    def __init__(self, setup: bytes):
        """Starts it, and waits until it can take a job.

        Raises:
            OSError: It does not start.
        """
        # The new interpreter must find what this one finds, however it came to, and nothing where it happens to be.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxengine.workers.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self.is_dead = False
        answer = self._exchange(setup, START_SECONDS)
        if answer is None:
            raise OSError("a worker process did not start")
        self._max_memory = answer["memory"] + MAX_KEPT_BYTES

    def run(self, job: dict[str, Any], seconds: float) -> Any:
        """Does a job.

        Raises:
            ValueError: What is wrong with it.
            OSError: The process had ended before.
        """
        answer = self._exchange(json.dumps(job).encode() + b"\n", seconds)
        if answer is None:
            code = self._process.poll()
            if code is None or self._timed_out:
                raise ValueError(f"it takes longer than {seconds:g} s to look at")
            raise ValueError("it is too complex: it takes too much memory, or is nested too deeply")
        if answer["memory"] > self._max_memory:
            self.kill()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def kill(self) -> None:
        """Ends the process at once."""
        self.is_dead = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # what was not written yet has no reader any more
                continue

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """Sends a line and reads one; None if the process ends instead, or has to be ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._timed_out = False
        timer = threading.Timer(seconds, self._time_out)
        timer.daemon = True
        timer.start()
        try:
            answer = _send_and_read(stdin, stdout, line)
        finally:
            timer.cancel()
        if answer is None:
            self.kill()
            return None
        return json.loads(answer)

    def _time_out(self) -> None:
        self._timed_out = True
        self._process.kill()


def _send_and_read(stdin: IO[bytes], stdout: IO[bytes], line: bytes) -> bytes | None:
    """Returns an answer; None if the process has ended before it was whole."""
    try:
        stdin.write(line)
        stdin.flush()
        answer = stdout.readline()
    except (OSError, ValueError):  # a broken pipe, or one closed by `kill`
        return None
    return answer if answer.endswith(b"\n") else None
