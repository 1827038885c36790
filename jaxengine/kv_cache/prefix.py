"""Names for the contents of full blocks: what lets two requests share a page.

The hash of a block covers its tokens and the hash of the block before it, so equal hashes mean equal prefixes from
position 0 on. It is SHA-256 and not Python's `hash`: a collision, which a client could construct for the latter, would
let one user's request read another's keys and values.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxengine.request import Request


def root_hash(cache_salt: str | None, extra_keys: tuple) -> bytes:
    """Returns what the first block is chained to: everything but the tokens that keys and values depend on."""
    return hashlib.sha256(repr((cache_salt, extra_keys)).encode()).digest()


def extend_block_hashes(request: Request, block_size: int, num_blocks: int) -> list[bytes]:
    """Returns `request.block_hashes`, extended to `num_blocks` blocks or more. Each block is hashed only once.

    The tokens of those blocks must be known: `num_blocks * block_size <= request.num_tokens`.
    """
    hashes, tokens = request.block_hashes, request.all_token_ids
    if len(hashes) < num_blocks:
        parent = hashes[-1] if hashes else root_hash(request.cache_salt, request.extra_keys)
        for start in range(len(hashes) * block_size, num_blocks * block_size, block_size):
            parent = hashlib.sha256(parent + array("q", tokens[start : start + block_size]).tobytes()).digest()
            hashes.append(parent)
    return hashes
