"""Every example runs, on the default model with a small engine."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxengine
from jaxengine import LLM

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, "warmup": "lazy"}


@pytest.fixture
def small_engines(monkeypatch, smollm2, tiny):
    """Examples make engines as users do; here they share the session's, or get a tiny model's."""

    class Shared:
        """The session's engine, which outlives the example."""

        def __enter__(self):
            return smollm2

        def __exit__(self, *error):
            pass

        def __getattr__(self, name):
            return (lambda: None) if name == "shutdown" else getattr(smollm2, name)

    def make(model=None, **engine_args):
        jaxengine.EngineArgs(model=model, **engine_args)
        # What else an example sets is as the shared engine has it.
        return LLM(str(tiny), **SMALL, **engine_args) if "logits_processors" in engine_args else Shared()

    monkeypatch.setattr(jaxengine, "LLM", make, raising=False)


IN_PROCESSES = "data_parallel.py"
WITH_RAY = "ray_batch.py"  # tests/engine/test_ray.py
MEASURES = "kv_cache_dtypes.py"  # thousands of tokens, three times
TRAINS = "reinforce.py"  # it changes the weights of its engine


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=pytest.mark.slow if path.name == MEASURES else ())
        for path in sorted(EXAMPLES.glob("*.py"))
        if path.name not in (IN_PROCESSES, WITH_RAY, TRAINS)
    ],
)
def test_script_runs(path, small_engines, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_data_parallel_example(tiny):
    command = [sys.executable, str(EXAMPLES / IN_PROCESSES), "--model", str(tiny), "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert {"rank 0 of 2: 2 prompts", "rank 1 of 2: 3 prompts"} <= set(lines)
    results = [line for line in lines if " -> " in line]
    assert [line[-2] for line in results] == ["0", "0", "1", "1", "1"]
    assert results[1].startswith("'Water boils at' -> ")


def test_data_parallel_example_ends_when_a_rank_fails(tmp_path):
    command = [sys.executable, str(EXAMPLES / IN_PROCESSES), "--model", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "has failed with exit code 1" in done.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_runs(path, small_engines, capsys):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)  # committed without outputs
    namespace: dict = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
    assert capsys.readouterr().out.strip()


def test_prefix_cache_example_hits_the_cache(small_engines, capsys):
    runpy.run_path(str(EXAMPLES / "batch_prefix_caching.py"))
    cached = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines() if "prompt tokens cached" in line]
    assert min(cached[1:]) >= 16


REWARD = re.compile(r"^iteration \d+: reward ([\d.]+), log probabilities ([\d.]+) from the engine's", re.MULTILINE)


@pytest.mark.slow
def test_training_example(tiny):
    """The engine samples with the weights that the trainer has, to rounding."""
    options = ["--model", str(tiny), "--iterations", "3", "--samples", "2", "--max-tokens", "4"]
    for reward, distance in run_training(*options):
        assert 0 <= reward <= 1
        assert distance < 0.001


@pytest.mark.slow
def test_training_example_raises_its_reward():
    rewards = [reward for reward, _ in run_training()]
    assert len(rewards) == 10
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def run_training(*options: str) -> list[tuple[float, float]]:
    """Returns the reward of each iteration, and how far the trainer's log probabilities are from the engine's."""
    command = [sys.executable, str(EXAMPLES / TRAINS), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [(float(reward), float(distance)) for reward, distance in REWARD.findall(done.stdout)]
    assert found, done.stdout
    return found
