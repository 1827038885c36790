"""What all decoder-only families share: embeddings, a stack of layers, a final norm, logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxengine.models.config import ModelConfig, RopeConfig, common_fields
from jaxengine.models.layer_stack import LayerStack
from jaxengine.models.layers.attention import Attention
from jaxengine.models.layers.embedding import Embedding
from jaxengine.models.layers.linear import Linear, matmul
from jaxengine.models.layers.mlp import GatedMLP
from jaxengine.models.layers.norm import LayerNorm, RMSNorm, Sum
from jaxengine.models.layers.rope import RopeTable, rope_table
from jaxengine.models.registry import architecture_of
from jaxengine.models.weights import WeightSpec, parameters
from jaxengine.pallas_kernels.all_reduce import Workspace
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata, plan_attention
from jaxengine.sharding import axes
from jaxengine.sharding.mesh import MODEL


class DecoderLayer(nnx.Module):
    """Pre-norm attention and gated MLP, the layer of Llama and of the families that follow it.

    `jax.jit` on `__call__` makes the layer one function of its parameters: layers with equal static attributes are
    traced once, and XLA sees as many different layers as there are kinds, not as many as there are.
    """

    mlp_class: ClassVar[Any] = GatedMLP

    def __init__(self, config: ModelConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        """Makes layer number `layer`. The number itself is not kept, or no two layers would be alike."""
        self.input_layernorm = make_norm(config, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = make_norm(config, dtype=dtype, rngs=rngs)
        self.mlp = self.mlp_class(config, dtype=dtype, rngs=rngs)

    @jax.jit
    def __call__(
        self,
        x: jax.Array | Sum,
        rope: RopeTable | None,
        cache: Any,
        meta: AttentionMetadata,
        sums: Workspace | None = None,
    ) -> tuple[jax.Array | Sum, Any]:
        """Applies the layer to `[T, D]`; see `Attention` for the rest."""
        x, normed = self.input_layernorm.added(x)
        attended, cache = self.self_attn(normed, rope, cache, meta, sums, in_parts=True)
        x, normed = self.post_attention_layernorm.added(Sum(x, attended))
        return Sum(x, self.mlp(normed, sums, in_parts=True)), cache


class CausalLM(nnx.Module):
    """A decoder-only language model.

    A family sets `layer_class`, reads its configuration in `read_config` and, where its tensors have other names than
    Llama's, overrides `weight_map`.
    """

    layer_class: ClassVar[Any] = DecoderLayer
    fused_weights: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    """Our fused layers, and the tensors that they are in a checkpoint."""
    base_prefix: ClassVar[str] = "model."
    """Prefix of all names but the head's; checkpoints of the bare model lack it."""
    ignored_tensors: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    """Endings of tensors that old checkpoints hold and nothing needs."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs | None = None):
        """Makes the model; without `rngs` its parameters are abstract, for the loader to fill."""
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [self.layer_class(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.norm = make_norm(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, (axes.VOCAB, axes.EMBED), dtype=dtype, rngs=rngs
            )

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads the form of `config.json`; a family adds what differs from the common fields."""
        return ModelConfig(architecture=architecture_of(hf), **common_fields(hf))

    @classmethod
    def weight_map(cls, config: ModelConfig) -> dict[str, WeightSpec]:
        """Where each parameter comes from, by its dotted path."""
        return {path: WeightSpec(cls.tensor_names(path)) for path in parameters(cls(config))}

    @classmethod
    def tensor_names(cls, path: str) -> tuple[str, ...]:
        """Names in a checkpoint of the parameter at `path`, which differ from it by prefix and fused layers only."""
        name = path if path.startswith("lm_head.") else cls.base_prefix + path
        for fused, parts in cls.fused_weights.items():
            if f".{fused}." in name:
                return tuple(name.replace(f".{fused}.", f".{part}.") for part in parts)
        return (name,)

    def stack_layers(self) -> bool:
        """Turns the layers into a `LayerStack`, if they differ in nothing but their parameters; says whether."""
        if not self.config.has_equal_layers:
            return False
        self.layers = LayerStack(self.layers)
        return True

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeds i32[T] tokens at i32[T] positions as `[T, D]`."""
        x = self.embed_tokens(token_ids)
        return x if self.config.embedding_scale == 1.0 else x * jnp.asarray(self.config.embedding_scale, x.dtype)

    def __call__(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        kv_caches: Sequence[Any],
        meta: AttentionMetadata,
        sums: Workspace | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """Runs the layers over a ragged batch.

        Args:
            token_ids: i32[T]; what stands at padding is not looked at.
            positions: i32[T], each token's position in its own sequence.
            kv_caches: One cache for each layer; a single one for stacked layers.
            meta: Which tokens belong to which sequences and pages.
            sums: See `Linear`; not with stacked layers.

        Returns:
            Hidden states after the final norm, `[T, D]`, and the caches with the new keys and values.
        """
        config = self.config
        tables: dict[RopeConfig, RopeTable] = {}
        plans: dict[int | None, AttentionMetadata] = {}
        x = self.embed(token_ids, positions)
        layers = [self.layers] if isinstance(self.layers, LayerStack) else self.layers
        new_caches = []
        for index, (layer, cache) in enumerate(zip(layers, kv_caches, strict=True)):
            rope = config.layer_rope(index)
            if rope is not None and rope not in tables:
                tables[rope] = rope_table(rope, positions, config.max_model_len)
            window = config.window(index)
            if window not in plans:
                plans[window] = plan_attention(
                    meta,
                    num_tokens=token_ids.shape[0],
                    num_heads=config.heads.num_heads // config.tensor_parallel_size,
                    cache=_of_one_device(cache, config.tensor_parallel_size),
                    sliding_window=window,
                )
            x, cache = layer(x, None if rope is None else tables[rope], cache, plans[window], sums)
            new_caches.append(cache)
        return self.norm.added(x)[1], new_caches

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of the rows that sample: `[R, D]` to f32[R, V]."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        multiply = functools.partial(matmul, out_dtype=jnp.float32)
        if self.config.tensor_parallel_size > 1 and self.config.vocab_size % self.config.tensor_parallel_size == 0:
            columns = PartitionSpec(None, MODEL)  # each device the logits of its own tokens, and nothing moves
            specs = (PartitionSpec(), PartitionSpec(MODEL))
            multiply = jax.shard_map(multiply, in_specs=specs, out_specs=columns, check_vma=False)
        return soft_cap(multiply(hidden, head.weight[...]), self.config.final_soft_cap)


def _of_one_device(cache: Any, size: int) -> Any:
    """The shape of one device's part of a cache, whose second axis is that of the heads."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // size, *x.shape[2:]), x.dtype), cache)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)`, or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def make_norm(config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None) -> RMSNorm | LayerNorm:
    """A norm over the model dimension, as the configuration has it."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, rngs=rngs)
    return RMSNorm(config.hidden_size, eps=config.norm_eps, unit_offset=config.norm_unit_offset, dtype=dtype, rngs=rngs)
