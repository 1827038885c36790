"""Layers that share page tables, as far as the bookkeeping must know of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxengine.config import EngineConfig

MAX_TOKENS = 2**31 - 1
"""More than a sequence can have: positions are int32."""


class PageGroup(NamedTuple):
    """Layers whose keys and values of a token are in pages of the same numbers.

    Attributes:
        page_size: Tokens of a page: a multiple of the cache's `block_size`.
        window: Tokens that a token sees, itself included; None for all before it.
    """

    page_size: int
    window: int | None = None

    def first_page(self, num_computed: int) -> int:
        """Returns which page of a sequence is the first that a token after `num_computed` others sees."""
        return 0 if self.window is None else max(num_computed - self.window + 1, 0) // self.page_size

    def num_pages(self, num_tokens: int) -> int:
        """Returns how many pages so many tokens fill or begin."""
        return -(-num_tokens // self.page_size)

    def most_pages(self, num_tokens: int, num_step_tokens: int) -> int:
        """Returns the pages that a sequence holds at most if steps compute up to `num_step_tokens` of its tokens."""
        pages = self.num_pages(num_tokens)
        if self.window is None:
            return pages
        # From the first token that the step's first one sees to its last one, wherever in a page they lie.
        return min(pages, self.num_pages(self.window + num_step_tokens - 2) + 1)


def page_groups(config: EngineConfig) -> tuple[PageGroup, ...]:
    """Returns the groups of an engine's model."""
    groups = config.model.cache_layout.groups
    return tuple(PageGroup(config.block_size * group.blocks_per_page, group.spec.window) for group in groups)


def most_pages(groups: Iterable[PageGroup], num_tokens: int, num_step_tokens: int) -> int:
    """Returns the pages of all groups that a sequence holds at most; see `PageGroup.most_pages`."""
    return sum(group.most_pages(num_tokens, num_step_tokens) for group in groups)


def most_tokens(groups: Sequence[PageGroup], num_pages: int, num_step_tokens: int, limit: int = MAX_TOKENS) -> int:
    """Returns the length of the longest sequence that so many pages always hold, up to `limit`."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if most_pages(groups, middle, num_step_tokens) <= num_pages:
            low = middle
        else:
            high = middle - 1
    return low
