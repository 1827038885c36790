"""A cache bounded by what its values take."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable


class SizedCache[V]:
    """Values by key, those used last. Its methods may be called from several threads."""

    def __init__(self, max_bytes: int, max_values: int):
        """Args: max_bytes: Of all values together. max_values: How many there are at most."""
        self._max_bytes, self._max_values = max_bytes, max_values
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """Returns the value of a key; None if there is none any more."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: V, num_bytes: int) -> None:
        """Keeps a value, unless it is larger than the cache; the oldest go."""
        with self._lock:
            if key in self._values:
                self._num_bytes -= self._values.pop(key)[1]
            self._values[key] = value, num_bytes
            self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes or len(self._values) > self._max_values:
                self._num_bytes -= self._values.popitem(last=False)[1][1]
