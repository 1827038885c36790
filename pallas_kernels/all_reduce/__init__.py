"""Sums over the devices that share a model, over peer memory where a platform has a kernel for it."""

from jaxengine.pallas_kernels.all_reduce.api import (
    IMPLEMENTATIONS,
    Workspace,
    all_reduce,
    choose_implementation,
    has_kernel,
    make_workspace,
)

__all__ = ["IMPLEMENTATIONS", "Workspace", "all_reduce", "choose_implementation", "has_kernel", "make_workspace"]
