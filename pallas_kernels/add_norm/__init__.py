"""Residual addition and norm, in one kernel where a platform has one."""

from jaxengine.pallas_kernels.add_norm.api import add_norm

__all__ = ["add_norm"]
