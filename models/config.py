"""The model configuration: one frozen dataclass for all families, read from Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from jaxengine.models.cache import CacheLayout, CacheSpec, PagedKV, plan_caches
from jaxengine.sharding.layout import HeadLayout, check_divides, head_layout

FULL = "full_attention"
SLIDING = "sliding_attention"
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    Attributes:
        rotary_dim: Leading dimensions of each head that are rotated; the rest pass unchanged.
        theta: Base of the frequencies.
        kind: One of `ROPE_KINDS`.
        factor: By how much the context is stretched (linear, llama3, yarn).
        original_max_position: Context length of pre-training (llama3, yarn, longrope).
        attention_factor: Multiplies cos and sin (yarn, longrope).
        low_freq_factor, high_freq_factor: Bounds of llama3's interpolated band.
        beta_fast, beta_slow, truncate: Bounds of yarn's ramp, in rotations over the original context.
        short_factor, long_factor: Longrope's divisor of each frequency, below and above the original context.
    """

    rotary_dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope_type is {self.kind!r}; accepted: {', '.join(ROPE_KINDS)}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is {self.rotary_dim}; it must be even and at least 2")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_max_position < 1:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position}; {self.kind} rope needs at least 1"
            )
        if self.kind == "longrope":
            for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
                if len(factors) != self.rotary_dim // 2:
                    raise ValueError(f"{name} has {len(factors)} entries; it must have {self.rotary_dim // 2}")

    @classmethod
    def from_hf(cls, params: dict[str, Any], *, head_dim: int, max_position: int) -> RopeConfig:
        """Reads one dictionary of rope parameters (`rope_parameters`, or `rope_scaling` with `rope_theta` put in).

        Args:
            params: Keys as in Hugging Face's configurations.
            head_dim: H.
            max_position: `max_position_embeddings`, from which some defaults follow.
        """
        kind = params.get("rope_type") or params.get("type") or "default"
        kind = "longrope" if kind == "su" else kind
        original = int(params.get("original_max_position_embeddings") or max_position)
        factor = params.get("factor")
        if factor is None:
            factor = max_position / original if kind in ("yarn", "longrope") else 1.0
        return cls(
            rotary_dim=int(head_dim * (params.get("partial_rotary_factor") or 1.0)),
            theta=float(params.get("rope_theta") or 10000.0),
            kind=kind,
            factor=float(factor),
            original_max_position=original,
            attention_factor=_attention_factor(kind, float(factor), original, params),
            low_freq_factor=float(params.get("low_freq_factor") or 1.0),
            high_freq_factor=float(params.get("high_freq_factor") or 4.0),
            beta_fast=float(params.get("beta_fast") or 32.0),
            beta_slow=float(params.get("beta_slow") or 1.0),
            truncate=bool(params.get("truncate", True)),
            short_factor=tuple(float(f) for f in params.get("short_factor") or ()),
            long_factor=tuple(float(f) for f in params.get("long_factor") or ()),
        )


