"""Matrices, the formats that they are held in, and the layers that hold one.

A layer never looks into its matrix: it asks for a product, and the matrix chooses what computes it. A matrix is made of
one array or several (numbers and their scales), each of which is a parameter of the layer. To add a format, write a
`WeightFormat` and its `Matrix`; loading, sharding, stacked layers and updates need nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.models.layers.dense import Dense
from jaxengine.models.layers.param import ParameterSpec, make_parameter, spec_of
from jaxengine.sharding.layout import Part
from jaxengine.sharding.mesh import MODEL
from jaxengine.sharding.rules import RULES, partition_spec


class Matrix(Protocol):
    """A matrix `[out, in]` as a step sees it: a pytree of the arrays that it is made of."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`, or of several `(experts, out, in)`."""
        ...

    def multiply(self, x: jax.Array, out_dtype: DTypeLike | None = None, *, allow_kernel: bool = False) -> jax.Array:
        """Returns the product `x @ matrix.T`, summed in float32.

        Args:
            x: `[..., in]`.
            out_dtype: Dtype of the result; by default that of `x`.
            allow_kernel: Allows kernels of ours, which have no gradients and which XLA does not cut for several
                devices.

        Returns:
            `[..., out]`.
        """
        ...

    def multiply_in_parts(self, x: jax.Array) -> jax.Array | None:
        """Returns f32[S, T, out], whose sum over the first axis is the product; None without a kernel that does."""
        ...

    def multiply_gated(self, x: jax.Array) -> jax.Array | None:
        """Returns `silu(x @ gate.T) * (x @ up.T)`, `[T, out / 2]`; None without a kernel that does.

        The gate is the first half of the rows.
        """
        ...

    def take(self, ids: jax.Array) -> jax.Array:
        """Returns the rows of i32[T], `[T, in]`; ids out of range are clipped."""
        ...


