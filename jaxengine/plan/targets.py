"""Devices to plan for. Nothing here imports jax before `open_target`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them (on TPU7x two of them make a chip).

    Attributes:
        memory_bytes: Of its HBM.
        bandwidth: Bytes per second from there.
        flops: bfloat16 operations per second of its matrix units.
    """

    memory_bytes: int
    bandwidth: float
    flops: float


CHIPS = {
    "TPU v5 lite": Chip(16 * GIB, 819e9, 197e12),
    "TPU v5": Chip(95 * GIB, 2765e9, 459e12),
    "TPU v6 lite": Chip(32 * GIB, 1640e9, 918e12),
    "TPU7x": Chip(96 * GIB, 3690e9, 1153.5e12),
}
"""By JAX's name of the kind of device; figures of Google Cloud's documentation (2026-11)."""
EXAMPLES = "v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1"


def open_target(target: str) -> tuple[list[Any], Chip]:
    """The devices of a TPU topology, which need not be there, and what one of them can do.

    Args:
        target: Generation and topology, such as "v6e:2x2".

    Raises:
        ValueError: libtpu, which compiles for TPUs, is not installed, or it does not know the target.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, the compiler for TPUs, is not installed: pip install libtpu")
    settings = {
        "TPU_LIBRARY_PATH": importlib.import_module("libtpu").get_library_path(),
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask the network what machine this is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so others may use libtpu too
        "TPU_WORKER_HOSTNAMES": "localhost",  # or libtpu complains of what it could not find out
        "TPU_ACCELERATOR_TYPE": "v6e-1",
        "JAX_PLATFORMS": "cpu",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)
    except Exception as error:  # whatever libtpu raises for a name that it cannot read
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"target={target!r}: libtpu knows no such topology ({reason}); examples: {EXAMPLES}"
        ) from error
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ValueError(f"target={target!r} is a {kind}; known: {', '.join(CHIPS)}")
    return devices, CHIPS[kind]
