"""Sharing prompts out over processes."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxengine.sharding.data_parallel import DataParallelGroup


def variables(rank: int, size: int, port: int, prefix: str = "JAXENGINE_DP_") -> dict[str, str]:
    given = {"RANK": rank, "SIZE": size, "MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
    return {prefix + name: str(value) for name, value in given.items()}


@pytest.mark.parametrize("prefix", ["JAXENGINE_DP_", "VLLM_DP_"])
@pytest.mark.parametrize("count", [0, 2, 7])
def test_results_come_in_the_order_of_the_prompts(prefix, count):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    prompts = list(range(count))

    def run(rank: int) -> list | None:
        group = DataParallelGroup(variables(rank, 3, port, prefix))
        part = group.part(prompts)
        assert len(part) in (count // 3, count // 3 + 1)
        results = group.gather([[prompt, rank] for prompt in part])
        group.close()
        return results

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(run, range(3))
    assert others == [None, None]
    assert first is not None
    assert [prompt for prompt, _ in first] == prompts


@pytest.mark.parametrize("failing", [None, 0, 1, 2])
def test_a_call_is_made_everywhere_and_an_error_names_its_rank(failing):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    called = []

    def run(rank: int) -> list | str | None:
        group = DataParallelGroup(variables(rank, 3, port))

        def call() -> int:
            called.append(rank)
            if rank == failing:
                raise ValueError(f"level={rank}")
            return rank * rank

        try:
            return group.collective_rpc(call)
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            group.close()

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    assert sorted(called) == [0, 1, 2]
    expected: list = [[0, 1, 4], None, None]
    if failing is not None:
        expected[0] = f"RuntimeError: rank {failing} of 3: ValueError: level={failing}"
        expected[failing] = f"ValueError: level={failing}"
    assert results == expected


def test_one_process_needs_no_variables():
    group = DataParallelGroup({})
    assert (group.rank, group.size, group.part("abc"), group.gather([1])) == (0, 1, ["a", "b", "c"], [1])
    group.close()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (variables(2, 2, 1), "JAXENGINE_DP_RANK=2: must be below JAXENGINE_DP_SIZE=2"),
        (variables(0, 0, 1, "VLLM_DP_"), "VLLM_DP_RANK=0: must be below VLLM_DP_SIZE=0"),
        (variables(0, 1, 1, "VLLM_DP_") | variables(9, 3, 1), "JAXENGINE_DP_RANK=9"),  # ours win
        ({"JAXENGINE_DP_RANK": "0"}, "JAXENGINE_DP_SIZE must be set"),
        ({"JAXENGINE_DP_RANK": "0", "VLLM_DP_SIZE": "2"}, "JAXENGINE_DP_MASTER_PORT must be set"),
        ({"JAXENGINE_DP_RANK": "one", "JAXENGINE_DP_SIZE": "2"}, "JAXENGINE_DP_RANK='one': expected a number"),
    ],
)
def test_wrong_variables_are_refused(given, text):
    with pytest.raises(ValueError, match=text):
        DataParallelGroup(given)
