"""Profiler traces of what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def trace(folder: Path | None) -> Iterator[None]:
    """Writes a trace of the block for TensorBoard or XProf into a folder; does nothing for None.

    Python's own calls are left out: recording them would slow the host down, and with it the steps.
    """
    if folder is None:
        yield
        return
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield
