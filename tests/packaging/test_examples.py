"""Every example runs, on the default model with a small engine."""

import json
import runpy
from pathlib import Path

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


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_script_runs(path, small_engines, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


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
