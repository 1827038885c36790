"""In which order the devices of the `model` axis hold the parts of a model: heads, and what fused products make.

A fused product's columns lie device by device, each device's queries, keys and values (or gate and up) side by side, so
that taking them apart moves nothing. Where heads are too few or do not divide, key-value heads are held by several
devices or heads of zeros are added, which change nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

Runs = tuple[tuple[int, int], ...]
"""Where the rows of a parameter come from: (first row of the checkpoint's, how many), -1 for rows of zeros. Empty: as
they are there."""
ZEROS = -1


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """The heads of attention over `size` devices.

    Attributes:
        size: Devices that share the heads.
        num_heads: Query heads, those of zeros included.
        num_kv_heads: Key-value heads, copies and those of zeros included; `size` divides both.
        q_heads: The checkpoint's head that each query head is, or -1.
        kv_heads: Likewise of key-value heads.
    """

    size: int
    num_heads: int
    num_kv_heads: int
    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @property
    def is_padded(self) -> bool:
        """Whether there are heads of zeros."""
        return ZEROS in self.q_heads


def head_layout(num_heads: int, num_kv_heads: int, size: int) -> HeadLayout:
    """Lays heads out over `size` devices: as they are, else copying key-value heads, else with heads of zeros.

    Args:
        num_heads: N.
        num_kv_heads: K, which divides N; query head i belongs to key-value head `i // (N / K)`.
        size: Devices.
    """
    group = num_heads // num_kv_heads
    copies = size // num_kv_heads
    if num_kv_heads % size == 0:
        kv_heads = tuple(range(num_kv_heads))
    elif size % num_kv_heads == 0 and group % copies == 0:
        kv_heads = tuple(i // copies for i in range(size))
        group //= copies
    else:
        padded = -(-num_kv_heads // size) * size
        kv_heads = (*range(num_kv_heads), *[ZEROS] * (padded - num_kv_heads))
    total = len(kv_heads) * group
    q_heads = tuple(i if i < num_heads else ZEROS for i in range(total))
    return HeadLayout(size, total, len(kv_heads), q_heads, kv_heads)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one layer of a checkpoint is of an axis of a parameter: the queries' rows of the fused product, or all.

    Attributes:
        name: Of that layer, such as "q_proj".
        size: Rows (or columns) that the checkpoint has of it.
        unit: Rows that no device shares with another, such as those of a head; of no meaning without `units`.
        units: The checkpoint's unit that each of ours is, or -1 for one of zeros. Empty: all of them in their order, an
            equal share for each device.
    """

    name: str
    size: int
    unit: int = 0
    units: tuple[int, ...] = ()

    @property
    def own_size(self) -> int:
        """Rows that we have of it, copies and those of zeros included."""
        return self.unit * len(self.units) if self.units else self.size

    def share(self, num_devices: int) -> tuple[int, tuple[int, ...]]:
        """Returns the rows of a unit, and the unit that each of ours is, so that devices hold whole units."""
        return (self.unit, self.units) if self.units else (self.size // num_devices, tuple(range(num_devices)))

    def in_blocks(self, block: int) -> Part:
        """Returns the same part of an array that has one number for every `block` rows."""
        return dataclasses.replace(self, size=-(-self.size // block), unit=self.unit // block)


def fused_runs(parts: Sequence[Part], num_devices: int) -> Runs:
    """Returns the rows of a parameter, device by device: each has its share of every part, one after the other.

    Args:
        parts: Laid end to end in the checkpoint.
        num_devices: How many share them; it divides the number of units of every part.
    """
    runs: list[tuple[int, int]] = []
    firsts = [0, *itertools.accumulate(part.size for part in parts)]
    shares = [part.share(num_devices) for part in parts]
    for device in range(num_devices):
        for first, (rows, units) in zip(firsts, shares, strict=False):
            share = len(units) // num_devices
            for unit in units[device * share : (device + 1) * share]:
                _append(runs, ZEROS if unit == ZEROS else first + unit * rows, rows)
    is_all_in_order = len(runs) == 1 and runs[0][0] == 0
    return () if is_all_in_order else tuple(runs)


def _append(runs: list[tuple[int, int]], start: int, count: int) -> None:
    if runs:
        last, length = runs[-1]
        if (start == last == ZEROS) or (last != ZEROS and start == last + length):
            runs[-1] = (last, length + count)
            return
    runs.append((start, count))


def cut(runs: Runs, start: int, stop: int) -> Runs:
    """Returns the runs that make up rows `start` to `stop`."""
    parts, offset = [], 0
    for first, count in runs:
        low, high = max(start - offset, 0), min(stop - offset, count)
        if low < high:
            parts.append((first if first == ZEROS else first + low, high - low))
        offset += count
    return tuple(parts)


def check_divides(name: str, value: int, size: int) -> None:
    """Raises ValueError, with the sizes that work, if `size` devices cannot share a dimension evenly."""
    if value % size:
        works = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
        raise ValueError(f"tensor_parallel_size={size} does not divide {name}={value}; sizes that do: {works}")
