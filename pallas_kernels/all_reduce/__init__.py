"""Sums over the devices that share a model, over peer memory where a platform has a kernel for it."""

from jaxengine.pallas_kernels.all_reduce.api import IMPLEMENTATIONS, all_reduce, choose_implementation

__all__ = ["IMPLEMENTATIONS", "all_reduce", "choose_implementation"]
