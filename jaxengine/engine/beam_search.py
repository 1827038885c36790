"""Beam search on top of the engine: every step asks for one token of every beam and its best alternatives.

As in vLLM, a beam is a request of its own for each token; the prefix cache makes that cost one step, and not a prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxengine.engine.inputs import PromptInput, normalize_prompts
from jaxengine.engine.llm_engine import LLMEngine
from jaxengine.outputs import RequestOutput, TokenLogprobDict
from jaxengine.sampling_params import BeamSearchParams, SamplingParams

Generate = Callable[[list[PromptInput], SamplingParams], list[RequestOutput]]
"""`LLM.generate`, without a progress bar."""


@dataclass
class BeamSearchSequence:
    """One continuation.

    Attributes:
        tokens: Prompt and output token ids.
        logprobs: One dict per output token.
        cum_logprob: Sum of the log probabilities of the output tokens.
        text: The text of all tokens.
        finish_reason: "stop" at EOS, else "length".
    """

    tokens: list[int]
    logprobs: list[TokenLogprobDict] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None


@dataclass
class BeamSearchOutput:
    """The best continuations of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass
class _Search:
    prompt_len: int
    beams: list[BeamSearchSequence]
    finished: list[BeamSearchSequence] = field(default_factory=list)


def beam_search(
    engine: LLMEngine, generate: Generate, prompts: PromptInput | Sequence[PromptInput], params: BeamSearchParams
) -> list[BeamSearchOutput]:
    """Returns the best continuations of each prompt; see `LLM.beam_search`."""
    num_candidates = 2 * params.beam_width
    if num_candidates > engine.config.max_logprobs:
        raise ValueError(
            f"beam_width={params.beam_width}: needs {num_candidates} log probabilities a token, more than max_logprobs="
            f"{engine.config.max_logprobs}: raise it in LLM(...)"
        )
    eos = set() if params.ignore_eos else set(engine.input_processor.eos_token_ids)
    one_token = SamplingParams(
        max_tokens=1, logprobs=num_candidates, temperature=params.temperature, ignore_eos=True, detokenize=False
    )
    searches = []
    for prompt in normalize_prompts(prompts):
        checked = engine.input_processor.process_one("beam", prompt, SamplingParams(max_tokens=params.max_tokens))
        searches.append(_Search(len(checked.prompt_token_ids), [BeamSearchSequence(checked.prompt_token_ids)]))
    for _ in range(params.max_tokens):
        active = [(search, beam) for search in searches for beam in search.beams]
        if not active:
            break
        outputs = generate([{"prompt_token_ids": beam.tokens} for _, beam in active], one_token)
        candidates: dict[int, list[BeamSearchSequence]] = {id(search): [] for search in searches}
        for (search, beam), output in zip(active, outputs, strict=True):
            logprobs = output.outputs[0].logprobs
            assert logprobs is not None
            for token_id, logprob in list(logprobs[0].items())[: num_candidates + 1]:
                extended = BeamSearchSequence(
                    [*beam.tokens, token_id], [*beam.logprobs, logprobs[0]], beam.cum_logprob + logprob.logprob
                )
                if token_id in eos:
                    extended.finish_reason = "stop"
                    search.finished.append(extended)
                else:
                    candidates[id(search)].append(extended)
        limit = engine.config.scheduler.max_model_len - 1
        for search in searches:
            best = sorted(candidates[id(search)], key=lambda beam: beam.cum_logprob, reverse=True)[: params.beam_width]
            search.beams = [beam for beam in best if len(beam.tokens) < limit]
            search.finished += [beam for beam in best if len(beam.tokens) >= limit]
    return [_result(engine, search, params) for search in searches]


def _result(engine: LLMEngine, search: _Search, params: BeamSearchParams) -> BeamSearchOutput:
    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - search.prompt_len
        # EOS ends a hypothesis and is not part of its length (Wu et al., arXiv 1609.08144, with a plain power).
        length -= beam.finish_reason == "stop" and length > 1
        return beam.cum_logprob / max(length, 1) ** params.length_penalty

    best = sorted(search.finished + search.beams, key=score, reverse=True)[: params.beam_width]
    tokenizer = engine.tokenizer
    for beam in best:
        beam.finish_reason = beam.finish_reason or "length"
        shown = beam.tokens
        if beam.finish_reason == "stop" and not params.include_stop_str_in_output:
            shown = beam.tokens[:-1]
        beam.text = None if tokenizer is None else tokenizer.decode(shown, skip_special_tokens=True)
    return BeamSearchOutput(best)
