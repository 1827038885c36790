"""Weights on their way from a trainer to a core in another process, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxengine.messages import quote

PIECE_BYTES = 2**27
"""Bytes of the arrays of one message, unless one array alone has more: so much of a model is on its way at once."""

Weights = list[tuple[str, np.ndarray]]


def pieces(weights: Iterable[tuple[str, Any]], piece_bytes: int = PIECE_BYTES) -> Iterator[Weights]:
    """Takes weights in pieces, each when the one before is on the other side.

    Args:
        weights: Names as in the checkpoint, and NumPy or JAX arrays, which are copied to the host.
        piece_bytes: Bytes of a piece at most, or those of one array.

    Raises:
        ValueError: Something is no pair of a name and an array of numbers; says which.
    """
    piece: Weights = []
    size = 0
    for item in weights:
        if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError(f"weights: {quote(item)}: expected pairs of a name and an array")
        name, array = item[0], _host_array(item[0], item[1])
        if piece and size + array.nbytes > piece_bytes:
            yield piece
            piece, size = [], 0
        piece.append((name, array))
        size += array.nbytes
    if piece:
        yield piece


def _host_array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:  # an array of another process's devices, a deleted one, or no array
        raise ValueError(f"weights: {name}: cannot be copied to the host: {error}") from error
    if not hasattr(value, "shape") or array.dtype.hasobject or array.dtype.kind in "USmM" or array.dtype.names:
        raise ValueError(f"weights: {name}: {quote(value)}: expected an array of numbers")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


class ReceivedWeights:
    """Weights that have come, until all have: wrong names are found before anything is changed."""

    def __init__(self) -> None:
        self._weights: dict[str, np.ndarray] = {}

    def receive(self, names: list[str], arrays: list[np.ndarray]) -> None:
        """Keeps a piece.

        Raises:
            ValueError: A name has come before.
        """
        for name, array in zip(names, arrays, strict=True):
            if name in self._weights:
                raise ValueError(f"weights: {name}: comes twice")
            self._weights[name] = array

    def take(self) -> Iterator[tuple[str, np.ndarray]]:
        """Gives all that has come, each once, and keeps nothing of it."""
        weights, self._weights = self._weights, {}
        while weights:
            name = next(iter(weights))
            yield name, weights.pop(name)

    def discard(self) -> None:
        """Forgets what has come."""
        self._weights = {}
