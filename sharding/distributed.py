"""One model over several processes or hosts: all run the same script on the same requests, and share one mesh.

JAX's model is multi-controller: every process dispatches the same steps in the same order. So nothing that decides a
step may depend on a clock, on a race or on one host's memory.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxengine.sharding.process_group import ProcessGroup

DEAD_SECONDS = 15
"""After how long JAX ends the processes whose peer has died."""
START_SECONDS = 20
"""After how long JAX gives up waiting for others; it takes some seconds more to end."""
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the launcher; before JAX is used for anything else.

    Reads `MASTER_ADDR`, `MASTER_PORT`, `RANK` and `WORLD_SIZE`, as torchrun sets them. Without them JAX detects the
    cluster: SLURM, Open MPI, TPU pods. Does nothing if `jax.distributed` has been initialised already.

    Raises:
        ValueError: Nothing says which processes there are, what does is wrong, or they do not come in time.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = {"heartbeat_timeout_seconds": DEAD_SECONDS, "initialization_timeout": START_SECONDS}
    given = [name for name in TORCHRUN if environment.get(name)]
    try:
        if not given:
            jax.distributed.initialize(**seconds)
        else:
            _join_torchrun(environment, seconds)
    except RuntimeError as error:  # JAX was used before
        raise ValueError(f"distributed_executor_backend='external_launcher': {error}") from error
    except ValueError as error:
        if given:
            raise
        raise ValueError(
            "distributed_executor_backend='external_launcher': no launcher found: set "
            f"{', '.join(TORCHRUN)}, or use SLURM, Open MPI or a TPU pod ({error})"
        ) from error
    atexit.register(_end_at_once_after_an_error)


def _join_torchrun(environment: Mapping[str, str], seconds: dict[str, int]) -> None:
    missing = [name for name in TORCHRUN if not environment.get(name)]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be set too, as torchrun sets them")
    numbers = {}
    for name in TORCHRUN[1:]:
        if not environment[name].isdecimal():
            raise ValueError(f"{name}={environment[name]!r}: expected a number")
        numbers[name] = int(environment[name])
    port, rank, size = numbers.values()
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port += 1  # torchrun itself listens at its own
    host = environment["MASTER_ADDR"]
    # JAX crashes where the port is in use, and aborts if someone is missing: find out before.
    ProcessGroup(rank, size, host, port, names=("WORLD_SIZE", "MASTER_PORT")).close()
    local = environment.get("LOCAL_RANK") if environment.get("LOCAL_WORLD_SIZE", "1") != "1" else None
    jax.distributed.initialize(
        f"{host}:{port}",
        size,
        rank,
        local_device_ids=None if local is None else int(local),
        cluster_detection_method="deactivate",
        **seconds,
    )


def _end_at_once_after_an_error() -> None:
    """JAX waits at exit for all processes, for minutes: those that wait for this one in a step would never come."""
    if getattr(sys, "last_exc", None) is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def is_multiprocess() -> bool:
    """Returns whether the mesh belongs to several processes."""
    return jax.process_count() > 1


def least_of_all_processes(value: int) -> int:
    """Returns the least of the values of all processes; each must call this."""
    if not is_multiprocess():
        return value
    return int(np.min(multihost_utils.process_allgather(np.int32(value))))
