"""How the page tables of cache groups are laid out in a step's buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxengine.kv_cache.groups import PageGroup
from jaxengine.runner.buckets import NUM_REPEATS, Bucket

ALIGNMENT = 256
"""Tokens. Tables begin at a multiple: kernels, whose blocks of keys divide it, then add up the same blocks wherever a
table begins."""


class PageTable(NamedTuple):
    """The page table of a cache group in the buffer of one bucket.

    Attributes:
        group: The group.
        name: Of the field i32[S, width] with the page ids.
        width: Pages of a sequence.
        first_token: Of the field i32[S] with the position at which each sequence's table begins; "" where it is 0.
    """

    group: PageGroup
    name: str
    width: int
    first_token: str

    def first_pages(self, starts: np.ndarray) -> np.ndarray:
        """Returns the pages at which the tables of sequences begin that have so many computed tokens, i32[S]."""
        assert self.group.window is not None
        unit = _unit(self.group)
        return np.maximum(starts - self.group.window + 1, 0) // unit * (unit // self.group.page_size)


class PageTables:
    """The page tables of all groups.

    Where a window is short against the longest sequence, a step gets the part of the table that it sees.

    Attributes:
        full_widths: Of each group: pages of the longest sequence, and one more, since a step that is run several times
            goes on beyond its end.
    """

    def __init__(self, groups: Sequence[PageGroup], max_model_len: int):
        """Takes the groups, and tokens of the longest sequence."""
        self._groups = groups
        self.full_widths = [group.num_pages(max_model_len) + 1 for group in groups]

    def of_bucket(self, bucket: Bucket) -> list[PageTable]:
        """Returns the table of each group in steps of a bucket."""
        return [self._table(index, bucket) for index in range(len(self._groups))]

    def _table(self, index: int, bucket: Bucket) -> PageTable:
        group, full = self._groups[index], self.full_widths[index]
        name = f"page_table_{index}"
        if group.window is not None:
            num_tokens = NUM_REPEATS if bucket.decode_only else bucket.num_tokens
            width = group.num_pages(group.window - 1 + num_tokens + _unit(group) - 1) + 1
            if width < full:
                return PageTable(group, name, width, f"first_token_{group.page_size}_{group.window}")
        return PageTable(group, name, full, "")


def _unit(group: PageGroup) -> int:
    return math.lcm(ALIGNMENT, group.page_size)
