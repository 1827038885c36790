"""Where a model's parameters come from in a checkpoint."""

from __future__ import annotations

import dataclasses

from flax import nnx


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """The tensors of a checkpoint that make up one parameter.

    Attributes:
        names: Tensor names, concatenated along the first axis in this order.
        transpose: The tensors are stored `[in, out]` and are transposed.
    """

    names: tuple[str, ...]
    transpose: bool = False


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a model by dotted path, such as `layers.0.mlp.down_proj.weight`."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
