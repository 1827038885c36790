"""Plans for devices that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from jaxengine.cli.main import main
from jaxengine.kv_cache import PageGroup
from jaxengine.plan import targets
from jaxengine.plan.planner import Plan, find_collectives

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
PROGRAM = """
  %a = bf16[16,256]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), channel_id=1, replica_groups={}
  %b = (f32[4]{0}, f32[4]{0}) all-reduce-start(%y), channel_id=2
  %c = pred[8]{0} all-gather(%z), channel_id=3
  %d = f32[4]{0} all-reduce-done(%b)
  %e = ((bf16[8,4]{1,0}), bf16[16,4]{1,0}) all-gather-start(%a), channel_id=4
  %f = (f32[2]{0}, /*index=1*/s32[2]{0}) all-to-all(%x, %y), channel_id=5
  %g = (f32[6]{0:T(128)}, f32[6]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
"""


def test_collectives_are_counted_with_their_bytes():
    assert find_collectives(PROGRAM) == {
        "all-reduce": (2, 16 * 256 * 2 + 4 * 4),
        "all-gather": (2, 8 + 16 * 4 * 2),
        "all-to-all": (1, 2 * 2 * 4),
        "collective-permute": (1, 6 * 4),
    }


def test_sequences_that_fit():
    sizes: dict[str, Any] = {"weight_bytes": 0, "page_bytes": 1, "memory_bytes": 0, "num_pages": 70}
    plan = Plan("v6e:2x2", "TPU v6 lite", 4, 4, 16, 100, 33, groups=(PageGroup(16),), **sizes)
    assert plan.num_sequences(100) == 10  # of 7 pages
    assert plan.num_sequences(33) == 23  # of 3
    assert plan.to_json()["num_sequences_of_max_model_len"] == 10
    plan = Plan("v6e:2x2", "TPU v6 lite", 4, 4, 16, 100, 33, groups=(PageGroup(16), PageGroup(16, 20)), **sizes)
    assert plan.num_sequences(100) == 7  # of 7 pages, and 3 that the window sees


def test_what_is_wrong_is_said(monkeypatch, capsys):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert main(["compile", "--model", "qwen3-0.6b", "--target", "v6e:2x2"]) == 2
    assert "pip install libtpu" in capsys.readouterr().err
    assert main(["compile", "--model", "qwen3-0.6b", "--target", "h100:2"]) == 2
    assert 'pip install "jax[cuda13]"' in capsys.readouterr().err
    for count in ("0", "-1", "two", ""):
        assert main(["compile", "--model", "qwen3-0.6b", "--target", f"h200:{count}"]) == 2
        assert f"how many h200 is {count!r}" in capsys.readouterr().err
    assert main(["compile", "--model", "qwen3-0.6b", "--target", "v6e:2x2", "--context", "0"]) == 2
    assert "context=0" in capsys.readouterr().err


def compile_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "jaxengine", "compile", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: uv run --group aot",
)


@needs_libtpu
def test_compiles_for_a_tpu(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    engine = ("--tensor-parallel-size", "2", "--max-num-batched-tokens", "128", "--max-num-seqs", "16")
    done = compile_command("--model", str(config), "--target", "v6e:2x2", *engine, "--json", "-")
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert (plan["device_kind"], plan["num_devices"]) == ("TPU v6 lite", 4)
    matrices = 2 * (256 * 16 * 128 + 8 * 128 * 256 + 3 * 256 * 512) + 2 * 2048 * 256
    norms = (2 * 2 + 1) * 256
    assert plan["weight_bytes"] == 2 * (matrices // 2 + norms)
    assert plan["page_bytes"] == 2 * 2 * (4 // 2) * 16 * 128 * 2
    temporaries = max(step["temporary_bytes"] for step in plan["steps"]) + plan["sampler_bytes"]
    free = plan["memory_bytes"] - plan["weight_bytes"] - temporaries
    assert plan["num_pages"] == free // plan["page_bytes"]
    check_collectives(plan, bytes_of_a_sum=2)


def check_collectives(plan: dict, bytes_of_a_sum: int) -> None:
    """Two sums a layer and one for the embedding; nothing larger than the best token of each device is gathered.

    Of a lookup of one row XLA would make a slice on GPUs, and gather the whole table for it.
    """
    assert {step["num_tokens"] for step in plan["steps"]} == {1, 16, 128}
    for step in plan["steps"]:
        count, size = step["collectives"]["all-reduce"]
        assert count in (5, 7)  # TPUs find the best token of a single row by two more
        assert size <= 5 * step["num_tokens"] * 256 * bytes_of_a_sum + 2 * 8
        assert step["collectives"].get("all-gather", (0, 0))[1] <= 2 * 2 * step["num_seqs"] * 4
        assert set(step["collectives"]) <= {"all-reduce", "all-gather"}
    assert sum(size for _, size in plan["sampler_collectives"].values()) < 16 * 2048 * 4  # all logits


@needs_libtpu
def test_compiles_for_a_tpu_that_is_known_only():
    done = compile_command("--model", "qwen3-0.6b", "--target", "v9:2x2")
    assert done.returncode == 2
    assert "target='v9:2x2'" in done.stderr
    assert "v6e:2x2" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin[with-cuda] (no GPU)"
)
@pytest.mark.parametrize("size", [1, 2])
def test_compiles_for_gpus(tmp_path, size):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    engine = ("--tensor-parallel-size", str(size), "--max-num-batched-tokens", "128", "--max-num-seqs", "16")
    done = compile_command("--model", str(config), "--target", f"h100:{size}", *engine, "--json", "-")
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert (plan["device_kind"], plan["num_devices"]) == ("NVIDIA H100 80GB HBM3", size)
    assert plan["num_pages"] > 0
    assert plan["page_bytes"] == 2 * 2 * (4 // size) * 16 * 128 * 2
    if size > 1:
        check_collectives(plan, bytes_of_a_sum=4)
    else:
        assert not any(step["collectives"] for step in plan["steps"])
