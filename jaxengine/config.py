"""The engine's configuration: frozen dataclasses, resolved once at start-up and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from jaxengine.models.config import ModelConfig
    from jaxengine.pallas_kernels.ragged_paged_attention import AttentionSpec

SchedulingPolicy = Literal["fcfs", "priority"]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What bounds a step, and who goes first.

    Attributes:
        max_num_seqs: Requests running at once: rows of the device state.
        max_num_batched_tokens: Tokens of one step at most.
        max_model_len: Prompt and output tokens of one request at most.
        policy: "fcfs" (first come, first served) or "priority" (lower `Request.priority` first, ties by arrival time).
        enable_chunked_prefill: Whether a prompt may be split over several steps.
        long_prefill_token_threshold: Prompt tokens of one request in one step at most; 0: no such limit.
        async_scheduling: Whether the engine schedules a step before it knows the tokens of the one before.
        num_scheduler_steps: Decode steps that are planned at once, wherever all requests decode and none waits; None:
            as many as it takes to keep the device busy.

    Raises:
        ValueError: A field is out of range, or a step cannot hold what the other fields ask for.
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: SchedulingPolicy = "fcfs"
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    async_scheduling: bool = True
    num_scheduler_steps: int | None = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("long_prefill_token_threshold", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.policy not in get_args(SchedulingPolicy):
            raise ValueError(f"policy={self.policy!r}: must be one of {get_args(SchedulingPolicy)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least max_num_seqs="
                f"{self.max_num_seqs}, so that every running request can decode one token in every step"
            )
        if not self.enable_chunked_prefill:
            if self.max_num_batched_tokens < self.max_model_len:
                raise ValueError(
                    f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least max_model_len="
                    f"{self.max_model_len} when enable_chunked_prefill=False, so that every prompt fits in one step"
                )
            if self.long_prefill_token_threshold:
                raise ValueError(
                    f"long_prefill_token_threshold={self.long_prefill_token_threshold}: must be 0 when "
                    "enable_chunked_prefill=False"
                )


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What must be known of a model and its engine to check requests.

    Attributes:
        vocab_size: Rows of the model's embedding table.
        max_model_len: Tokens of prompt and output together at most.
        max_logprobs: Largest `logprobs` and `prompt_logprobs` of a request.
        max_num_seqs: Completions that run at once.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    max_num_seqs: int


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the engine needs to know, resolved; `EngineArgs.resolve()` makes it.

    Attributes:
        model: The architecture.
        scheduler: What bounds a step.
        platform: "cpu", "gpu" or "tpu": what steps are compiled for.
        dtype: Dtype of activations, norms and biases, and of all products.
        weight_dtype: Dtype in which matrices are held.
        kv_cache_dtype: Dtype of cached keys and values.
        attention: What the attention op needs to know of the model; of one device's heads. `CacheGroup.attention`
            has it for each cache group.
        attention_backend: Implementation of ragged paged attention.
        all_reduce_backend: Implementation of sums over the devices that share the model, in steps of few tokens.
        data_parallel_size: Shards, each with its own scheduler, pages and prefix cache, that step together.
        block_size: Tokens of a page.
        num_pages: Pages of the KV cache; None sizes it from the memory.
        kv_cache_memory_bytes: Memory of the KV cache; None takes what is left on the device.
        gpu_memory_utilization: Share of the device's memory that the engine may take.
        enable_prefix_caching: Whether requests share the pages of equal prefixes.
        max_logprobs: Most `logprobs` or `prompt_logprobs` a request may ask for.
        seed: Seed of requests that bring none.
        logits_processors: Users' processors, compiled into the step.
        warmup: "background" compiles all step shapes while the first already serve; "full" waits for all of them;
            "lazy" compiles two small ones, enough for everything, and cuts prompts to fit: the fastest start for one
            short answer; "none" compiles each shape when a step first needs it.
        num_compile_threads: Threads that compile; None for 2 on CPUs, which compute too, and up to 8 elsewhere.
        num_lowering_processes: Processes that lower programs beside this one while it starts, on one device; None: on
            GPUs as many as are worth starting, elsewhere none.
    """

    model: ModelConfig
    scheduler: SchedulerConfig
    platform: str
    dtype: str
    weight_dtype: str
    kv_cache_dtype: str
    attention: AttentionSpec
    attention_backend: str
    all_reduce_backend: str = "reference"
    data_parallel_size: int = 1
    block_size: int = 16
    num_pages: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    max_logprobs: int = 20
    seed: int = 0
    logits_processors: tuple = ()
    warmup: Literal["background", "full", "lazy", "none"] = "background"
    num_compile_threads: int | None = None
    num_lowering_processes: int | None = None

    @property
    def limits(self) -> ModelLimits:
        """What bounds requests."""
        return ModelLimits(
            vocab_size=self.model.vocab_size,
            max_model_len=self.scheduler.max_model_len,
            max_logprobs=self.max_logprobs,
            max_num_seqs=self.data_parallel_size * self.scheduler.max_num_seqs,
        )
