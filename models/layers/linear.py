"""Linear layers: a product with a matrix, whatever that is made of, and a bias."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxengine.models.layers.matrix import LayerBuilder, MatrixLayer
from jaxengine.models.step import NO_CONTEXT, StepContext
from jaxengine.pallas_kernels.all_reduce import Workspace, all_reduce
from jaxengine.sharding.layout import Part
from jaxengine.sharding.mesh import COLUMNS, DATA, MODEL, on_each_device
from jaxengine.sharding.rules import partition_spec


class Linear(MatrixLayer):
    """`x @ matrix.T + bias`, the matrix `[out, in]`; several layers of a checkpoint in one product if it has parts."""

    def __init__(
        self,
        inputs: int | Part,
        parts: int | Part | tuple[Part, ...],
        axes: tuple[str | None, str | None],
        build: LayerBuilder,
        *,
        bias: bool = False,
    ):
        """Makes the layer.

        Args:
            inputs: Size of the input, or what it is in a checkpoint.
            parts: Size of the output, or the layers of a checkpoint that make it, which may be in another order there.
            axes: Logical axes of `[out, in]`.
            build: Makes the parameters.
            bias: Whether there is one.

        Raises:
            ValueError: As `MatrixLayer`.
        """
        super().__init__(parts, inputs, axes, build)
        self.bias = build.vector(self.parts, axes[0], init="zeros") if bias else None
        self.has_shared_input = partition_spec(axes)[1] == MODEL

    def __call__(self, x: jax.Array, step: StepContext = NO_CONTEXT, *, allow_partial: bool = False) -> jax.Array:
        """Applies the layer.

        Args:
            x: `[..., in]`; `[T, in]` for a step with a workspace, if the devices share the last axis.
            step: The step's context.
            allow_partial: Allows a result in parts, for a `PendingResidual`.

        Returns:
            `[..., out]`, or parts of it, f32[S, T, out].
        """
        matrix, allow_kernel = self.matrix, not step.is_differentiable
        if step.workspace is not None and self.has_shared_input:
            out = self._sum_over_devices(x, step.workspace)
            return out if self.bias is None else out + self.bias[...]
        if self.bias is None:
            parts = matrix.multiply_in_parts(x) if allow_partial and allow_kernel else None
            return matrix.multiply(x, x.dtype, allow_kernel=allow_kernel) if parts is None else parts
        # The bias is added before rounding, as a fused kernel would.
        product = matrix.multiply(x, jnp.float32, allow_kernel=allow_kernel)
        return (product + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def gated(self, x: jax.Array, step: StepContext) -> jax.Array | None:
        """Returns `silu(gate) * up` of the two parts that the layer has, `[T, out / 2]`, if one kernel computes it."""
        return None if step.is_differentiable or self.bias is not None else self.matrix.multiply_gated(x)

    def _sum_over_devices(self, x: jax.Array, workspace: Workspace) -> jax.Array:
        """Returns the product `[T, out]` of `[T, in]` and the matrix; devices share the last axis of both."""

        def own(x, matrix, workspace):
            return all_reduce(matrix.multiply(x, x.dtype, allow_kernel=True), MODEL, workspace=workspace)

        places = COLUMNS, self.matrix_places, PartitionSpec(DATA, MODEL)
        return on_each_device(own, places)(x, self.matrix, workspace)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """Takes apart what the layer made: devices hold their shares of all parts side by side.

        Args:
            x: `[T, out]`.

        Returns:
            `[T, part]` of each part.
        """
        size = self.num_devices
        ends = list(itertools.accumulate(part.own_size // size for part in self.parts))
        shares = jnp.split(x.reshape(x.shape[0], size, -1), ends[:-1], axis=-1)
        return [share.reshape(x.shape[0], -1) for share in shares]