def _attention_factor(kind: str, factor: float, original: int, params: dict[str, Any]) -> float:
    """Returns factor on cos and sin: given, or as the paper has it (yarn: arXiv 2309.00071, longrope: 2402.13753)."""
    given = params.get("attention_factor")
    if given is not None:
        return float(given)
    if factor <= 1.0 or kind not in ("yarn", "longrope"):
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, mscale_all_dim = params.get("mscale"), params.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that a model's structure depends on. Hashable: modules may keep it as a static attribute.

    Attributes:
        architecture: The class name of `config.json`, a key of the registry.
        num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size: L, D, F, N, K, H, V.
        max_position_embeddings: Longest sequence that the model was made for.
        layer_types: `FULL` or `SLIDING`, one for each layer; empty means all full.
        sliding_window: Tokens that a sliding layer sees, the current one included.
        rope: Rotary embedding of the layers; None where positions are learned.
        local_rope: Rotary embedding of the sliding layers where theirs differs.
        rope_layers: Which layers rotate; empty means all.
        norm: "rms" or "layer".
        norm_eps, norm_unit_offset: Of the norms; with the offset, RMS norms multiply by `1 + weight`.
        qk_norm: Norm on queries and keys: None, "head" (each head by itself) or "projection" (all heads together).
        qkv_bias, output_bias, mlp_bias: Which linear layers have biases.
        attention_scale: Multiplies the scores; 0 means `head_dim ** -0.5`.
        attention_soft_cap, final_soft_cap: `cap * tanh(x / cap)` on scores and on logits.
        embedding_scale: Multiplies the embeddings.
        tie_word_embeddings: The output head is the embedding.
        hidden_act: One of `ACTIVATIONS`.
        dtype: The dtype that the checkpoint says it is in, such as "bfloat16"; None where it does not say.
        tensor_parallel_size: Devices that heads, FFN columns and the vocabulary are split over.
        max_model_len: Longest sequence that will be served (0: `max_position_embeddings`). Longrope takes its long
            factors for every sequence when this exceeds the original context, because cached keys cannot be turned
            again when a sequence grows.
        cache_scales: Keys and values are cached in 8 bits, divided by a scale of each head.
        taps: After how many layers the model returns hidden states besides the last, ascending: 0 are the embeddings,
            L what goes into the final norm.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] = ()
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False
    qk_norm: str | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 0.0
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    dtype: str | None = None
    tensor_parallel_size: int = 1
    max_model_len: int = 0
    cache_scales: bool = False
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._fill_defaults()
        for name in (
            *("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
            *("vocab_size", "max_position_embeddings", "tensor_parallel_size", "max_model_len"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        for name in ("layer_types", "rope_layers"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.num_layers} layers")
        if unknown := set(self.layer_types) - {FULL, SLIDING}:
            raise ValueError(f"layer_types has {sorted(unknown)[0]!r}; accepted: {FULL}, {SLIDING}")
        if SLIDING in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"sliding_window is {self.sliding_window!r}; sliding layers need at least 1")
        if self.qk_norm not in (None, "head", "projection"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; accepted: None, 'head', 'projection'")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm is {self.norm!r}; accepted: 'rms', 'layer'")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; accepted: {', '.join(ACTIVATIONS)}")
        for rope in (self.rope, self.local_rope):
            if rope is not None and rope.rotary_dim > self.head_dim:
                raise ValueError(f"rotary_dim is {rope.rotary_dim}; it must be at most head_dim {self.head_dim}")

        if list(self.taps) != sorted(set(self.taps) & set(range(self.num_layers + 1))):
            raise ValueError(f"taps is {self.taps}; it must be ascending numbers of layers from 0 to {self.num_layers}")
        self._check_parallel()

    def _check_parallel(self) -> None:
        check_divides("intermediate_size", self.intermediate_size, self.tensor_parallel_size)
        if self.qk_norm == "projection" and self.heads.is_padded:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size}: {self.num_kv_heads} KV heads that are normed "
                f"together cannot be filled up with zeros; sizes that divide {self.num_kv_heads} work"
            )

    @functools.cached_property
    def heads(self) -> HeadLayout:
        """The heads over the devices that share them."""
        return head_layout(self.num_heads, self.num_kv_heads, self.tensor_parallel_size)

    def _fill_defaults(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        if isinstance(self.num_layers, int):
            set_field(self, "layer_types", self.layer_types or (FULL,) * self.num_layers)
            set_field(self, "rope_layers", self.rope_layers or (self.rope is not None,) * self.num_layers)
        if isinstance(self.head_dim, int) and self.head_dim > 0:
            set_field(self, "attention_scale", self.attention_scale or self.head_dim**-0.5)
        set_field(self, "max_model_len", self.max_model_len or self.max_position_embeddings)

    def first_layers(self, count: int) -> ModelConfig:
        """Returns the same model with fewer layers."""
        kinds = {"layer_types": self.layer_types[:count], "rope_layers": self.rope_layers[:count]}
        taps = tuple(tap for tap in self.taps if tap <= count)
        return dataclasses.replace(self, num_layers=min(count, self.num_layers), taps=taps, **kinds)

    def window(self, layer: int) -> int | None:
        """Returns the sliding window of a layer in tokens, or None if it sees everything."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """Returns the rotary embedding of a layer, or None if it has none."""
        if not self.rope_layers[layer]:
            return None
        is_local = self.layer_types[layer] == SLIDING and self.local_rope is not None
        return self.local_rope if is_local else self.rope

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """What each layer keeps from step to step."""
        return tuple(
            PagedKV(self.heads.num_kv_heads, self.head_dim, self.window(layer)) for layer in range(self.num_layers)
        )

    @functools.cached_property
    def cache_layout(self) -> CacheLayout:
        """Which layers share pages."""
        return plan_caches(self.cache_specs, self.max_model_len)

    @functools.cached_property
    def rotations(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings that some layer has."""
        ropes = map(self.layer_rope, range(self.num_layers))
        return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))

    def rotation(self, layer: int) -> int | None:
        """Returns the number in `rotations` of a layer's rotary embedding, or None if it has none."""
        rope = self.layer_rope(layer)
        return None if rope is None else self.rotations.index(rope)

    @property
    def has_equal_layers(self) -> bool:
        """Whether the layers, more than one, differ in nothing but their parameters."""
        kinds = set(zip(self.cache_specs, map(self.layer_rope, range(self.num_layers)), strict=True))
        return len(kinds) == 1 and self.num_layers > 1

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads the form of Hugging Face's `config.json`, old or new.

        Raises:
            ValueError: The architecture is unknown, or a field is missing or has a value that is not supported.
        """
        from jaxengine.models import registry  # model files import this one

        model_class = registry.model_class(registry.architecture_of(config))
        return model_class.read_config(config)


def common_fields(hf: dict[str, Any], *, defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the keyword arguments of `ModelConfig` from the keys that most families share.

    Args:
        hf: The configuration as in `config.json`.
        defaults: A family's own defaults for keys that `config.json` may leave out.

    Raises:
        ValueError: A needed key is missing, or the checkpoint is quantised.
    """
    hf = {**(defaults or {}), **{key: value for key, value in hf.items() if value is not None}}
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if key not in hf:
            raise ValueError(f"config.json has no {key}")
    if "quantization_config" in hf:
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(f"quantization_config has quant_method {method!r}; only unquantised checkpoints are supported")
    if hf.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is true; only causal attention is supported")
    num_heads = int(hf["num_attention_heads"])
    max_position = int(hf.get("max_position_embeddings", 2048))
    head_dim = int(hf.get("head_dim") or int(hf["hidden_size"]) // max(num_heads, 1))
    rope, local_rope = _ropes(hf, head_dim, max_position)
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "vocab_size": hf["vocab_size"],
        "max_position_embeddings": max_position,
        "rope": rope,
        "local_rope": local_rope,
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "qkv_bias": bool(hf.get("attention_bias", False)),
        "output_bias": bool(hf.get("attention_bias", False)),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "hidden_act": hf.get("hidden_activation") or hf.get("hidden_act") or "silu",
        "dtype": hf.get("dtype") or hf.get("torch_dtype"),
    }


