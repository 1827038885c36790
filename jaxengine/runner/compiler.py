"""Compiles the steps in background threads, most needed first, and counts compilations."""

import atexit
import functools
import gc
import heapq
import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from typing import Any

import jax

from jaxengine.host_memory import release_free_memory

logger = logging.getLogger(__name__)


class CompilationCounter:
    """Counts XLA compilations of this process from the moment it is made; a hit in the persistent cache counts too."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == self.EVENT:
            self.count += 1


class StepCompiler:
    """A set of compiled functions by key. Work is done by daemon threads, so a program can end before it is.

    Nothing less urgent is begun while something more urgent is compiled: compilations take turns at locks and at
    Python's interpreter, and eight at once would make the one that a step waits for take several times as long.

    A program that ends without `close` is closed at exit: a thread that comes back from XLA to a Python that is no
    longer there aborts the process.
    """

    URGENT = -sys.maxsize
    """The priority of what a step waits for: ahead of all others."""

    def __init__(
        self, compile_one: Callable[[Any], Any], num_threads: int, when_done: Callable[[], object] | None = None
    ):
        """Starts the threads.

        Args:
            compile_one: Compiles what a key names.
            num_threads: How many compile at once.
            when_done: Called, by one of them, whenever all that was queued is compiled, before those who wait for the
                last of it go on.
        """
        self._compile_one = compile_one
        self._when_done = when_done
        self._futures: dict[Hashable, Future] = {}
        self._waiting: list[tuple[int, int, Any]] = []  # a heap: priority, order, key
        self._running: dict[Hashable, int] = {}  # priorities
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"jaxengine-compile-{i}", daemon=True) for i in range(num_threads)
        ]
        atexit.register(self.close)
        for thread in self._threads:
            thread.start()

    def add(self, keys: Iterable[Any], priority: int = 0) -> None:
        """Queues keys that are not there yet, in order; those of a lower number come first."""
        with self._changed:
            for key in keys:
                if key not in self._futures:
                    self._futures[key] = Future()
                    heapq.heappush(self._waiting, (priority, next(self._order), key))
            self._changed.notify_all()

    def is_ready(self, key: Any) -> bool:
        """Returns whether a program's compilation has ended, well or not."""
        future = self._futures.get(key)
        return future is not None and future.done()

    def ready_keys(self) -> list[Hashable]:
        """Returns the keys of the programs whose compilation has ended."""
        return [key for key, future in self._futures.items() if future.done()]

    def get(self, key: Any) -> Any:
        """Returns the compiled function; waits for it, ahead of all others, if need be.

        Raises:
            Exception: Whatever its compilation raised.
        """
        if not self.is_ready(key):
            self.add([key], self.URGENT)
            self._hurry(key)
        return self._futures[key].result()

    def wait(self, keys: Iterable[Any]) -> None:
        """Waits until all keys are compiled."""
        for key in list(keys):
            self._futures[key].result()

    def close(self) -> None:
        """Stops after the compilations under way, and waits for those: XLA must not be torn down beneath them."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for future in self._futures.values():
            future.cancel()

    def _hurry(self, key: Any) -> None:
        """Makes a key that waits or is compiled urgent."""
        with self._changed:
            if key in self._running:
                self._running[key] = self.URGENT
            for index, (priority, order, waiting) in enumerate(self._waiting):
                if waiting == key and priority > self.URGENT:
                    self._waiting[index] = self.URGENT, order, key
                    heapq.heapify(self._waiting)
                    break
            self._changed.notify_all()

    def _may_begin(self) -> bool:
        return bool(self._waiting) and self._waiting[0][0] <= min(self._running.values(), default=sys.maxsize)

    def _work(self) -> None:
        _be_nice()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_begin())
                if self._closed:
                    return
                priority, _, key = heapq.heappop(self._waiting)
                self._running[key] = priority
            future = self._futures[key]
            future.set_running_or_notify_cancel()
            try:
                compiled = self._compile_one(key)
                release_free_memory()
            except BaseException as error:  # handed to whoever waits for the key
                logger.debug("compilation of %s failed", key, exc_info=True)
                finish = functools.partial(future.set_exception, error)
            else:
                finish = functools.partial(future.set_result, compiled)
            with self._changed:
                del self._running[key]
                is_done = not self._running and not self._waiting
                self._changed.notify_all()
            try:
                if is_done and self._when_done is not None and not self._closed:
                    self._when_done()
            finally:
                finish()


def freeze_heap() -> None:
    """Hides what is there now from Python's garbage collector, until `gc.unfreeze()`.

    Tracing and compiling leave a million objects that stay. While steps run, the collector would walk them all every
    few hundred steps, and the device would wait.
    """
    gc.collect()
    gc.freeze()


def _be_nice() -> None:
    """Lowers this thread's priority, and that of the threads XLA starts from it, below the running steps'.

    Linux only, where priorities belong to threads. On CPU the compiler and the steps share the cores.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
