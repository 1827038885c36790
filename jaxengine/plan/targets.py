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
    "NVIDIA H100 80GB HBM3": Chip(84942979072, 3352e9, 989e12),
    "NVIDIA H200": Chip(150754820096, 4800e9, 989e12),
}
"""By JAX's name of the kind of device; figures of Google Cloud's documentation (2026-11), and of NVIDIA's data sheets
for the SXM cards (products of dense matrices), whose memory is what the driver reports."""
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
EXAMPLES = "v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1, h100:1, h200:8"
# XLA's GpuTargetConfigProto of a Hopper card.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory_bytes} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }} device_description_str: "{name}"
"""


def open_target(target: str) -> tuple[list[Any], Chip]:
    """Returns devices that need not be there, and what one of them can do.

    Args:
        target: A TPU's generation and topology, such as "v6e:2x2", or a GPU and how many of one host: "h100:4".

    Raises:
        ValueError: What compiles for the target, libtpu or JAX's CUDA plugin, is not installed or does not know it.
    """
    name, _, count = target.partition(":")
    if name not in GPUS:
        return _open_tpus(target)
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"target={target!r}: how many {name} is {count!r}; examples: {EXAMPLES}")
    return _open_gpus(GPUS[name], int(count))


def _open_gpus(name: str, count: int) -> tuple[list[Any], Chip]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ValueError(
            'JAX\'s CUDA plugin, the compiler for NVIDIA GPUs, is not installed: pip install "jax[cuda13]" (no GPU '
            "is needed)"
        )
    # No GPU is used: do not look for one, nor at the versions of its libraries.
    for setting, value in {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}.items():
        os.environ.setdefault(setting, value)
    from jax.experimental import topologies

    chip = CHIPS[name]
    config = HOPPER.format(name=name, bandwidth=chip.bandwidth, memory_bytes=chip.memory_bytes)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=config
    )
    return list(topology.devices), chip


def _open_tpus(target: str) -> tuple[list[Any], Chip]:
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
            f"target={target!r}: no such GPU, and libtpu knows no such topology ({reason}); examples: {EXAMPLES}"
        ) from error
    kind = devices[0].device_kind
    if kind not in CHIPS:
        raise ValueError(f"target={target!r} is a {kind}; known: {', '.join(CHIPS)}")
    return devices, CHIPS[kind]
