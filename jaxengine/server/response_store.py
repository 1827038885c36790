"""Answers of /v1/responses that later requests may ask for, or go on from."""

from __future__ import annotations

from typing import Any

import msgspec


class ResponseStore:
    """Keeps objects in memory, as JSON, so that their size is known; the oldest are dropped.

    Each belongs to an owner: for all others there is no such object.
    """

    def __init__(self, max_size: int):
        """Args: max_size: Bytes."""
        self._max_size = max_size
        self._size = 0
        self._entries: dict[tuple[str, str], bytes] = {}

    def put(self, response_id: str, entry: dict[str, Any], *, owner: str = "") -> None:
        """Keeps an object, unless it is larger than all may be together."""
        data = msgspec.json.encode(entry)
        if len(data) > self._max_size:
            return
        self._entries[owner, response_id] = data
        self._size += len(data)
        while self._size > self._max_size:
            oldest_owner, oldest = next(iter(self._entries))
            self.delete(oldest, owner=oldest_owner)

    def get(self, response_id: str, *, owner: str = "") -> dict[str, Any] | None:
        """Returns a copy of an object; None if it is unknown or has been dropped."""
        data = self._entries.get((owner, response_id))
        return None if data is None else msgspec.json.decode(data)

    def delete(self, response_id: str, *, owner: str = "") -> bool:
        """Drops an object; returns whether it was there."""
        data = self._entries.pop((owner, response_id), b"")
        self._size -= len(data)
        return bool(data)
