"""What a user sets: `EngineArgs`, the keyword arguments of `LLM`, and how they become an `EngineConfig`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxengine.config import EngineConfig, SchedulerConfig
from jaxengine.loading.checkpoint import Checkpoint, check_size
from jaxengine.loading.files import reading

if TYPE_CHECKING:
    from jaxengine.models.config import ModelConfig
    from jaxengine.pallas_kernels.ragged_paged_attention import AttentionSpec

logger = logging.getLogger(__name__)

WARMUPS = ("background", "full", "lazy", "none")
LOAD_FORMATS = ("auto", "dummy")
EXECUTOR_BACKENDS = (None, "external_launcher")
ATTENTION_BACKENDS = ("auto", "reference", "mosaic_gpu", "mosaic_tpu")
DEFAULT_STEP_TOKENS = {"cpu": 512, "gpu": 8192, "tpu": 2048}
"""By platform. Large products run faster on GPUs; on TPUs nothing was measured."""


@dataclass(kw_only=True)
class EngineArgs:
    """Arguments of `LLM`, named as in vLLM where vLLM has them.

    Attributes:
        model: A folder in Hugging Face's form, a GGUF file, or a hub id; None for the embedded SmolLM2-135M-Instruct.
        tokenizer: A folder or hub id to take the tokenizer from; None: the model's own.
        skip_tokenizer_init: Serve token ids only.
        revision: Branch, tag or commit of a hub id.
        load_format: "auto", or "dummy" for random weights (only the configuration is read).
        dtype: Of weights and activations: "auto", "bfloat16", "float16" or "float32". CPUs compute a
            16-bit checkpoint in float32 and may hold its matrices as they are.
        kv_cache_dtype: Of the cache; "auto" follows `dtype`. "fp8" (or "fp8_e4m3") and "int8" halve it: the keys and
            values of each head are divided by a scale, the checkpoint's or one measured on a text at the start.
        attention_backend: "reference" (plain JAX), "mosaic_gpu" or "mosaic_tpu"; "auto": the platform's kernel.
        seed: Seed of requests that bring none.
        tensor_parallel_size: Devices that share the model: heads, FFN columns and vocabulary.
        data_parallel_size: Copies of the model, each on devices of its own, that share the requests and step together.
            What follows, sizes and memory, holds for each of them.
        disable_custom_all_reduce: Whether devices that share the model add up through XLA's collectives only; else, in
            steps of few tokens on GPUs of one process, through each other's memory.
        distributed_executor_backend: "external_launcher": this script runs in several processes (torchrun, SLURM, ...),
            which share the devices of all; None: in one.
        max_model_len: Prompt and output tokens of one request at most; None: what the model and the cache allow.
        max_num_seqs: Requests running at once; None: 256, on CPU 64.
        max_num_batched_tokens: Tokens of one step at most; None: `DEFAULT_STEP_TOKENS` of the platform.
        block_size: Tokens of a page.
        num_gpu_blocks_override: Pages of the KV cache, instead of sizing it from the memory.
        kv_cache_memory_bytes: Memory of the KV cache, instead of what is left on the device (on CPU: of 384 MiB).
        gpu_memory_utilization: Share of the device's memory that the engine may take.
        enable_prefix_caching: Whether requests share the pages of equal prefixes.
        enable_chunked_prefill: Whether a prompt may be split over several steps.
        long_prefill_token_threshold: Prompt tokens of one request in one step at most; 0: no such limit.
        scheduling_policy: "fcfs" or "priority".
        async_scheduling: Whether the host runs one step ahead of the device.
        num_scheduler_steps: Decode steps that are planned at once while all requests decode and none waits: their
            tokens come together. None: 1 on CPUs; elsewhere 4 or 8 when planning each by itself would leave the
            device waiting, or they take less than 10 ms together.
        max_logprobs: Most `logprobs` or `prompt_logprobs` a request may ask for.
        generation_config: "auto" takes the model's own default sampling parameters; "vllm" or "none" ignores them.
        logits_processors: Functions that requests may name in `SamplingParams.logits_processors`: JAX functions of
            (logits f32[V], `sampling.sampler.LogitsState`), compiled from the start.
        warmup: "background", "full", "lazy" or "none"; see `EngineConfig`.
        compilation_cache_dir: Folder of JAX's persistent compilation cache; None: in the user's cache folder; "": none.
        num_lowering_processes: Processes, some 0.5 GB each, that do the Python part of compiling while the engine
            starts on one device, where a cache folder is; None: on GPUs up to 8, as many as are worth it; elsewhere 0.
        profiler_dir: Folder for what `start_profile` and `stop_profile` write; None: they are refused.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"
    seed: int = 0
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    disable_custom_all_reduce: bool = False
    distributed_executor_backend: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    async_scheduling: bool = True
    num_scheduler_steps: int | None = None
    max_logprobs: int = 20
    generation_config: str = "auto"
    logits_processors: list[Callable[..., Any]] | None = None
    warmup: str = "background"
    compilation_cache_dir: str | None = None
    num_lowering_processes: int | None = None
    profiler_dir: str | None = None

    def __post_init__(self) -> None:
        for name, accepted in (
            ("warmup", WARMUPS),
            ("load_format", LOAD_FORMATS),
            ("attention_backend", ATTENTION_BACKENDS),
            ("distributed_executor_backend", EXECUTOR_BACKENDS),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(str, accepted))}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization}: must be above 0 and at most 1")
        if self.block_size not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"block_size={self.block_size}: expected 8, 16, 32, 64, 128 or 256")
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks_override")
        for name in ("tensor_parallel_size", "data_parallel_size", "num_scheduler_steps", *sizes):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: must be an integer of at least 1, or None")
        if self.num_scheduler_steps is not None and self.num_scheduler_steps > self.block_size:
            raise ValueError(
                f"num_scheduler_steps={self.num_scheduler_steps}: must be at most block_size={self.block_size}"
            )
        if self.max_logprobs < 0:
            raise ValueError(f"max_logprobs={self.max_logprobs}: must be at least 0")
        if self.num_lowering_processes is not None and self.num_lowering_processes < 0:
            raise ValueError(f"num_lowering_processes={self.num_lowering_processes}: must be at least 0, or None")

    def resolve(self, checkpoint: Checkpoint, platform: str | None = None) -> EngineConfig:
        """Decides everything left open, from the checkpoint and the platform.

        Args:
            checkpoint: The model.
            platform: "cpu", "gpu" or "tpu", to plan for devices that are not there; by default what JAX runs on.

        Raises:
            ValueError: A value that the model or the memory does not allow.
        """
        import jax

        from jaxengine.models.layers.cache_scale import is_scaled
        from jaxengine.pallas_kernels.ragged_paged_attention import AttentionSpec
        from jaxengine.runner.platform import resolve_dtypes

        is_planned, platform = platform is not None, platform or jax.default_backend()
        devices = None if is_planned else self._devices()
        is_multiprocess = not is_planned and jax.process_count() > 1
        model = self._read_model(checkpoint)
        max_model_len = self.max_model_len or model.max_position_embeddings
        dtypes = resolve_dtypes(
            self.dtype, self.kv_cache_dtype, model.dtype, is_loop=model.has_equal_layers, platform=platform
        )
        model = dataclasses.replace(model, max_model_len=max_model_len, cache_scales=is_scaled(dtypes.kv_cache))
        attention = AttentionSpec(
            num_heads=model.heads.num_heads // model.tensor_parallel_size,
            num_kv_heads=model.heads.num_kv_heads // model.tensor_parallel_size,
            head_dim=model.head_dim,
            page_size=self.block_size,
            dtype=dtypes.compute,
            cache_dtype=dtypes.kv_cache,
        )
        if self.enable_prefix_caching and model.cache_layout.states:
            logger.info("prefix caching is off: %s has layers with a state for each sequence", model.architecture)
        # Which step runs must not depend on what one process has compiled already.
        without_races = {"background": "full", "lazy": "none"}
        warmup = without_races.get(self.warmup, self.warmup) if is_multiprocess else self.warmup
        config = EngineConfig(
            model=model,
            scheduler=self._scheduler(platform, max_model_len, is_multiprocess=is_multiprocess),
            platform=platform,
            dtype=dtypes.compute,
            weight_dtype=dtypes.weights,
            kv_cache_dtype=dtypes.kv_cache,
            attention=attention,
            attention_backend=self._attention_backend(model, attention, platform),
            all_reduce_backend=self._all_reduce_backend(platform, devices),
            data_parallel_size=self.data_parallel_size,
            block_size=self.block_size,
            num_pages=self.num_gpu_blocks_override,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enable_prefix_caching=self.enable_prefix_caching and not model.cache_layout.states,
            max_logprobs=min(self.max_logprobs, model.vocab_size),
            seed=self.seed,
            logits_processors=tuple(self.logits_processors or ()),
            warmup=warmup,  # pyright: ignore[reportArgumentType]  (checked above)
            num_lowering_processes=self.num_lowering_processes,
        )
        if self.max_model_len is None and platform == "cpu" and self.num_gpu_blocks_override is None:
            config = _fitted_to_cpu(config)
        return config

    def _devices(self) -> list[Any]:
        """Returns the devices of the engine.

        Raises:
            ValueError: There are too few, or processes that would have none.
        """
        import jax

        num_devices = self.data_parallel_size * self.tensor_parallel_size
        if num_devices > len(jax.devices()):
            shards = f"data_parallel_size={self.data_parallel_size} x " if self.data_parallel_size > 1 else ""
            raise ValueError(
                f"{shards}tensor_parallel_size={self.tensor_parallel_size} needs {num_devices} devices: there are "
                f"{len(jax.devices())} devices ({jax.devices()[0].platform})"
            )
        if jax.process_count() > 1 and num_devices != len(jax.devices()):
            raise ValueError(
                f"data_parallel_size={self.data_parallel_size} x tensor_parallel_size={self.tensor_parallel_size}: "
                f"{jax.process_count()} processes must use all of their {len(jax.devices())} devices"
            )
        return jax.devices()[:num_devices]

    def _read_model(self, checkpoint: Checkpoint) -> ModelConfig:
        """Returns the checkpoint's model over the devices, for sequences as long as it was made for.

        Raises:
            ValueError: The checkpoint does not describe a model, or `max_model_len` is longer.
        """
        from jaxengine.models.config import ModelConfig

        with reading(checkpoint.path):
            model = ModelConfig.from_hf(checkpoint.config)
        check_size(checkpoint, model)
        longest = model.max_position_embeddings
        if self.max_model_len is not None and self.max_model_len > longest:
            raise ValueError(f"max_model_len={self.max_model_len}: the model was made for at most {longest} tokens")
        return dataclasses.replace(model, tensor_parallel_size=self.tensor_parallel_size)

    def _scheduler(self, platform: str, max_model_len: int, *, is_multiprocess: bool) -> SchedulerConfig:
        """Returns what bounds steps."""
        is_cpu = platform == "cpu"
        max_num_seqs = self.max_num_seqs or (64 if is_cpu else 256)
        least = 0 if self.enable_chunked_prefill else max_model_len
        return SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens
            or max(DEFAULT_STEP_TOKENS[platform], max_num_seqs, least),
            policy=self.scheduling_policy,  # pyright: ignore[reportArgumentType]  (checked there)
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            async_scheduling=self.async_scheduling,
            # Processes that share the devices must plan alike, whatever their clocks say.
            num_scheduler_steps=self.num_scheduler_steps or (1 if is_cpu or is_multiprocess else None),
        )

    def _attention_backend(self, model: ModelConfig, attention: AttentionSpec, platform: str) -> str:
        """Returns the implementation that runs the layers of all cache groups."""
        from jaxengine.pallas_kernels.ragged_paged_attention import choose_implementation

        groups = [group.attention(attention, model.tensor_parallel_size) for group in model.cache_layout.groups]
        found = {choose_implementation(group, platform, self.attention_backend) for group in groups}
        return "reference" if len(found) > 1 else found.pop()

    def _all_reduce_backend(self, platform: str, devices: list[Any] | None) -> str:
        """How the devices of a mesh, or of a planned one, add up what they share."""
        from jaxengine.pallas_kernels.all_reduce import choose_implementation

        if self.disable_custom_all_reduce or self.tensor_parallel_size == 1 or platform != "gpu":
            return "reference"
        if self.data_parallel_size > 1:
            logger.warning(
                "data_parallel_size=%d: sums over devices run through XLA's collectives", self.data_parallel_size
            )
            return "reference"
        return "mosaic_gpu" if devices is None else choose_implementation(devices)


def _fitted_to_cpu(config: EngineConfig) -> EngineConfig:
    """Returns a configuration for what the cache holds: it is small, and models are made for long contexts."""
    from jaxengine.runner.memory import max_tokens_on_cpu

    longest, capacity = config.scheduler.max_model_len, max_tokens_on_cpu(config)
    if not 2 <= capacity < longest:
        return config
    logger.warning(
        "max_model_len is %d, what the KV cache holds; the model allows %d: raise kv_cache_memory_bytes",
        capacity,
        longest,
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_model_len=capacity),
        scheduler=dataclasses.replace(config.scheduler, max_model_len=capacity),
    )
