"""Checks what requests ask of the form of outputs, in worker processes, and remembers what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import Future
from typing import Any

from jaxengine.request import Grammar
from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.structured.cache import SizedCache
from jaxengine.workers.pool import WorkerPool

MAX_CHARACTERS = 2 * 2**20
"""Of a schema, expression, grammar, or all choices together, written as JSON."""
CACHE_BYTES = 32 * 2**20
CACHE_ENTRIES = 1024


class GrammarChecker:
    """Turns forms of outputs into grammars that the engine can compile without harm."""

    def __init__(self, pool: WorkerPool):
        """Args: pool: Does the work."""
        self._pool = pool
        self._known: SizedCache[Grammar | str] = SizedCache(CACHE_BYTES, CACHE_ENTRIES)
        self._under_way: dict[bytes, Future[Any]] = {}

    def begin(self, params: StructuredOutputsParams) -> Future[Any] | None:
        """Starts to look at a form.

        Returns:
            What `grammar` would wait for; None if the answer is there.

        Raises:
            ValueError: It is too long.
            WorkerError: Too many are looked at.
        """
        text, key = _key(params)
        return None if self._known.get(key) is not None else self._start(key, text)

    def grammar(self, params: StructuredOutputsParams) -> Grammar:
        """Gives the grammar of a form, and waits for it.

        Raises:
            ValueError: It is wrong, or too complex to be used.
            WorkerError: No worker can look at it.
        """
        text, key = _key(params)
        known = self._known.get(key)
        if known is None:
            try:
                found = self._start(key, text).result()
                return Grammar(found["text"], found["num_bytes"])
            except ValueError as error:
                raise ValueError(str(error)) from error
        if isinstance(known, str):
            raise ValueError(known)
        return known

    def _start(self, key: bytes, text: str) -> Future[Any]:
        future = self._under_way.get(key)
        if future is None:
            future = self._under_way[key] = self._pool.submit(kind="grammar", params=json.loads(text))
            future.add_done_callback(lambda done: self._remember(key, done))
        return future

    def _remember(self, key: bytes, done: Future[Any]) -> None:
        self._under_way.pop(key, None)
        error = None if done.cancelled() else done.exception()
        if isinstance(error, ValueError):
            self._known.put(key, str(error), len(str(error)))
        elif error is None and not done.cancelled():
            found = Grammar(**done.result())
            self._known.put(key, found, len(found.text))


def _key(params: StructuredOutputsParams) -> tuple[str, bytes]:
    """Returns a form as JSON, and what tells it from others.

    Raises:
        ValueError: It is too long, or nested too deeply to be written.
    """
    try:
        text = json.dumps({field.name: getattr(params, field.name) for field in dataclasses.fields(params)})
    except (RecursionError, TypeError) as error:
        raise ValueError(f"it is no JSON, or nested too deeply: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARACTERS} are accepted")
    return text, hashlib.blake2b(text.encode(), digest_size=16).digest()