def _ropes(hf: dict[str, Any], head_dim: int, max_position: int) -> tuple[RopeConfig, RopeConfig | None]:
    """Returns the global and, where layers differ, the local rotary embedding.

    Newer files keep everything in `rope_parameters`, with one dictionary for each layer type where these differ; older
    ones have `rope_theta`, `rope_scaling` and Gemma 3's `rope_local_base_freq` (never scaled).
    """
    outer: dict[str, Any] = {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if hf.get(key) is not None:
            outer[key] = hf[key]
    params: dict[str, Any] = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    local: dict[str, Any] | None = None
    if FULL in params or SLIDING in params:
        local = params.get(SLIDING)
        params = params.get(FULL) or {}
    if hf.get("rope_local_base_freq") is not None:  # beside both forms; what a layer type says of itself goes first
        local = {"rope_theta": hf["rope_local_base_freq"]} | (local or {})

    def read(own: dict[str, Any]) -> RopeConfig:
        merged = {**outer, **{key: value for key, value in own.items() if value is not None}}
        if hf.get("original_max_position_embeddings") is not None:  # Phi-3's place for it, which goes first
            merged["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
        return RopeConfig.from_hf(merged, head_dim=head_dim, max_position=max_position)

    rope = read(params)
    local_rope = read(local) if local is not None else None
    return rope, None if local_rope == rope else local_rope
