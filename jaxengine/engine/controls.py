"""Does what an engine is asked beside requests: see `jaxengine.engine.calls`. Runs where the core runs."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxengine.engine.calls import EngineStateError, PauseMode
from jaxengine.engine.core import EngineCore
from jaxengine.messages import quote

logger = logging.getLogger(__name__)

MEMORY_TAGS = ("weights", "kv_cache")
SLEEP_LEVELS = (0, 1, 2)


class Controls:
    """The calls of one core.

    Attributes:
        table: What can be called, by name: nothing else can.
    """

    def __init__(self, core: EngineCore, reload_model: Callable[[], Any], profiler_dir: str | None):
        """Takes what the calls are about.

        Args:
            core: What runs.
            reload_model: Gives the model with its weights anew.
            profiler_dir: Where traces go.
        """
        self._core, self._reload_model, self._profiler_dir = core, reload_model, profiler_dir
        self._is_sleeping = False
        self._trace: Path | None = None
        calls = (
            *(self.sleep, self.wake_up, self.is_sleeping, self.reset_prefix_cache),
            *(self.pause_generation, self.resume_generation, self.is_paused, self.start_profile, self.stop_profile),
        )
        self.table: dict[str, Callable[..., Any]] = {call.__name__: call for call in calls}

    def begin(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[None, None, Any]:
        """Begins a call, of which nothing is done yet.

        Returns:
            A generator that does it, and returns what the call does. When it yields, the core has to step first.

        Raises:
            ValueError: There is no such method or argument. The generator may raise it, too, and EngineStateError.
        """
        if not isinstance(method, str) or method not in self.table:
            raise ValueError(f"method={quote(method)}: expected one of {', '.join(self.table)}")
        call = self.table[method]
        try:
            inspect.signature(call).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{method}{inspect.signature(call)}: {error}") from error

        def run() -> Generator[None, None, Any]:
            result = call(*args, **kwargs)
            return (yield from result) if isinstance(result, Generator) else result

        return run()

    def sleep(self, level: int = 1, mode: str = "abort") -> Generator[None, None, None]:
        """Pauses, and frees memory."""
        if level not in SLEEP_LEVELS or isinstance(level, bool):
            raise ValueError(f"level={quote(level)}: expected {' or '.join(map(str, SLEEP_LEVELS))}")
        self._core.runner.check_sleep(level)
        yield from self.pause_generation(mode, clear_cache=level > 0)
        self._is_sleeping = True
        if level > 0:
            self._core.runner.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes memory back, and resumes once all is there."""
        accepted = f"a list of {' and '.join(map(repr, MEMORY_TAGS))}"
        if isinstance(tags, str | bytes) or not isinstance(tags, Sequence | None) or (tags is not None and not tags):
            raise ValueError(f"tags={quote(tags)}: expected {accepted}, or None for both")
        for tag in tags or ():
            if tag not in MEMORY_TAGS:
                raise ValueError(f"tags: {quote(tag)}: expected {accepted}")
        if not self.is_sleeping():
            return
        self._core.runner.wake_up(tags or MEMORY_TAGS, self._reload_model)
        if not self._core.runner.is_sleeping:
            self._is_sleeping = False
            self._core.resume()

    def is_sleeping(self) -> bool:
        """Whether anything is to be woken."""
        return self._is_sleeping or self._core.runner.is_sleeping

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all prefixes."""
        _check_flag("reset_running_requests", reset_running_requests)
        return self._core.reset_prefix_cache(reset_running_requests)

    def pause_generation(self, mode: str = "abort", clear_cache: bool = True) -> Generator[None, None, None]:
        """Pauses the core as soon as `mode` lets it."""
        if mode not in list(PauseMode):
            raise ValueError(f"mode={quote(mode)}: expected one of {', '.join(PauseMode)}")
        _check_flag("clear_cache", clear_cache)
        core = self._core
        if mode == PauseMode.WAIT and self.is_sleeping() and core.scheduler.has_unfinished_requests():
            raise EngineStateError(
                "mode='wait': the engine sleeps, and cannot finish what it keeps: call wake_up() first"
            )
        core.pause(PauseMode(mode))
        while mode == PauseMode.WAIT and core.scheduler.has_unfinished_requests():
            yield
            if core.pause_mode is None and core.scheduler.has_unfinished_requests():
                raise EngineStateError("mode='wait': generation was resumed before all requests had finished")
        core.drain()
        if clear_cache:
            core.reset_prefix_cache(reset_running_requests=True)

    def resume_generation(self) -> None:
        """Runs requests again."""
        if self.is_sleeping():
            raise EngineStateError("the engine sleeps: call wake_up() first")
        self._core.resume()

    def is_paused(self) -> bool:
        """Whether requests are kept from running."""
        return self._core.pause_mode is not None

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Starts JAX's profiler."""
        import jax

        if self._profiler_dir is None:
            raise ValueError("profiler_dir: traces need a folder, and the engine was started without one")
        if profile_prefix is not None and not (
            isinstance(profile_prefix, str) and re.fullmatch(r"\w[\w.-]{0,99}", profile_prefix)
        ):
            accepted = "letters, digits, '_', '.' and '-', and no '.' or '-' at the beginning"
            raise ValueError(f"profile_prefix={quote(profile_prefix)}: expected a folder's name of {accepted}")
        if self._trace is not None:
            raise EngineStateError(f"a profile is being written to {self._trace}: call stop_profile() first")
        folder = Path(self._profiler_dir) / (profile_prefix or "")
        jax.profiler.start_trace(folder)
        self._trace = folder

    def stop_profile(self) -> None:
        """Stops it, and writes the trace."""
        import jax

        if self._trace is None:
            raise EngineStateError("no profile is being written: call start_profile() first")
        folder, self._trace = self._trace, None
        jax.profiler.stop_trace()
        logger.info("a profile has been written to %s", folder)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={quote(value)}: expected True or False")
