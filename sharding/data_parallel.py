"""Data parallelism over processes and hosts: independent engines, each with its part of the prompts.

The variables are vLLM's, with our prefix or with its own; ours win.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxengine.sharding.process_group import ProcessGroup

PREFIXES = ("JAXENGINE_DP_", "VLLM_DP_")


class DataParallelGroup:
    """The processes that share a list of prompts; each makes an `LLM` of its own, on devices of its own.

    Attributes:
        rank: Of this process; 0 gets the results.
        size: Number of processes.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        """Reads `JAXENGINE_DP_RANK`, `_SIZE`, `_MASTER_IP` and `_MASTER_PORT`, and waits for the other processes.

        Without any of them the group is this process alone.

        Raises:
            ValueError: A variable is missing or wrong, or as in `ProcessGroup`.
        """
        names = {field: _name(field, environment) for field in ("RANK", "SIZE", "MASTER_IP", "MASTER_PORT")}
        self.rank, self.size, self._group = 0, 1, None
        if not any(name in environment for name in names.values()):
            return
        self.rank, self.size = (_number(names[field], environment) for field in ("RANK", "SIZE"))
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"{names['RANK']}={self.rank}: must be below {names['SIZE']}={self.size}, and that at least 1"
            )
        if self.size > 1:
            port = _number(names["MASTER_PORT"], environment)
            host = environment.get(names["MASTER_IP"], "127.0.0.1")
            self._group = ProcessGroup(self.rank, self.size, host, port, names=(names["SIZE"], names["MASTER_PORT"]))

    def part(self, items: Sequence[Any]) -> list[Any]:
        """Returns this process's share of a list: neighbours stay together, shares differ by one at most."""
        return list(items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size])

    def gather(self, results: Sequence[Any]) -> list[Any] | None:
        """Brings the results of all shares together, in the order of the whole list.

        If a process dies before it gives its results, all the others end with exit code 1 and say which it was.

        Args:
            results: Of this process's share; JSON must be able to express them.

        Returns:
            All results at rank 0; None elsewhere.

        Raises:
            RuntimeError: A process has closed the group before.
        """
        if self._group is None:
            return list(results)
        parts = self._group.gather(list(results))
        return None if parts is None else [result for part in parts for result in part]

    def collective_rpc(self, call: Callable[[], Any]) -> list[Any] | None:
        """Makes a call in every process, as `group.collective_rpc(lambda: llm.sleep())`, and waits at rank 0 for all.

        Args:
            call: The same in all processes; JSON must be able to express what it returns.

        Returns:
            What each process's call has returned, at rank 0; None elsewhere.

        Raises:
            RuntimeError: At rank 0: it has failed in another process; names the rank.
            Exception: What the call itself has raised in this process.
        """
        try:
            outcome, own = {"value": call()}, None
        except Exception as error:
            outcome, own = {"error": f"{type(error).__name__}: {error}"}, error
        outcomes = self.gather([outcome])
        if own is not None:
            raise own
        for rank, found in enumerate(outcomes or ()):
            if "error" in found:
                raise RuntimeError(f"rank {rank} of {self.size}: {found['error']}")
        return None if outcomes is None else [found["value"] for found in outcomes]

    def close(self) -> None:
        """Leaves the group, after which this process's end is no failure."""
        if self._group is not None:
            self._group.close()


def _name(field: str, environment: Mapping[str, str]) -> str:
    """Of the variable that is set, ours first; ours if none is."""
    return next((prefix + field for prefix in PREFIXES if prefix + field in environment), PREFIXES[0] + field)


def _number(name: str, environment: Mapping[str, str]) -> int:
    text = environment.get(name)
    if text is None:
        raise ValueError(f"{name} must be set, as its fellows are")
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: expected a number")
    return int(text)
