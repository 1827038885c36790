"""What vLLM reaches on the GPU preset's rows, and what we aim at, card by card. Nothing here imports jax."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jaxengine.bench.presets import GpuRow


@dataclass(frozen=True)
class Figures:
    """What a row is compared with, in the row's unit.

    Attributes:
        vllm: What vLLM reaches; None where it was not measured.
        goal: What we aim at; None where no goal is set.
    """

    vllm: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Card:
    """A kind of device on which vLLM was measured.

    Attributes:
        device_kind: What JAX calls it.
        name: A short name.
        source: With what, when and how vLLM was measured.
        figures: The figures of rows, by the number of cards that share a model.
    """

    device_kind: str
    name: str
    source: str
    figures: dict[int, dict[GpuRow, Figures]]


_SETTINGS = "its defaults but prefix caching off, max_num_seqs=256, max_model_len=4608"
_DecodeTable = dict[str, dict[tuple[int, int], tuple[float | None, float]]]
"""By model, then by (B, context): vLLM's milliseconds a step and our goal."""
_RunTable = dict[str, tuple[Figures, Figures, Figures]]
"""By model: output tokens/s of `mixed()`, prefill tokens/s of 64 x 1024, milliseconds to the first token of 1024."""

_H100_DECODE: _DecodeTable = {
    "llama-3.1-8b": {
        (1, 1024): (6.57, 5.7),
        (16, 1024): (7.33, 6.5),
        (64, 1024): (10.03, 9.0),
        (256, 1024): (21.3, 19.0),
        (64, 4096): (18.7, 18.0),
    },
    "qwen3-0.6b": {(1, 128): (2.47, 1.0), (16, 1024): (2.46, 1.6), (64, 1024): (4.41, 3.6), (256, 1024): (12.7, 12.0)},
    "llama-3.2-1b": {(1, 128): (1.64, 1.1), (64, 1024): (2.90, 2.1), (256, 1024): (6.64, 5.0)},
}
_H100_RUNS: _RunTable = {
    "llama-3.1-8b": (Figures(8514, 10000), Figures(43868, 44000), Figures(39.4, 30)),
    "qwen3-0.6b": (Figures(19550, 30000), Figures(333855, 340000), Figures(29.8, 10)),
    "llama-3.2-1b": (Figures(25978, 34000), Figures(265302, 340000), Figures(10.7, 8)),
}
_TWO_H100 = {
    GpuRow("decode", "llama-3.1-8b", 1, 1024): Figures(4.22, 3.7),
    GpuRow("decode", "llama-3.1-8b", 16, 1024): Figures(5.23, 4.3),
    GpuRow("decode", "llama-3.1-8b", 64, 1024): Figures(7.20, 6.0),
    GpuRow("decode", "llama-3.1-8b", 256, 1024): Figures(12.9, 11.3),
    GpuRow("prefill", "llama-3.1-8b", 64, 1024): Figures(72731, 74000),
}

_H200_DECODE: _DecodeTable = {
    "llama-3.1-8b": {
        (1, 1024): (5.01, 4.1),
        (16, 1024): (5.54, 4.7),
        (64, 1024): (7.81, 6.5),
        (256, 1024): (18.36, 14.3),
        (64, 4096): (13.92, 12.6),
    },
    "qwen3-0.6b": {(1, 128): (1.70, 0.6), (16, 1024): (2.43, 1.2), (64, 1024): (3.83, 2.6), (256, 1024): (10.39, 8.6)},
    "llama-3.2-1b": {(1, 128): (None, 0.8), (64, 1024): (None, 1.5), (256, 1024): (None, 3.5)},
}
_H200_RUNS: _RunTable = {
    "llama-3.1-8b": (Figures(9868), Figures(43318), Figures(26.2)),
    "qwen3-0.6b": (Figures(24001), Figures(414265), Figures(15.7)),
    "llama-3.2-1b": (Figures(), Figures(), Figures()),
}


def _one_card(decode: _DecodeTable, runs: _RunTable) -> dict[GpuRow, Figures]:
    found = {
        GpuRow("decode", model, *shape): Figures(*figures)
        for model, shapes in decode.items()
        for shape, figures in shapes.items()
    }
    for model, (mixed, prefill, first_token) in runs.items():
        found[GpuRow("mixed", model, 256, None)] = mixed
        found[GpuRow("prefill", model, 64, 1024)] = prefill
        found[GpuRow("first token", model, 1, 1024)] = first_token
    return found


CARDS = (
    Card(
        "NVIDIA H100 80GB HBM3",
        "H100",
        f"vLLM 0.24.0 on NVIDIA H100 80GB (3.0 TB/s copy), as many as here, 2026-11-23, {_SETTINGS}",
        {1: _one_card(_H100_DECODE, _H100_RUNS), 2: _TWO_H100},
    ),
    Card(
        "NVIDIA H200",
        "H200",
        f"vLLM 0.24.0 on one NVIDIA H200 141GB (4.07 TB/s copy), 2026-12-01, {_SETTINGS}",
        {1: _one_card(_H200_DECODE, _H200_RUNS)},
    ),
)


@dataclass(frozen=True)
class Comparison:
    """What rows are compared with on the device that runs them.

    Attributes:
        card: The device's card; None if there is nothing to compare with.
        note: Where the figures are from, or why there are none.
        figures: By row.
    """

    card: Card | None
    note: str
    figures: dict[GpuRow, Figures]

    def of(self, row: GpuRow) -> Figures:
        """Returns a row's figures, which may all be None."""
        return self.figures.get(row, Figures())


def comparison(device_kinds: Collection[str], num_devices: int = 1) -> Comparison:
    """Returns what measurements on these devices are compared with.

    Args:
        device_kinds: What JAX calls the devices that are there. Only a machine of one kind is compared.
        num_devices: How many of them share a model.
    """
    card = next((card for card in CARDS if {card.device_kind} == set(device_kinds)), None)
    if card is not None and num_devices in card.figures:
        return Comparison(card, card.source, card.figures[num_devices])
    known = ", ".join(f"{size} x {card.device_kind}" for card in CARDS for size in card.figures)
    here = f"{num_devices} x {', '.join(sorted(device_kinds))}"
    return Comparison(None, f"No comparison: vLLM's figures and goals are for {known}; this is {here}.", {})
