"""Processes that lower programs into the store of an engine that starts, beside it.

Tracing a step and lowering its kernels is Python, seconds a shape, one at a time in one process, whose steps wait for
it as well. Here other processes do that, which need no device, and the engine's own reads what they have written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

import jax

from jaxengine.config import EngineConfig
from jaxengine.models.abstract import abstract_model
from jaxengine.pallas_kernels.target import num_cores, target_device
from jaxengine.runner.lowering import lower
from jaxengine.runner.program_store import jax_options, open_store
from jaxengine.runner.programs import Program, ProgramContext

logger = logging.getLogger(__name__)

MAX_PROCESSES = 8
PROGRAMS_A_PROCESS = 4  # fewer are not worth one, which takes some seconds to start
MAX_SECONDS = 180.0  # for one program, or to start; a process that takes longer is ended, and nothing waits for it


def choose_num_processes(num_programs: int) -> int:
    """Returns how many processes lower so many programs: as many as half of the cores, and as are worth starting."""
    return min(MAX_PROCESSES, (os.cpu_count() or 1) // 2, num_programs // PROGRAMS_A_PROCESS)


def start_pool(config: EngineConfig, keys: Iterable[Program]) -> LoweringPool | None:
    """Starts processes for programs, if that is worth some, by default on GPUs only; elsewhere nobody counts `keys`."""
    number = config.num_lowering_processes
    if number == 0 or (number is None and config.platform != "gpu"):
        return None
    num_programs = sum(1 for _ in keys)
    if number is None:
        number = choose_num_processes(num_programs)
    return LoweringPool(number) if number and num_programs else None


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process must know. Sent through a pipe.

    Attributes:
        config: The engine's, without what cannot be sent.
        options: JAX's that programs depend on.
        cache_folder: JAX's compilation cache, where the store is.
        device: Kind, platform and cores of the device, which the process does not see.
    """

    config: EngineConfig
    options: dict[str, Any]
    cache_folder: str
    device: tuple[str, str, int | None]


class LoweringPool:
    """The processes, and this one, take turns at whatever comes."""

    def __init__(self, num_processes: int):
        """Starts so many processes, which takes them some seconds; they wait for `begin`."""
        self._job: Job | None = None
        self._closed = False
        self._helpers: set[_Process] = set()  # that are ready
        # Who has nothing to do; None is this process, which has its turn where there are no others.
        self._free: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._free.put(None)
        self._processes = [_Process() for _ in range(num_processes)]

    def begin(self, config: EngineConfig, num_pages: int) -> None:
        """Tells the processes what they lower for; until the first of them is ready, this process lowers.

        Args:
            config: The engine's.
            num_pages: Of its cache.
        """
        if self._job is not None:
            return
        # Functions of users stay here: they need not be importable elsewhere.
        config = dataclasses.replace(config, num_pages=num_pages, logits_processors=())
        device = target_device()
        about = device.device_kind, device.platform, num_cores(device)
        self._job = Job(config, jax_options(), jax.config.jax_compilation_cache_dir, about)
        for process in self._processes:
            threading.Thread(target=self._begin, args=(process,), name="jaxengine-lowering", daemon=True).start()

    def _begin(self, process: _Process) -> None:
        assert self._job is not None
        try:
            process.ask(self._job)
        except (EOFError, OSError) as error:
            if not self._closed:
                logger.warning("a process that lowers programs did not start: %s", error)
            return
        self._helpers.add(process)
        self._free.put(process)

    @contextlib.contextmanager
    def turn(self, key: Program) -> Iterator[None]:
        """Waits for whoever is free. Inside, the program is in the store, or else it is this process's turn."""
        process = None if self._closed else self._free.get()
        if process is None:
            try:
                yield
            finally:
                if not self._helpers:
                    self._free.put(None)
            return
        try:
            process.ask(key)
        except (EOFError, OSError) as error:
            if not self._closed:
                logger.warning("a process that lowers programs has ended (%s): this one goes on", error)
            self._helpers.discard(process)
            process = None
        self._free.put(process)
        yield

    def close(self) -> None:
        """Ends the processes."""
        self._closed = True
        self._free.put(None)
        for process in self._processes:
            process.close()


class _Process:
    """One of them, and the pipe to it, whose end ends it."""

    def __init__(self):
        self._pipe, theirs = Pipe()
        # The new interpreter must find what this one finds, but no GPU; and Ctrl-C is for this process only.
        environment = {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxengine.runner.lowering_pool", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()

    def ask(self, what: Job | Program) -> None:
        """Sends it something, and waits until that is done.

        Raises:
            EOFError, OSError: The process has ended, or had to be.
        """
        self._pipe.send(what)
        if not self._pipe.poll(MAX_SECONDS):
            self.close()
            raise TimeoutError(f"no answer within {MAX_SECONDS:.0f} s")
        self._pipe.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main(pipe: Connection) -> None:
    """Lowers what is asked for until the other end is closed."""
    os.nice(10)
    job: Job = pipe.recv()
    for name, value in {**job.options, "jax_compilation_cache_dir": job.cache_folder}.items():
        jax.config.update(name, value)
    kind, platform, cores = job.device
    device = jax.sharding.AbstractDevice(device_kind=kind, platform=platform, num_cores=cores)
    config = job.config
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        context = ProgramContext.make(abstract_model(config.model, config.dtype, config.weight_dtype), config)
        store = open_store(config, context.num_pages)
        pipe.send(None)
        while True:
            key = pipe.recv()
            try:
                lower(key, context, store)
            except Exception:  # the engine's process, which finds nothing in the store, raises it again
                logger.debug("%s was not lowered", key, exc_info=True)
            pipe.send(None)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):  # the engine's process has ended
        main(Connection(int(sys.argv[1])))
    os._exit(0)  # nothing here is worth waiting for
