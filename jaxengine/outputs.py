"""What a request gives back: `RequestOutput` and `CompletionOutput`, with vLLM's fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """Log probability of one token at one position.

    Attributes:
        logprob: Natural logarithm of the probability, before temperature and the other sampling parameters.
        rank: 1 for the most likely token of the vocabulary.
        decoded_token: The token's text; None without detokenising.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobDict = dict[int, Logprob]
"""Token id -> its log probability, for one position: the chosen token first, then the most likely ones."""


@dataclass
class RequestMetrics:
    """Times and counts of one request, all its completions together.

    Times are seconds on the clock of `arrival_time` (the engine's); 0.0 where it has not happened yet.

    Attributes:
        arrival_time: When the request was added.
        scheduled_time: When its first completion first ran.
        first_token_time: When its first token reached the host.
        last_token_time: When its latest token reached the host.
        finished_time: When its last completion finished.
        num_prompt_tokens: Tokens of the prompt.
        num_generation_tokens: Tokens generated.
        num_preemptions: How often one of its completions was preempted and recomputed.
    """

    arrival_time: float = 0.0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    finished_time: float = 0.0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def queue_seconds(self) -> float:
        """Seconds from arrival to the first step; 0.0 before it."""
        return max(0.0, self.scheduled_time - self.arrival_time) if self.scheduled_time else 0.0

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token; 0.0 before it."""
        return max(0.0, self.first_token_time - self.arrival_time) if self.first_token_time else 0.0


@dataclass
class CompletionOutput:
    """One completion of a request.

    Attributes:
        index: Which of the request's `n` completions this is.
        text: The generated text.
        token_ids: The generated token ids, the stop token included.
        cumulative_logprob: Sum of the chosen tokens' log probabilities; None unless `logprobs` was set.
        logprobs: One dict per generated token; None unless `logprobs` was set.
        finish_reason: "stop", "length", "abort" or "error"; None while it runs.
        stop_reason: The stop string or stop token id that ended it; None for EOS and every other end.
        lora_request: The LoRA adapter used.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobDict] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any | None = None

    def finished(self) -> bool:
        """Returns whether the completion has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """The outputs of one request.

    Attributes:
        request_id: The request's id.
        prompt: The prompt's text; None for a prompt of token ids.
        prompt_token_ids: The prompt's token ids, after any truncation.
        prompt_logprobs: One entry per prompt token, the first None; None unless `prompt_logprobs` was set.
        outputs: The completions, by index. With `RequestOutputKind.DELTA` only those with news.
        finished: Whether all completions have ended.
        metrics: Times and counts.
        lora_request: The LoRA adapter used.
        encoder_prompt: Always None: there are no encoder-decoder models.
        encoder_prompt_token_ids: Always None.
        num_cached_tokens: Prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[TokenLogprobDict | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: Any | None = None
    encoder_prompt: str | None = field(default=None, repr=False)
    encoder_prompt_token_ids: list[int] | None = field(default=None, repr=False)
    num_cached_tokens: int | None = None

    def add(self, newer: RequestOutput, *, aggregate: bool) -> None:
        """Merges a later output of the same request into this one, for a reader slower than the engine.

        Args:
            newer: The later output.
            aggregate: True for `RequestOutputKind.DELTA`: texts and tokens are appended; otherwise replaced.
        """
        self.finished = self.finished or newer.finished
        self.metrics = newer.metrics
        self.num_cached_tokens = newer.num_cached_tokens
        if newer.prompt_logprobs is not None:
            self.prompt_logprobs = newer.prompt_logprobs
        mine = {output.index: output for output in self.outputs}
        for output in newer.outputs:
            if aggregate and output.index in mine:
                _append_completion(mine[output.index], output)
            else:
                mine[output.index] = output
        self.outputs = [mine[index] for index in sorted(mine)]


def _append_completion(target: CompletionOutput, newer: CompletionOutput) -> None:
    target.text += newer.text
    target.token_ids = [*target.token_ids, *newer.token_ids]
    if newer.logprobs is not None:
        target.logprobs = [*(target.logprobs or []), *newer.logprobs]
    target.cumulative_logprob = newer.cumulative_logprob
    target.finish_reason = newer.finish_reason
    target.stop_reason = newer.stop_reason


def logprob_dict(
    token_ids: Iterable[int], logprobs: Iterable[float], rank: int, decoded: Mapping[int, str] | None
) -> TokenLogprobDict:
    """Builds one position's dict from a row of the sampler's output.

    Args:
        token_ids: The chosen token, then the most likely ones, best first.
        logprobs: Their log probabilities.
        rank: The chosen token's rank.
        decoded: Token id -> text, or None not to decode.
    """
    result: TokenLogprobDict = {}
    for place, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        if token_id not in result:
            text = None if decoded is None else decoded[token_id]
            result[token_id] = Logprob(logprob, place if place else rank, text)
    return result
