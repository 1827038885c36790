"""The paged KV cache's bookkeeping: plain Python, no device arrays."""

from jaxengine.kv_cache.block_pool import BlockPool
from jaxengine.kv_cache.groups import PageGroup
from jaxengine.kv_cache.manager import KVCacheManager

__all__ = ["BlockPool", "KVCacheManager", "PageGroup"]
