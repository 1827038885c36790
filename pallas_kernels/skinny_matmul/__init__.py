"""Products of few rows with a large weight, which take as long as reading it."""

from jaxengine.pallas_kernels.skinny_matmul.api import gated_skinny_matmul, has_kernel, skinny_matmul

__all__ = ["gated_skinny_matmul", "has_kernel", "skinny_matmul"]
