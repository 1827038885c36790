"""How a product of few rows is cut for a GPU, and which products have a kernel."""

import dataclasses
import functools
import json
import math
import re
from importlib import resources

import jax
from jax.sharding import AxisType

from jaxengine.pallas_kernels.target import num_cores, target_device

ROWS = 64  # of a wgmma
MIN_ROWS = 8  # fewer are products with vectors, which XLA fuses with what is before and after them
MAX_ROWS = 256
# Of few rows, smaller weights are left to XLA: their steps are bound by the host, which calls XLA's own kernels faster.
MIN_WEIGHT_BYTES = 2**24
HOST_BOUND_ROWS = 64  # fewer are few
SMEM_BYTES = 232_448 - 2048  # of a block on Hopper, less what barriers take
REGISTERS = 65_536  # of a multiprocessor
MAX_TILE = 256  # rows that one TMA copy brings, and columns of a wgmma
MAX_STAGES = 12
H100 = "nvidia_h100_80gb_hbm3"
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")  # of device kinds; an AbstractDevice knows no compute capability

# For `seconds`: what the blocks of an H100 can draw from memory and from the L2 cache, all of them and one alone.
MEMORY_RATE, CACHE_RATE = 3.0e12, 5.5e12
MEMORY_RATE_ALONE, CACHE_RATE_ALONE = 28e9, 60e9
WAVE_SECONDS = 1.0e-6  # until a block's first bytes are there, and after its last


@dataclasses.dataclass(frozen=True)
class Config:
    """How a product is cut.

    Attributes:
      tile_n: rows of the weight of a thread block; a multiple of 8, or of 16 for gated products.
      splits: parts that the sums are cut into.
      occupancy: thread blocks that share a multiprocessor, and its shared memory.
      tile_k: columns of a block that one step of the pipeline brings; a multiple of 64.
    """

    tile_n: int
    splits: int = 1
    occupancy: int = 1
    tile_k: int = 64

    @property
    def label(self) -> str:
        """The cut as a short name."""
        return f"n{self.tile_n}_s{self.splits}_o{self.occupancy}_k{self.tile_k}"

    def num_stages(self, num_rows: int, itemsize: int, *, gated: bool) -> int:
        """Returns how many blocks are in flight.

        They are what shared memory holds beside the result, whose elements take `itemsize` bytes.
        """
        rows = _padded(num_rows)
        # Full tiles go from registers to memory; others through shared memory, since a copy can leave rows out.
        out_bytes = 0 if rows == num_rows else rows * self.tile_n * itemsize // (2 if gated else 1)
        stage_bytes = (rows + self.tile_n) * self.tile_k * 2
        return min(MAX_STAGES, (SMEM_BYTES // self.occupancy - out_bytes) // stage_bytes)

    def is_possible(self, num_rows: int, size_n: int, size_k: int, *, gated: bool) -> bool:
        """Returns whether the tiles fit the product, the ring shared memory, and the sums the registers."""
        num_blocks = size_k // self.tile_k
        threads = 128 * (_padded(num_rows) // ROWS + 1)
        registers = min(REGISTERS // (threads * self.occupancy), 255)
        itemsize = 2 if gated else 4
        return (
            size_n % self.tile_n == 0
            and size_k % self.tile_k == 0
            and self.tile_n % (16 if gated else 8) == 0
            and self.tile_n <= MAX_TILE
            and (self.splits == 1 or not gated)
            and num_blocks >= self.splits
            and self.tile_n // 2 + 32 <= registers
            and self.num_stages(num_rows, itemsize, gated=gated) >= 3
        )

    def seconds(self, num_rows: int, size_n: int, size_k: int, num_sms: int) -> float:
        """Returns a guess at the time, in seconds.

        It counts waves of blocks that draw on memory, and the parts, which are written and read again.
        """
        weight_bytes = self.tile_n * size_k * 2 / self.splits
        block_bytes = weight_bytes + num_rows * size_k * 2 / self.splits
        blocks, slots = size_n // self.tile_n * self.splits, num_sms * self.occupancy
        total = 0.0
        while blocks > 0:
            count = min(blocks, slots)
            alone = max(weight_bytes / MEMORY_RATE_ALONE, block_bytes / CACHE_RATE_ALONE) * math.ceil(count / num_sms)
            total += max(count * weight_bytes / MEMORY_RATE, count * block_bytes / CACHE_RATE, alone)
            total += WAVE_SECONDS / self.occupancy
            blocks -= count
        parts_bytes = 0 if self.splits == 1 else self.splits * num_rows * size_n * 4 * 2
        return total + parts_bytes / CACHE_RATE


def _padded(num_rows: int) -> int:
    return -(-num_rows // ROWS) * ROWS


def candidates(num_rows: int, size_n: int, size_k: int, num_sms: int, *, gated: bool) -> list[Config]:
    """Returns all possible ways to cut a product, the most promising first."""
    configs = [
        Config(tile_n, splits, occupancy)
        for tile_n in range(32, MAX_TILE + 1, 16)
        for occupancy in (1, 2)
        for splits in (range(1, 9) if not gated else (1,))
    ]
    configs = [c for c in configs if c.is_possible(num_rows, size_n, size_k, gated=gated)]
    return sorted(configs, key=lambda c: (c.seconds(num_rows, size_n, size_k, num_sms), c.splits, -c.tile_n))


def choose_config(num_rows: int, size_n: int, size_k: int, *, gated: bool) -> Config | None:
    """Returns how to cut a product on the device that is compiled for.

    That is what was measured there, or else what looks best.

    Returns:
      None if no way to cut it is possible, or XLA's own product was faster.
    """
    device = target_device()
    return _choose_config(num_rows, size_n, size_k, gated, device.device_kind, num_cores(device) or 132)


@functools.cache
def _choose_config(num_rows: int, size_n: int, size_k: int, gated: bool, kind: str, num_sms: int) -> Config | None:
    product = f"{size_n}x{size_k}{' gated' if gated else ''}"
    measured = {int(rows): c for rows, c in _tuning(kind).get("configs", {}).get(product, {}).items()}
    # What is best for more rows is possible for fewer, and near the best.
    for rows in sorted(measured):
        if rows >= num_rows:
            config = None if measured[rows] is None else Config(**measured[rows])
            if config is None or config.is_possible(num_rows, size_n, size_k, gated=gated):
                return config
    return next(iter(candidates(num_rows, size_n, size_k, num_sms, gated=gated)), None)


@functools.cache
def _tuning(device_kind: str) -> dict:
    """Returns the tuning file of a device kind, such as "NVIDIA H200"; that of the H100 for one that has none."""
    tuning = resources.files("jaxengine.pallas_kernels") / "tuning"
    files = (tuning / folder / "skinny_matmul.json" for folder in (device_kind.lower().replace(" ", "_"), H100))
    return next((json.loads(file.read_text()) for file in files if file.is_file()), {})


def is_hopper() -> bool:
    """Returns whether what is compiled for is a Hopper GPU, and XLA need not cut the kernel for several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    is_cut = any(
        size > 1 and kind == AxisType.Auto for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )
    device = target_device()
    return device.platform == "gpu" and HOPPER.search(device.device_kind) is not None and not is_cut
