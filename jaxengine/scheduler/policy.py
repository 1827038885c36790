"""Who goes first: the order of requests, and queues kept in that order."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxengine.config import SchedulingPolicy
    from jaxengine.request import Request

_sort_key = attrgetter("sort_key")


def sort_key(policy: SchedulingPolicy, request: Request, num_added: int) -> tuple:
    """Returns the request's place; smaller goes first. `num_added`, the requests added before it, makes it unique."""
    if policy == "priority":
        return request.priority, request.arrival_time, num_added
    return (num_added,)


class RequestQueue(list["Request"]):
    """Requests in the order of their `sort_key`. A request put back after preemption finds its old place again.

    A list, so that the scheduler walks it at full speed; it is changed through `add` and `discard` only.
    """

    def add(self, request: Request) -> None:
        """Puts a request in its place."""
        insort(self, request, key=_sort_key)

    def discard(self, request: Request) -> None:
        """Takes out a request that is in the queue."""
        del self[bisect_left(self, request.sort_key, key=_sort_key)]
