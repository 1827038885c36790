"""What is made of a GPU's memory, without one: places for small arrays, and memory that others hold."""

import numpy as np
import pytest

from jaxengine.runner.memory import FRACTION, check_pool, reserve_small_blocks


class Arena:
    """A best-fit allocator whose free neighbours grow together, as that of JAX on GPUs."""

    def __init__(self, size: int):
        self.free = [(0, size)]

    def take(self, size: int) -> tuple[int, int]:
        size = -(-size // 256) * 256
        start, have = min((place for place in self.free if place[1] >= size), key=lambda place: (place[1], place[0]))
        self.free.remove((start, have))
        taken = size if have >= 2 * size else have  # a place less than twice as large is given whole
        if have > taken:
            self.free.append((start + taken, have - taken))
        return start, taken

    def give(self, place: tuple[int, int]) -> None:
        start, size = place
        for other in list(self.free):
            if other[0] + other[1] == start or start + size == other[0]:
                self.free.remove(other)
                start, size = min(start, other[0]), size + other[1]
        self.free.append((start, size))


def run_steps(arena: Arena) -> set[int]:
    """Where a step's temporaries were, while inputs and tokens of some steps before are still there."""
    alive, starts, rng = [], set(), np.random.default_rng(0)
    for _ in range(100):
        alive.append(arena.take(20_000))
        temporaries = arena.take(700_000)
        alive.append(arena.take(64))
        starts.add(temporaries[0])
        arena.give(temporaries)
        while len(alive) > rng.integers(2, 6):
            arena.give(alive.pop(0))
    return starts


def test_small_arrays_do_not_shift_temporaries():
    assert len(run_steps(Arena(2**30))) > 1  # what this is about

    arena, held = Arena(2**30), []
    places = {}

    def put(x: np.ndarray) -> np.ndarray:
        places[id(x)] = arena.take(x.nbytes)
        held.append(x)
        return x

    walls = reserve_small_blocks(put, 300_000)  # pyright: ignore[reportArgumentType]
    kept = {id(wall) for wall in walls}
    for x in held:
        if id(x) not in kept:
            arena.give(places[id(x)])
    assert len(run_steps(arena)) == 1


def test_memory_that_others_hold_is_told_of(monkeypatch):
    monkeypatch.setenv(FRACTION, "0.9")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    check_pool({})  # a device that does not tell
    check_pool({"bytes_limit": 72 * 2**30, "pool_bytes": 71 * 2**30})
    taken = {"bytes_limit": 72 * 2**30, "pool_bytes": 8 * 2**30}
    with pytest.raises(ValueError, match=r"72\.0 GiB that gpu_memory_utilization=0\.90 .* only 8\.0 GiB .* to 0\.10$"):
        check_pool(taken)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # takes what it needs, when it needs it
    check_pool(taken)
