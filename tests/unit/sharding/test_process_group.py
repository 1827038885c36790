"""Processes that meet, gather and notice what is missing; here threads, except where one dies."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxengine.sharding import process_group
from jaxengine.sharding.process_group import ProcessGroup

NAMES = ("WORLD_SIZE", "MASTER_PORT")
MEMBER = """
import os, sys, time
from jaxengine.sharding.process_group import ProcessGroup
rank, port, dies = map(int, sys.argv[1:])
group = ProcessGroup(rank, 3, "localhost", port)
if rank == dies:
    os._exit(9)
print(group.gather(rank))
time.sleep(60)
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def meet(port: int, *members: tuple[int, int]) -> list:
    """What each (rank, size) gets: its group, or the text of its error."""

    def join(member: tuple[int, int]):
        try:
            return ProcessGroup(*member, "localhost", port, names=NAMES)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(join, members))


def test_values_come_in_the_order_of_ranks(port):
    groups = meet(port, (2, 3), (0, 3), (1, 3))
    by_rank = {group.rank: group for group in groups}
    for number in range(2):
        for rank in (2, 1):
            assert by_rank[rank].gather({"from": rank, "text": "é" * 100_000}) is None
        values = by_rank[0].gather(number)
        assert values[0] == number
        assert [value["from"] for value in values[1:]] == [1, 2]
    by_rank[1].close()
    with pytest.raises(RuntimeError, match="rank 1 of 3 has left"):
        by_rank[0].gather(0)
    for rank in (2, 0):
        by_rank[rank].close()


def test_what_is_missing_is_told_to_all(port, monkeypatch):
    monkeypatch.setattr(process_group, "MEET_SECONDS", 0.5)
    for error in meet(port, (0, 4), (2, 4)):
        assert "ranks [1, 3] of WORLD_SIZE=4 did not come" in error
    (error,) = meet(port, (1, 2))
    assert "rank 0 does not answer" in error


def test_other_sizes_and_ranks_are_refused(port):
    for error in meet(port, (0, 2), (1, 3)):
        assert "rank 1 has WORLD_SIZE=3, but rank 0 has 2" in error
    (error,) = meet(port, (3, 2))
    assert "rank 3 is not one of WORLD_SIZE=2" in error


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        (error,) = meet(taken, (0, 2))
    assert f"MASTER_PORT={taken} cannot be used: another program listens there" in error


def test_strangers_are_ignored(port):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, port, (0, 2))
        time.sleep(0.2)
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"\0\0\0\2{}")
        groups = [*meet(port, (1, 2)), *first.result()]
    assert all(isinstance(group, ProcessGroup) for group in groups)
    for group in groups:
        group.close()


@pytest.mark.parametrize("dies", [0, 2])
def test_when_one_dies_all_end(port, dies):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, *map(str, (rank, port, dies))],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    started = time.monotonic()
    errors = [member.communicate(timeout=30)[1] for member in members]
    assert [member.returncode for member in members] == [9 if rank == dies else 1 for rank in range(3)]
    assert time.monotonic() - started < 30
    assert f"rank {dies} of 3 has died" in "".join(errors)
