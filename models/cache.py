"""What layers keep from step to step, and which of them share pages.

The arrays of pages are fewer than the layers. A page has room for one layer of a cache group in each of them, so every
group takes its pages from the same pool, and memory that one kind of layer does not need is there for the others (as in
vLLM's hybrid cache manager). A layer with a sliding window gives back the pages that no later token sees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxengine.pallas_kernels.ragged_paged_attention import AttentionSpec
from jaxengine.sharding.mesh import COLUMNS, model_axis_size, on_each_device

MAX_GROUPS = 8
"""Page tables that a step brings to the device at most; more groups would fit a few more tokens."""
MAX_WASTE = 1.05
"""How much more memory a sequence may take for the sake of fewer groups."""


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of every token, in pages.

    Attributes:
        num_heads: KV heads, of all devices that share the model.
        head_dim: H.
        window: Tokens that a token sees, itself included; None for all before it.
    """

    num_heads: int
    head_dim: int
    window: int | None = None

    @property
    def size(self) -> int:
        """Numbers that each of keys and values has for a token."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class SlotState:
    """Arrays of a fixed size for every running sequence, such as the state of a recurrent layer.

    A sequence has the row of its slot. It is to start from zeros where a sequence's first token is computed: see
    `SlotRows.starts`. What was in the row belongs to whoever had the slot before.

    Attributes:
        shapes: Of each array: shape of a sequence's row, and dtype. The devices that share the model split the first
            axis of the row.
    """

    shapes: tuple[tuple[tuple[int, ...], str], ...]


CacheSpec = PagedKV | SlotState


@dataclass(frozen=True)
class CacheGroup:
    """Layers that have one page table: alike, and at most as many as there are arrays of pages.

    Attributes:
        spec: What each of them keeps.
        layers: Their numbers, ascending.
        blocks_per_page: A page has so many times `block_size` tokens: more where a token needs less.
    """

    spec: PagedKV
    layers: tuple[int, ...]
    blocks_per_page: int = 1

    def attention(self, general: AttentionSpec, num_devices: int) -> AttentionSpec:
        """Returns what the attention op needs to know of these layers.

        Args:
            general: What it needs to know of the model, with pages of one block.
            num_devices: Devices that share the heads.
        """
        return dataclasses.replace(
            general,
            num_kv_heads=self.spec.num_heads // num_devices,
            head_dim=self.spec.head_dim,
            page_size=general.page_size * self.blocks_per_page,
        )


@dataclass(frozen=True)
class CacheLayout:
    """Which layer keeps what where.

    Attributes:
        groups: The groups of layers with pages.
        num_arrays: Arrays of pages, or pairs of them: entries of the list of caches. The states of the other layers
            follow them there.
        states: Of each layer with a `SlotState`, in order.
        cache_of: Of each layer, the entry of the list of caches that it reads and writes.
        group_of: Of each layer, its group; None for one with a state.
    """

    groups: tuple[CacheGroup, ...]
    num_arrays: int
    states: tuple[SlotState, ...]
    cache_of: tuple[int, ...]
    group_of: tuple[int | None, ...]

    def view(self, cache: Any, group: CacheGroup, current: CacheGroup | None = None) -> Any:
        """Returns a cache in a group's own shape: groups of different head sizes use the same arrays.

        Args:
            cache: Arrays `[P, K, page, W]`, or their shapes and dtypes, of all devices or of one.
            group: The group.
            current: The group in whose shape they are; None for the first, for which they were made.
        """
        current = current or self.groups[0]
        if cache is None or (group.spec.num_heads, group.spec.head_dim) == (
            current.spec.num_heads,
            current.spec.head_dim,
        ):
            return cache
        return jax.tree.map(lambda x: _reshape(x, own_shape(x.shape, current, group)), cache)


def own_shape(shape: Sequence[int], current: CacheGroup, group: CacheGroup) -> tuple[int, ...]:
    """Returns the shape in which `group` sees an array that is `[P, K, page, W]` for `current`."""
    num_pages, num_heads, page_size, _ = shape
    num_heads = num_heads * group.spec.num_heads // current.spec.num_heads
    page_size = page_size * group.blocks_per_page // current.blocks_per_page
    return num_pages, num_heads, page_size, math.prod(shape[1:]) // (num_heads * page_size)


def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, x.dtype)
    if model_axis_size() == 1:
        return x.reshape(shape)
    # Each device its own heads: nothing moves.
    local = (shape[0], shape[1] // model_axis_size(), *shape[2:])
    return on_each_device(lambda x: x.reshape(local), (COLUMNS,), COLUMNS)(x)


def plan_caches(specs: Sequence[CacheSpec], max_model_len: int) -> CacheLayout:
    """Groups layers so that most sequences of `max_model_len` tokens fit, with at most `MAX_GROUPS` page tables.

    Args:
        specs: Of each layer.
        max_model_len: Tokens of a sequence.

    Raises:
        ValueError: No layer keeps keys and values in pages.
    """
    kinds: dict[PagedKV, list[int]] = {}
    for layer, spec in enumerate(specs):
        if isinstance(spec, PagedKV):
            kinds.setdefault(spec, []).append(layer)
    if not kinds:
        raise ValueError("no layer keeps keys and values in pages; at least one must")
    size = math.lcm(*(kind.size for kind in kinds))
    num_arrays = _num_arrays(kinds, max_model_len)
    groups = [
        CacheGroup(kind, tuple(layers[start : start + num_arrays]), size // kind.size)
        for kind, layers in kinds.items()
        for start in range(0, len(layers), num_arrays)
    ]
    groups.sort(key=lambda group: group.layers[0])
    cache_of = [0] * len(specs)
    group_of: list[int | None] = [None] * len(specs)
    for number, group in enumerate(groups):
        for index, layer in enumerate(group.layers):
            cache_of[layer], group_of[layer] = index, number
    states = {layer: spec for layer, spec in enumerate(specs) if isinstance(spec, SlotState)}
    for index, layer in enumerate(states):
        cache_of[layer] = num_arrays + index
    return CacheLayout(tuple(groups), num_arrays, tuple(states.values()), tuple(cache_of), tuple(group_of))


def _num_arrays(kinds: Mapping[PagedKV, Sequence[int]], max_model_len: int) -> int:
    """Returns how many layers a page serves: as many as may be where a sequence of `max_model_len` takes least memory.

    Args:
        kinds: The layers of each kind.
        max_model_len: Tokens of a sequence.
    """
    tokens = {kind: min(max_model_len, kind.window or max_model_len) for kind in kinds}

    def groups(num_arrays: int) -> dict[PagedKV, int]:
        return {kind: -(-len(layers) // num_arrays) for kind, layers in kinds.items()}

    def size(num_arrays: int) -> int:
        return num_arrays * sum(count * tokens[kind] * kind.size for kind, count in groups(num_arrays).items())

    most = max(map(len, kinds.values()))
    allowed = [n for n in range(1, most + 1) if n == most or sum(groups(n).values()) <= MAX_GROUPS]
    smallest = min(map(size, allowed))
    return max(n for n in allowed if size(n) <= MAX_WASTE * smallest)
