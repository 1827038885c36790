"""Finding any of many strings in text that comes in pieces: the automaton of Aho and Corasick (1975).

A step of one character costs the same for one string and for ten thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple
from weakref import WeakValueDictionary


class StopMatch(NamedTuple):
    """An occurrence.

    Attributes:
        end: Characters of the piece up to and with its last one.
        stop: The string.
    """

    end: int
    stop: str


class StopStrings:
    """An automaton whose states are the beginnings of the strings: the longest that the text so far ends with.

    State 0 is the empty one. An automaton does not change: a text has its state, and many share an automaton.
    """

    _shared: ClassVar[WeakValueDictionary[tuple[str, ...], StopStrings]] = WeakValueDictionary()

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: Not empty, each not empty."""
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the state of the longest proper end of a state's text that is a state too
        self._stop: list[str | None] = [None]  # the longest string that a state's text ends with
        self._num_held = [0]
        for stop in stops:
            self._insert(stop)
        self._connect()

    @classmethod
    def of(cls, stops: Sequence[str]) -> StopStrings:
        """Returns the automaton of these strings, which all requests share that have them at the same time."""
        key = tuple(stops)
        automaton = cls._shared.get(key)
        if automaton is None:
            automaton = cls._shared[key] = cls(stops)
        return automaton

    def num_held(self, state: int) -> int:
        """Returns how many characters at the end of a text in this state may yet be part of an occurrence."""
        return self._num_held[state]

    def skip(self, state: int, text: str) -> int:
        """Returns the state after more text, in which nothing is to be found."""
        following, fallback = self._next, self._fallback
        for character in text:
            while (found := following[state].get(character)) is None and state:
                state = fallback[state]
            state = found or 0
        return state

    def search(self, state: int, text: str) -> tuple[int, StopMatch | None]:
        """Takes more text, up to the occurrence that ends first; of several that end there the longest counts.

        Returns:
            The new state, and the occurrence if there is one.
        """
        following, fallback, stops = self._next, self._fallback, self._stop
        for place, character in enumerate(text):
            while (found := following[state].get(character)) is None and state:
                state = fallback[state]
            state = found or 0
            if (stop := stops[state]) is not None:
                return state, StopMatch(place + 1, stop)
        return state, None

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._stop.append(None)
                self._num_held.append(0)
            state = following
        self._stop[state] = stop

    def _connect(self) -> None:
        """Fills in what a state takes over from shorter ones, the shortest first."""
        level, depth = list(self._next[0].values()), 1
        while level:
            deeper = []
            for state in level:
                fallback = self._fallback[state]
                self._stop[state] = self._stop[state] or self._stop[fallback]
                self._num_held[state] = depth if self._next[state] else self._num_held[fallback]
                for character, following in self._next[state].items():
                    self._fallback[following] = self._after(fallback, character)
                    deeper.append(following)
            level, depth = deeper, depth + 1

    def _after(self, state: int, character: str) -> int:
        while (found := self._next[state].get(character)) is None and state:
            state = self._fallback[state]
        return found or 0
