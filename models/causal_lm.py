"""What all decoder-only families share: embeddings, a stack of layers, a final norm, logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxengine.models.config import ModelConfig, common_fields
from jaxengine.models.layer_stack import LayerStack, are_alike
from jaxengine.models.layers.attention import Attention
from jaxengine.models.layers.embedding import Embedding
from jaxengine.models.layers.linear import Linear
from jaxengine.models.layers.matrix import Formats, LayerBuilder, MatrixLayer
from jaxengine.models.layers.mlp import GatedMLP
from jaxengine.models.layers.norm import LayerNorm, PendingResidual, RMSNorm, add_up
from jaxengine.models.layers.param import ParameterSpec, spec_of
from jaxengine.models.layers.rope import rope_table
from jaxengine.models.registry import architecture_of
from jaxengine.models.step import ModelInputs, ModelOutputs, StepContext
from jaxengine.models.weights import WeightSpec, parameters
from jaxengine.pallas_kernels.ragged_paged_attention import plan_attention
from jaxengine.sharding import axes
from jaxengine.sharding.mesh import COLUMNS, EVERYWHERE, on_each_device


class DecoderLayer(nnx.Module):
    """Pre-norm attention and gated MLP, the layer of Llama and of the families that follow it.

    `jax.jit` on `__call__` makes the layer one function of its parameters: layers with equal static attributes are
    traced once, and XLA sees as many different layers as there are kinds, not as many as there are.
    """

    mlp_class: ClassVar[Any] = GatedMLP

    def __init__(self, config: ModelConfig, layer: int, build: LayerBuilder):
        """Makes layer number `layer`. The number itself is not kept, or no two layers would be alike."""
        self.input_layernorm = make_norm(config, build.at("input_layernorm"))
        self.self_attn = Attention(config, layer, build.at("self_attn"))
        self.post_attention_layernorm = make_norm(config, build.at("post_attention_layernorm"))
        self.mlp = self.mlp_class(config, build.at("mlp"))

    @jax.jit
    def __call__(
        self, x: jax.Array | PendingResidual, cache: Any, step: StepContext
    ) -> tuple[jax.Array | PendingResidual, Any]:
        """Applies the layer to `[T, D]`; see `Attention` for the rest."""
        x, normed = self.input_layernorm.add_and_norm(x, step)
        attended, cache = self.self_attn(normed, cache, step, allow_partial=True)
        x, normed = self.post_attention_layernorm.add_and_norm(PendingResidual(x, attended), step)
        return PendingResidual(x, self.mlp(normed, step, allow_partial=True)), cache


class CausalLM(nnx.Module):
    """A decoder-only language model.

    A family sets `layer_class`, reads its configuration in `read_config` and, where its tensors have other names than
    Llama's, overrides `checkpoint_layers`.
    """

    layer_class: ClassVar[Any] = DecoderLayer
    has_fused_tensors: ClassVar[bool] = False
    """Whether a checkpoint has our fused layers as they are, and not a layer for each of their parts."""
    base_prefix: ClassVar[str] = "model."
    """Prefix of all names but the head's; checkpoints of the bare model lack it."""
    ignored_tensors: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    """Endings of tensors that old checkpoints hold and nothing needs."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
        formats: Formats | None = None,
    ):
        """Makes the model; without `rngs` its parameters are abstract, for the loader to fill.

        Args:
            config: Which model.
            dtype: Dtype of activations, and of all parameters that have no format.
            rngs: See `make_parameter`.
            formats: Chooses the format of each matrix; None holds all of them as they are, in `dtype`.
        """
        build = LayerBuilder(dtype, rngs, formats, config.tensor_parallel_size)
        self.config = config
        self._add_embeddings(config, build)
        self.layers = nnx.List(
            [self.layer_class(config, layer, build.at("layers").at(layer)) for layer in range(config.num_layers)]
        )
        self.norm = make_norm(config, build.at("norm"))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, (axes.VOCAB, axes.EMBED), build.at("lm_head"))

    def _add_embeddings(self, config: ModelConfig, build: LayerBuilder) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, build.at("embed_tokens"))

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Reads the form of `config.json`; a family adds what differs from the common fields."""
        return ModelConfig(architecture=architecture_of(hf), **common_fields(hf))

    @classmethod
    def checkpoint_layers(cls, layer: str, parts: Sequence[str]) -> tuple[str, ...]:
        """Returns the names in a checkpoint of the layer at a path: one, or one of each part.

        Args:
            layer: Its dotted path, such as "layers.0.self_attn.qkv_proj".
            parts: Names of its parts, if it is fused.
        """
        name = layer if layer == "lm_head" else cls.base_prefix + layer
        if not parts or cls.has_fused_tensors:
            return (name,)
        return tuple(f"{name.rpartition('.')[0]}.{part}" for part in parts)

    def weight_map(self) -> dict[str, WeightSpec]:
        """Returns where each parameter comes from, by its dotted path; of a model whose layers are not stacked."""
        return {path: self.weight_spec(path, spec_of(param)) for path, param in parameters(self).items()}

    def weight_spec(self, path: str, spec: ParameterSpec) -> WeightSpec:
        """Returns where the parameter at `path` comes from."""
        layer, _, name = path.rpartition(".")
        parts = [part.name for part in spec.fused_parts] if len(spec.fused_parts) > 1 else []
        layers = self.checkpoint_layers(layer, parts)
        names = tuple(f"{layer}.{tensor}" for layer in layers for tensor in spec.tensors or (name,))
        return WeightSpec(names, decode=spec.decode)

    def stack_layers(self) -> bool:
        """Turns the layers into a `LayerStack`, if they differ in nothing but their parameters; says whether."""
        if isinstance(self.layers, LayerStack):
            return True
        if not self.config.has_equal_layers or not are_alike(self.layers):  # formats may differ
            return False
        self.layers = LayerStack(self.layers)
        return True

    def embed(self, inputs: ModelInputs) -> jax.Array:
        """Embeds tokens, or what replaces them, as `[T, D]`."""
        x = self.embed_tokens(inputs.token_ids)
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return inputs.replace_rows(x)

    def __call__(
        self, inputs: ModelInputs, caches: Sequence[Any] | None = None, step: StepContext | None = None
    ) -> ModelOutputs:
        """Runs the layers over a ragged batch.

        Args:
            inputs: The tokens.
            caches: As `ModelConfig.cache_layout` has them; a single one for stacked layers. None for training: tokens
                then see those before them among the inputs, and gradients can be taken.
            step: The step's context without plans and rotations; with caches, and only then.

        Returns:
            Hidden states, those that `ModelConfig.taps` names, and the caches with the new keys and values.

        Raises:
            ValueError: Caches come without a context, or a context without caches.
        """
        if (caches is None) != (step is None):
            raise ValueError("caches and step go together; give both, or neither for training")
        if caches is None or step is None:
            caches = [None] * (1 if isinstance(self.layers, LayerStack) else len(self.layers))
            step = StepContext(segment_ids=inputs.segment_ids())
        step = self._complete(step, inputs, caches)
        x, taps, caches = self._run_layers(self.embed(inputs), caches, step)
        return ModelOutputs(self.norm.add_and_norm(x, step)[1], taps, caches)

    def _complete(self, step: StepContext, inputs: ModelInputs, caches: Sequence[Any]) -> StepContext:
        """Adds what several layers share: the rotations of all positions, and each cache group's plan."""
        config = self.config
        rope = tuple(rope_table(rotation, inputs.positions, config.max_model_len) for rotation in config.rotations)
        if step.is_differentiable:
            return dataclasses.replace(step, rope=rope)
        layout = config.cache_layout
        attention = tuple(
            plan_attention(
                meta,
                num_tokens=inputs.token_ids.shape[0],
                num_heads=config.heads.num_heads // config.tensor_parallel_size,
                cache=layout.view(_of_one_device(caches[0], config.tensor_parallel_size), group),
                sliding_window=group.spec.window,
            )
            for group, meta in zip(layout.groups, step.attention, strict=True)
        )
        return dataclasses.replace(step, attention=attention, rope=rope)

    def _run_layers(
        self, x: jax.Array, caches: Sequence[Any], step: StepContext
    ) -> tuple[jax.Array | PendingResidual, tuple[jax.Array, ...], list[Any]]:
        """Applies all layers to `[T, D]`: what comes of it, the taps and the caches."""
        if isinstance(self.layers, LayerStack):
            x, cache, taps = self.layers(x, caches[0], step, self.config.taps)
            return x, taps, [cache]
        residuals, caches, layout = [x], list(caches), self.config.cache_layout
        for number, layer in enumerate(self.layers):
            group, index = layout.group_of[number], layout.cache_of[number]
            if group is None or step.is_differentiable:
                x, caches[index] = layer(x, caches[index], step)
            else:
                cache = layout.view(caches[index], layout.groups[group])
                x, cache = layer(x, cache, step.of_group(group))
                caches[index] = layout.view(cache, layout.groups[0], layout.groups[group])
            residuals.append(x)
        return x, tuple(add_up(residuals[tap]) for tap in self.config.taps), caches

    def compute_logits(self, hidden: jax.Array) -> jax.Array:
        """Returns logits of the rows that sample: `[R, D]` to f32[R, V]."""
        head: MatrixLayer = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

        def multiply(hidden, matrix):
            return matrix.multiply(hidden, jnp.float32)

        if self.config.tensor_parallel_size > 1 and self.config.vocab_size % self.config.tensor_parallel_size == 0:
            # Each device the logits of its own tokens, and nothing moves.
            multiply = on_each_device(multiply, (EVERYWHERE, head.matrix_places), COLUMNS)
        return soft_cap(multiply(hidden, head.matrix), self.config.final_soft_cap)


def _of_one_device(cache: Any, size: int) -> Any:
    """Returns the shape of one device's part of a cache, whose second axis is that of the heads."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], x.shape[1] // size, *x.shape[2:]), x.dtype), cache)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns `cap * tanh(x / cap)`, or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def make_norm(config: ModelConfig, build: LayerBuilder) -> RMSNorm | LayerNorm:
    """Returns a norm over the model dimension, as the configuration has it."""
    if config.norm == "layer":
        return LayerNorm(config.hidden_size, build, eps=config.norm_eps)
    return RMSNorm(config.hidden_size, build, eps=config.norm_eps, unit_offset=config.norm_unit_offset)
