"""What we use of the JSON files of a model, with its types and bounds; other keys may hold anything.

The names are those of Hugging Face's configurations.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Layers = Annotated[int, Meta(ge=0, le=1024)]
Heads = Annotated[int, Meta(ge=1, le=4096)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
Wide = Annotated[int, Meta(ge=1, le=2**24)]
Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=1e15)]
Small = Annotated[float, Meta(ge=0, le=1)]
Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]


class RopeParameters(msgspec.Struct):
    """`rope_parameters` and `rope_scaling`: of all layers, or of each kind."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    partial_rotary_factor: Positive | None = None
    original_max_position_embeddings: Length | None = None
    attention_factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Finite | None = None
    mscale_all_dim: Finite | None = None
    truncate: bool | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    full_attention: RopeParameters | None = None
    sliding_attention: RopeParameters | None = None


class ConfigFile(msgspec.Struct):
    """`config.json`."""

    architectures: list[str] | None = None
    model_type: str | None = None
    hidden_size: Width | None = None
    intermediate_size: Wide | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    vocab_size: Wide | None = None
    max_position_embeddings: Length | None = None
    original_max_position_embeddings: Length | None = None
    rms_norm_eps: Small | None = None
    layer_norm_epsilon: Small | None = None
    rope_theta: Positive | None = None
    rope_local_base_freq: Positive | None = None
    partial_rotary_factor: Positive | None = None
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int | bool] | None = None
    no_rope_layer_interval: Layers | None = None
    sliding_window: Length | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    sliding_window_pattern: Layers | None = None
    query_pre_attn_scalar: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    activation_function: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    use_bidirectional_attention: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | list[TokenId] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: ConfigFile | None = None
    n_embd: Width | None = None
    n_layer: Layers | None = None
    n_head: Heads | None = None
    n_inner: Wide | None = None
    n_positions: Length | None = None
    scale_attn_weights: bool | None = None
    scale_attn_by_inverse_layer_idx: bool | None = None
    reorder_and_upcast_attn: bool | None = None


class GenerationFile(msgspec.Struct):
    """`generation_config.json`."""

    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: TokenId | None = None
    min_p: Finite | None = None
    repetition_penalty: Finite | None = None
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | list[TokenId] | None = None


class TokenizerFile(msgspec.Struct):
    """`tokenizer_config.json`."""

    tokenizer_class: str | None = None
    model_max_length: float | None = None
    auto_map: dict[str, Any] | None = None


class IndexFile(msgspec.Struct):
    """`model.safetensors.index.json`: in which file each tensor is."""

    weight_map: dict[str, str]


class TensorEntry(msgspec.Struct):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: list[Annotated[int, Meta(ge=0, le=2**48)]]
    data_offsets: tuple[Annotated[int, Meta(ge=0, le=2**60)], Annotated[int, Meta(ge=0, le=2**60)]]


class TreeKey(msgspec.Struct):
    """A part of the path to an array of an Orbax checkpoint."""

    key: str


class TreeEntry(msgspec.Struct):
    """An array of an Orbax checkpoint."""

    key_metadata: list[TreeKey]


class TreeFile(msgspec.Struct):
    """`_METADATA` of an Orbax checkpoint."""

    tree_metadata: dict[str, TreeEntry]


class ArrayConfiguration(msgspec.Struct):
    """The configuration of a chunk grid or of a codec."""

    chunk_shape: list[Annotated[int, Meta(ge=1, le=2**48)]] | None = None
    codecs: list[ArrayPart] | None = None


class ArrayPart(msgspec.Struct):
    """A chunk grid or a codec."""

    name: str
    configuration: ArrayConfiguration | None = None


class ArrayFile(msgspec.Struct):
    """`zarr.json` of an array (https://zarr-specs.readthedocs.io/en/latest/v3/core/)."""

    shape: list[Annotated[int, Meta(ge=1, le=2**48)]]
    data_type: str
    chunk_grid: ArrayPart
    codecs: list[ArrayPart]
