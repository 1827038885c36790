"""Layers of one structure as a loop over stacked parameters: a program of one layer instead of L."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxengine.models.layers.norm import add_up
from jaxengine.models.step import StepContext
from jaxengine.pallas_kernels.ragged_paged_attention import shift_pages

STACKED = "layers.layer."
"""How the paths of stacked parameters begin; those of the layers by themselves begin with `layers.0.` and so on."""


class LayerStack(nnx.Module):
    """L layers with a leading axis L on every parameter, run by one loop.

    For CPUs only. There a compiled program costs time and memory for every operation, and unrolled layers make
    thousands of them for each step shape. The loop copies each layer's weights out of the stack: a small part of a
    CPU's step, and more than the step itself on a GPU. 16-bit weights are converted to float32 on the way.
    """

    def __init__(self, layers: Sequence[nnx.Module]):
        """Takes over the parameters of layers that differ in nothing else.

        Raises:
            ValueError: They do.
        """
        if not are_alike(layers):
            raise ValueError("the layers have different structures")
        self.num_layers = len(layers)
        states = [nnx.state(layer) for layer in layers]
        self.layer = nnx.merge(nnx.graphdef(layers[0]), jax.tree.map(lambda *leaves: _stack(leaves), *states))

    def __call__(
        self, x: jax.Array, cache: Any, step: StepContext, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        """Applies all layers to `[T, D]`.

        Args:
            x: `[T, D]`.
            cache: One cache with the pages of all layers, layer i's at `i * P`; None in a step without caches.
            step: As for one layer with P pages, but planned for all pages, and without a workspace: what devices share
                is added up by the compiler.
            taps: After how many layers to note `x`.

        Returns:
            `[T, D]`, the cache with the new keys and values, and `[T, D]` for each of `taps`.
        """
        graphdef, state = nnx.split(self.layer)
        num_pages = 0 if cache is None else cache[0].shape[0] // self.num_layers

        def note(i, x, noted):
            return tuple(jnp.where(i == tap, x, tapped) for tap, tapped in zip(taps, noted, strict=True))

        def body(i, carry):
            x, cache, noted = carry
            leaves = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), state)
            attention = tuple(shift_pages(meta, i * num_pages) for meta in step.attention)
            own_step = dataclasses.replace(step, attention=attention)
            noted = note(i, x, noted)
            x, cache = nnx.merge(graphdef, leaves)(x, cache, own_step)
            return add_up(x), cache, noted

        x, cache, noted = lax.fori_loop(0, self.num_layers, body, (x, cache, (x,) * len(taps)))
        return x, cache, note(self.num_layers, x, noted)


def are_alike(layers: Sequence[nnx.Module]) -> bool:
    """Returns whether layers differ in nothing but their parameters."""
    first, *others = map(nnx.graphdef, layers)
    return all(graphdef == first for graphdef in others)


def _stack(leaves: Sequence[Any]) -> Any:
    """Stacks arrays, and frees them; abstract ones likewise."""
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    stacked = jnp.stack(leaves)
    stacked.block_until_ready()
    for leaf in leaves:
        leaf.delete()
    return stacked
