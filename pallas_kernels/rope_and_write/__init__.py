"""What lies between a layer's QKV projection and its attention, in one kernel where a platform has one."""

from jaxengine.pallas_kernels.rope_and_write.api import has_kernel, rope_and_write

__all__ = ["has_kernel", "rope_and_write"]
