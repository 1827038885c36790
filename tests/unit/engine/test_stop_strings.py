"""Stop strings, against a search for each of them."""

import time

from hypothesis import given
from hypothesis import strategies as st

from jaxengine.engine.stop_strings import StopMatch, StopStrings


class Naive:
    """Looks for each string in turn."""

    def __init__(self, stops: list[str]):
        self.stops, self.recent = stops, ""
        self.num_recent = max(map(len, stops)) - 1

    def take(self, text: str, *, search: bool) -> StopMatch | None:
        searched, after = self.recent + text, len(self.recent)
        matches = []
        for stop in self.stops if search else ():
            start = searched.find(stop, max(0, after - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        self.recent = searched[-self.num_recent :] if self.num_recent else ""
        return StopMatch(min(matches)[0] - after, min(matches)[2]) if matches else None

    def num_held(self) -> int:
        for length in range(len(self.recent), 0, -1):
            if any(stop.startswith(self.recent[-length:]) for stop in self.stops if len(stop) > length):
                return length
        return 0


@given(
    stops=st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=6), min_size=1, max_size=8, unique=True),
    pieces=st.lists(st.tuples(st.text(alphabet="ab\u00e9", max_size=7), st.booleans()), max_size=12),
)
def test_one_automaton_finds_what_many_searches_find(stops, pieces):
    naive, automaton, state = Naive(stops), StopStrings(stops), 0
    for text, search in pieces:
        if search:
            state, found = automaton.search(state, text)
        else:
            state, found = automaton.skip(state, text), None
        assert found == naive.take(text, search=search)
        if found is not None:
            return
        assert automaton.num_held(state) == naive.num_held()


def test_the_number_of_strings_does_not_matter():
    def seconds(num_strings: int) -> float:
        automaton = StopStrings([f"stop number {number}" for number in range(num_strings)])
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert automaton.search(0, "stop that stops number nothing. " * 1000)[1] is None
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(10_000) < 20 * seconds(1)


def test_requests_with_the_same_strings_share_them():
    first = StopStrings.of(["a", "b"])
    assert StopStrings.of(["a", "b"]) is first
    assert StopStrings.of(["b", "a"]) is not first
