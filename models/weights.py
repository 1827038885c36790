"""Where a model's parameters come from in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """The tensors of a checkpoint that make up one parameter.

    Attributes:
        names: Tensor names, part after part (`ParameterSpec.fused_parts`); with `stack` all parts of the first, then
            all of the second, and so on.
        transpose: The tensors are stored `[in, out]` and are transposed: their last two axes are swapped.
        stack: What the tensors make is laid on a new first axis, such as that of experts.
        decode: Makes a part of the tensors that are stored of it, equally many for each part, before anything else. It
            is called with them, and returns an array, or a `StoredTensor` that is read where it is wanted.
    """

    names: tuple[str, ...]
    transpose: bool = False
    stack: bool = False
    decode: Callable[..., Any] | None = None


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """Returns the parameters of a model by dotted path, such as `layers.0.mlp.down_proj.weight`."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