class WeightFormat(Protocol):
    """How a matrix is held. A format can be hashed and compared: it is part of a layer's static structure."""

    def parameters(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict[str, ParameterSpec]:
        """Returns the arrays that a matrix is made of, by the names of the layer's parameters.

        Each has as many dimensions as the matrix, says in `block` how many of the matrix's numbers one of its own
        stands for, in `tensors` and `decode` what a checkpoint stores of it. `parts` and `num_devices` are added.

        Args:
            shape: Of the matrix, `[out, in]`, or of several, `[experts, out, in]`.
            axes: Its logical axes.
        """
        ...

    def matrix(self, arrays: dict[str, Any]) -> Matrix:
        """Returns the matrix of these arrays, which are named as in `parameters`.

        In place of the arrays come also their places on the devices, one `PartitionSpec` each.
        """
        ...


Formats = Callable[[str, tuple[Part, ...]], WeightFormat]
"""Gives the format of a layer, from its path ("layers.0.self_attn.qkv_proj") and its parts (q_proj, k_proj, v_proj)."""


@dataclasses.dataclass(frozen=True)
class LayerBuilder:
    """What layers make their parameters with.

    Attributes:
        dtype: Name of the dtype of activations, and of norms and biases.
        rngs: See `make_parameter`.
        formats: Chooses the format of each matrix; None holds all of them as they are, in `dtype`.
        num_devices: How many share the model.
        path: Of the layer that is being made.
    """

    dtype: DTypeLike
    rngs: nnx.Rngs | None = None
    formats: Formats | None = None
    num_devices: int = 1
    path: str = ""

    def at(self, name: str | int) -> LayerBuilder:
        """Returns the builder of a part of this layer."""
        return dataclasses.replace(self, path=f"{self.path}.{name}" if self.path else str(name))

    def format(self, parts: tuple[Part, ...]) -> WeightFormat:
        """Returns the format of this layer's matrix."""
        return Dense(jnp.dtype(self.dtype).name) if self.formats is None else self.formats(self.path, parts)

    def vector(
        self, size: int | Part | tuple[Part, ...], axis: str | None, *, init: str, dtype: DTypeLike | None = None
    ) -> nnx.Param:
        """Makes a parameter of one dimension: a norm's weights, or a bias.

        Args:
            size: Of it, or what it is made of in a checkpoint.
            axis: Its logical axis.
            init: As in `ParameterSpec`.
            dtype: By default that of the layers.
        """
        parts = _as_parts(size)
        spec = ParameterSpec(
            (sum(part.own_size for part in parts),),
            jnp.dtype(dtype or self.dtype).name,
            (axis,),
            init,
            (_unless_plain(parts),),
            self.num_devices,
        )
        return make_parameter(spec, self.rngs)


class MatrixLayer(nnx.Module):
    """A layer that holds a matrix: one parameter for each of its arrays."""

    def __init__(
        self,
        rows: int | Part | tuple[Part, ...],
        columns: int | Part,
        axes: tuple[str | None, ...],
        build: LayerBuilder,
    ):
        """Makes the parameters.

        Args:
            rows: How many, or what they are in a checkpoint.
            columns: Likewise.
            axes: Logical axes of `[rows, columns]`.
            build: Makes them.

        Raises:
            ValueError: The format has no form for these sizes.
        """
        self.parts, self.num_devices = _as_parts(rows), build.num_devices
        self.format = build.format(self.parts)
        specs = matrix_parameters(self.format, self.parts, _as_parts(columns), axes, build)
        self.array_names = tuple(specs)
        for name, spec in specs.items():
            setattr(self, name, make_parameter(spec, build.rngs))

    @property
    def matrix(self) -> Matrix:
        """The matrix `[rows, columns]`."""
        return self.format.matrix({name: getattr(self, name)[...] for name in self.array_names})

    @property
    def matrix_places(self) -> Any:
        """Where the matrix's arrays are: a `PartitionSpec` for each, in the form of `matrix`."""
        return self.format.matrix({n: partition_spec(spec_of(getattr(self, n)).axes) for n in self.array_names})


def matrix_parameters(
    weight_format: WeightFormat,
    rows: tuple[Part, ...],
    columns: tuple[Part, ...],
    axes: tuple[str | None, ...],
    build: LayerBuilder,
    leading: tuple[int, ...] = (),
) -> dict[str, ParameterSpec]:
    """Returns the parameters that a matrix is made of, with their parts.

    Args:
        weight_format: Its format.
        rows: What its rows are in a checkpoint.
        columns: What its columns are.
        axes: Its logical axes.
        build: Says where it is and how many devices share it.
        leading: Dimensions before those of the rows, such as that of experts.

    Raises:
        ValueError: A device would hold a part of what shares a scale, or parts of a fused matrix share one.
    """
    shape = (*leading, sum(p.own_size for p in rows), sum(p.own_size for p in columns))
    found = {}
    for name, spec in weight_format.parameters(shape, axes).items():
        blocks = (spec.block or (1,) * len(shape))[-2:]
        parts = [
            _in_blocks(own, block, axis, f"{build.path or 'matrix'}.{name}", build.num_devices)
            for own, block, axis in zip((rows, columns), blocks, axes[-2:], strict=True)
        ]
        found[name] = dataclasses.replace(
            spec, parts=((),) * len(leading) + tuple(parts), num_devices=build.num_devices
        )
    return found


def _in_blocks(parts: tuple[Part, ...], block: int, axis: str | None, name: str, num_devices: int) -> tuple[Part, ...]:
    """Returns the parts of an array with one number for `block` of a matrix.

    For a block as large as the matrix they are those of all of it.
    """
    size = sum(part.own_size for part in parts)
    is_cut = axis is not None and RULES[axis] == MODEL and num_devices > 1
    if block > 1 and (block < size or len(parts) > 1) and (is_cut or _unless_plain(parts)):
        for part in parts:
            unit = part.share(num_devices if is_cut else 1)[0]
            if unit % block:
                raise ValueError(
                    f"{name}: {part.name or 'it'} is cut every {unit} numbers, for {num_devices} devices or by what is "
                    f"beside it, but {block} numbers share one of this array"
                )
    return () if block >= size else _unless_plain(tuple(part.in_blocks(block) for part in parts))


def _as_parts(size: int | Part | tuple[Part, ...]) -> tuple[Part, ...]:
    if isinstance(size, int):
        return (Part("", size),)
    return (size,) if isinstance(size, Part) else size


def _unless_plain(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Nothing for one part that is as it is in the checkpoint."""
    return () if len(parts) == 1 and not parts[0].units else tuple(parts)
