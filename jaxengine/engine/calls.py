"""What an engine is asked beside requests. `LLM`, `AsyncLLM` and replicas offer the same calls, by vLLM's names."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Mode = Literal["abort", "wait", "keep"]


class EngineStateError(RuntimeError):
    """What was asked cannot be done in the engine's present state: the message says what to do first."""


class PauseMode(enum.StrEnum):
    """What a pause does with requests that run or wait: see `SyncCalls.pause_generation`."""

    ABORT = "abort"
    WAIT = "wait"
    KEEP = "keep"


class SyncCalls:
    """Calls that return when all replicas have done what was asked.

    Every call may raise ValueError (a wrong argument), EngineStateError (not in this state), or RuntimeError (it has
    failed). With several replicas the message names the one that raised it.
    """

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Makes one of the calls below, by its name.

        Args:
            method: The name of a call. No other method can be called.
            args: Its arguments.
            kwargs: Its arguments by name.

        Returns:
            What each replica has returned.
        """
        raise NotImplementedError

    def sleep(self, level: int = 1, mode: Mode = "abort") -> None:
        """Frees the device's memory. Requests that come meanwhile wait for `wake_up`.

        Args:
            level: 0 only pauses; 1 keeps the weights in host memory; 2 drops them. Both free the KV cache.
            mode: What becomes of requests that run or wait, see `pause_generation`. Those that are kept compute their
                tokens' keys and values anew when the engine is awake.
        """
        self.collective_rpc("sleep", (level, mode))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes the memory back, and runs requests again once all of it is there.

        Args:
            tags: "weights" (after level 2 they are loaded anew), "kv_cache"; None: both.
        """
        self.collective_rpc("wake_up", (tags,))

    def is_sleeping(self) -> bool:
        """Whether anything is still to be woken after `sleep`."""
        return any(self.collective_rpc("is_sleeping"))

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached prefixes.

        Args:
            reset_running_requests: Take the pages from requests that hold some; they compute their tokens' keys and
                values anew.

        Returns:
            Whether that was done: never, and without any change, while requests hold pages, unless they may be taken.
        """
        return all(self.collective_rpc("reset_prefix_cache", (reset_running_requests,)))

    def pause_generation(self, *, mode: Mode = "abort", clear_cache: bool = True) -> None:
        """Stops running requests, until `resume_generation`; those that come meanwhile wait.

        Args:
            mode: What becomes of requests that run or wait: "abort" ends them with what they have and finish reason
                "abort"; "wait" lets them finish first; "keep" keeps them until generation is resumed.
            clear_cache: Forget all cached prefixes. Requests that are kept compute their tokens' keys and values anew.
        """
        self.collective_rpc("pause_generation", (), {"mode": mode, "clear_cache": clear_cache})

    def resume_generation(self) -> None:
        """Runs requests again after `pause_generation`."""
        self.collective_rpc("resume_generation")

    def is_paused(self) -> bool:
        """Whether generation is paused, or the engine sleeps."""
        return any(self.collective_rpc("is_paused"))

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Starts JAX's profiler where the engine runs; needs `EngineArgs.profiler_dir`.

        Args:
            profile_prefix: A folder of that folder, for this trace.
        """
        self.collective_rpc("start_profile", (profile_prefix,))

    def stop_profile(self) -> None:
        """Stops the profiler and writes its trace."""
        self.collective_rpc("stop_profile")


class AsyncCalls:
    """Calls that are awaited; see `SyncCalls`, which has the same.

    Raises, beside what those raise, EngineDeadError: the engine has ended.
    """

    async def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """See `SyncCalls.collective_rpc`."""
        raise NotImplementedError

    async def sleep(self, level: int = 1, mode: Mode = "abort") -> None:
        """See `SyncCalls.sleep`."""
        await self.collective_rpc("sleep", (level, mode))

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """See `SyncCalls.wake_up`."""
        await self.collective_rpc("wake_up", (tags,))

    async def is_sleeping(self) -> bool:
        """See `SyncCalls.is_sleeping`."""
        return any(await self.collective_rpc("is_sleeping"))

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """See `SyncCalls.reset_prefix_cache`."""
        return all(await self.collective_rpc("reset_prefix_cache", (reset_running_requests,)))

    async def pause_generation(
        self, *, mode: Mode = "abort", wait_for_inflight_requests: bool = False, clear_cache: bool = True
    ) -> None:
        """See `SyncCalls.pause_generation`. `wait_for_inflight_requests` is vLLM's older way to say mode "wait"."""
        given = {"mode": "wait" if wait_for_inflight_requests else mode, "clear_cache": clear_cache}
        await self.collective_rpc("pause_generation", (), given)

    async def resume_generation(self) -> None:
        """See `SyncCalls.resume_generation`."""
        await self.collective_rpc("resume_generation")

    async def is_paused(self) -> bool:
        """See `SyncCalls.is_paused`."""
        return any(await self.collective_rpc("is_paused"))

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """See `SyncCalls.start_profile`."""
        await self.collective_rpc("start_profile", (profile_prefix,))

    async def stop_profile(self) -> None:
        """See `SyncCalls.stop_profile`."""
        await self.collective_rpc("stop_profile")
