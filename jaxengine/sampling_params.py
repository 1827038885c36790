"""What a user asks of one request: `SamplingParams`, with vLLM's names, defaults and meanings."""

from __future__ import annotations

import copy
import enum
import json as json_module
import logging
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxengine import bounded_json
from jaxengine.messages import quote, shorten

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-2
"""A positive temperature below this is raised to it: logits divided by less overflow in low precision."""
MAX_NUM_SEQUENCES = 16384
LOGIT_BIAS_LIMIT = 100.0
_SEED_LIMIT = 2**63

MAX_STOP_STRINGS = 2**14
MAX_STOP_CHARACTERS = 2**20
"""Of all stop strings together: an automaton has a state for each."""

MAX_BAD_WORDS = 64
"""Token sequences that a request's `bad_words` may become: the device state holds a fixed number."""
MAX_BAD_WORD_LEN = 8
"""Tokens of the longest such sequence."""


class RequestOutputKind(enum.Enum):
    """Which part of its text and tokens a request's outputs carry while it runs."""

    CUMULATIVE = 0
    """Everything so far, in every output."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """One output, when the request has finished."""


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form that an output must have: exactly one of the first five fields says which.

    Names and meanings are vLLM's.

    Attributes:
        json: A JSON schema, as a dict or as text. A keyword that cannot be enforced is an error.
        regex: A regular expression in the syntax of Rust's `regex` crate (no look-around, no references back), which
            the whole output must match.
        choice: Texts, one of which the output must be.
        grammar: A context-free grammar in Lark's syntax (as llguidance has it) or in llama.cpp's GBNF.
        json_object: True for any JSON object.
        disable_any_whitespace: JSON without spaces or newlines between its parts.
        disable_additional_properties: Objects of a JSON schema hold only the properties that it names, unless it says
            itself what others may be.
        whitespace_pattern: A regular expression of what may stand between the parts of JSON.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        """Checks all fields, except whether the schema or grammar itself is right, for which a model is needed.

        Raises:
            ValueError: None or several of the forms are given, or a field is of the wrong type.
        """
        forms = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in forms if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"structured_outputs must have exactly one of {', '.join(forms)}, got {given or 'none'}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"structured_outputs: {name} must be a string that is not empty, got {quote(value)}")
            if value is not None:
                _check_unicode(f"structured_outputs: {name}", value)
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"structured_outputs: {name} must be True or False, got {quote(getattr(self, name))}")
        if self.json_object not in (None, False, True):
            raise ValueError(f"structured_outputs: json_object must be True, got {quote(self.json_object)}")
        if self.choice is not None and not _strings("structured_outputs: choice", self.choice):
            raise ValueError("structured_outputs: choice must hold at least one text, got []")
        self._check_json()

    def _check_json(self) -> None:
        schema = self.json
        try:
            if isinstance(schema, str):
                schema = bounded_json.loads(schema)
            elif schema is not None:
                bounded_json.check_shape(json_module.dumps(schema).encode())
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"structured_outputs: json is no JSON: {shorten(str(error))}") from error
        if schema is not None and not isinstance(schema, dict):
            raise ValueError(f"structured_outputs: json must be a JSON schema, an object, got {quote(self.json)}")
        if schema is None and not self.json_object:
            for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
                if getattr(self, name):
                    raise ValueError(f"structured_outputs: {name} is for json and json_object only")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError("structured_outputs: disable_any_whitespace and whitespace_pattern exclude each other")


@dataclass
class SamplingParams:
    """Sampling parameters of one request.

    Names, defaults and meanings are vLLM's. Every field is checked when the object is made; what depends on the model
    (vocabulary size, `max_model_len`, `max_logprobs`) is checked when the request is added.

    Attributes:
        n: Completions to generate for the prompt.
        presence_penalty: In [-2, 2]; subtracted from the logits of tokens that the output holds already.
        frequency_penalty: In [-2, 2]; the same, times the number of occurrences.
        repetition_penalty: Above 0; divides (multiplies, if negative) the logits of tokens in prompt or output.
        temperature: At least 0; 0 is greedy, and then `top_p`, `top_k` and `min_p` are set to "all tokens".
        top_p: In (0, 1]; samples from the smallest set of tokens with this probability together.
        top_k: Samples from this many most likely tokens; 0 and -1 mean all.
        min_p: In [0, 1]; least probability of a token, relative to the most likely one's.
        seed: Makes sampling reproducible; None and -1 mean a fresh one. Completion `i` of `n` uses `seed + i`.
        stop: Strings that end the generation; a list after construction.
        stop_token_ids: Token ids that end the generation, besides EOS.
        bad_words: Words that may not be generated.
        include_stop_str_in_output: Keep the stop string (or stop token's text) in the text.
        ignore_eos: Go on after EOS.
        max_tokens: Tokens to generate at most; None means up to `max_model_len`.
        min_tokens: Tokens to generate before EOS, a stop token or a stop string may end the generation.
        logprobs: Log probabilities to return per generated token: of this many most likely tokens and of the chosen
            one. 0 returns the chosen one's, -1 the whole vocabulary's, None nothing.
        prompt_logprobs: The same for the tokens of the prompt.
        detokenize: Turn token ids into text. Without it the text is "".
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Keep the spaces that some tokenizers put between neighbouring special tokens.
        logits_processors: Pure JAX functions `(logits[V], state) -> logits[V]`, compiled into the step.
        truncate_prompt_tokens: Keep only the last so many tokens of the prompt; -1 keeps as many as fit.
        output_kind: What each output carries: see `RequestOutputKind`.
        logit_bias: Added to the logits of these token ids; each bias is clamped to [-100, 100].
        allowed_token_ids: If given, only these token ids can be generated.
        extra_args: Anything, for custom logits processors.
        skip_reading_prefix_cache: Compute the prompt anew; by default only where `prompt_logprobs` needs it.
        structured_outputs: The form that the output must have. Log probabilities are then those of the tokens that it
            allows.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[Callable[..., Any]] | None = None
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None
    structured_outputs: StructuredOutputsParams | None = None
    bad_words_token_ids: list[list[int]] | None = field(default=None, init=False, repr=False, compare=False)
    """`bad_words` as token sequences: set by the engine, which has the tokenizer."""

    def __post_init__(self) -> None:
        """Normalises every field to one form and checks it.

        Raises:
            ValueError: A field is out of range or of the wrong type; names field, value and what is accepted.
        """
        self._check_numbers()
        self._check_lengths()
        self._check_stops()
        self._check_token_sets()
        self._check_flags()
        if self.is_greedy:
            if self.n > 1:
                raise ValueError(
                    f"n must be 1 with greedy sampling (temperature=0), where all completions would be the same, "
                    f"got n={self.n}; set a temperature above 0"
                )
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """Builds parameters from fields of which None means "the default" (as in a decoded JSON request).

        `max_tokens=None` keeps its own meaning: no limit but `max_model_len`.
        """
        given: dict[str, Any] = {k: v for k, v in fields.items() if v is not None or k == "max_tokens"}
        return cls(**given)

    def clone(self) -> SamplingParams:
        """Returns a copy that shares no list or dict with this one; logits processors themselves are shared."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if name == "logits_processors":
                setattr(new, name, None if value is None else list(value))
            elif isinstance(value, (list, dict)):
                setattr(new, name, copy.deepcopy(value))
        return new

    def _check_numbers(self) -> None:
        self.n = _integer("n", self.n, 1, MAX_NUM_SEQUENCES)
        self.presence_penalty = _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self.frequency_penalty = _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self.repetition_penalty = _number("repetition_penalty", self.repetition_penalty, 0.0, above=True)
        self.temperature = _number("temperature", self.temperature, 0.0)
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature %s is below %s and could overflow; %s is used instead (0 means greedy)",
                self.temperature,
                MIN_TEMPERATURE,
                MIN_TEMPERATURE,
            )
            self.temperature = MIN_TEMPERATURE
        self.top_p = _number("top_p", self.top_p, 0.0, 1.0, above=True)
        self.top_k = max(0, _integer("top_k", self.top_k, -1, note="0 and -1 mean all tokens"))
        self.min_p = _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            self.seed = _integer("seed", self.seed, -_SEED_LIMIT, _SEED_LIMIT - 1)
            self.seed = None if self.seed == -1 else self.seed

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            self.max_tokens = _integer("max_tokens", self.max_tokens, 1, note="None means up to max_model_len")
        self.min_tokens = _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        self.logprobs = _num_logprobs("logprobs", self.logprobs)
        self.prompt_logprobs = _num_logprobs("prompt_logprobs", self.prompt_logprobs)
        if self.truncate_prompt_tokens is not None:
            accepted = "at least 1, or -1 for as many tokens as fit"
            value = _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, note=accepted)
            if value == 0:
                raise ValueError(f"truncate_prompt_tokens must be {accepted}, got 0")
            self.truncate_prompt_tokens = value

    def _check_stops(self) -> None:
        self.stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        num_characters = sum(map(len, self.stop))
        if len(self.stop) > MAX_STOP_STRINGS or num_characters > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop must hold at most {MAX_STOP_STRINGS} strings of {MAX_STOP_CHARACTERS} characters together, "
                f"got {len(self.stop)} of {num_characters}"
            )
        self.bad_words = _strings("bad_words", self.bad_words)
        blank = [word for word in self.bad_words if not word.strip()]
        if blank:
            raise ValueError(f"bad_words must hold words that are more than spaces, got {quote(blank[0])}")
        self.stop_token_ids = _token_ids("stop_token_ids", [] if self.stop_token_ids is None else self.stop_token_ids)
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop={quote(self.stop)} needs detokenize=True: stop strings are searched for in the text"
            )

    def _check_token_sets(self) -> None:
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must hold at least one token id (None allows all), got []")
        if self.logit_bias is not None:
            self.logit_bias = _clamped_logit_bias(self.logit_bias)

    def _check_flags(self) -> None:
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {quote(getattr(self, name))}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {quote(self.output_kind)}")
        if self.extra_args is not None and not isinstance(self.extra_args, dict):
            raise ValueError(f"extra_args must be a dict or None, got {quote(self.extra_args)}")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise ValueError(
                f"structured_outputs must be StructuredOutputsParams, got {quote(self.structured_outputs)}"
            )
        if self.logits_processors is not None:
            self.logits_processors = list(self.logits_processors)
            for processor in self.logits_processors:
                if not callable(processor):
                    raise ValueError(
                        f"logits_processors must hold functions (logits[V], state) -> logits[V], got {quote(processor)}"
                    )


@dataclass
class BeamSearchParams:
    """Parameters of `LLM.beam_search`.

    Attributes:
        beam_width: Sequences kept at every step, and returned.
        max_tokens: Tokens to generate at most.
        ignore_eos: Go on after EOS.
        temperature: At least 0; the temperature at which log probabilities are taken (0 as 1: they are not sampled).
        length_penalty: A finished sequence's score is its log probability divided by its length to this power.
        include_stop_str_in_output: Keep the text of the EOS token.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        """Checks every field; raises ValueError naming field and value."""
        self.beam_width = _integer("beam_width", self.beam_width, 1)
        self.max_tokens = _integer("max_tokens", self.max_tokens, 1)
        self.temperature = _number("temperature", self.temperature, 0.0)
        self.length_penalty = _number("length_penalty", self.length_penalty, -math.inf)


def _range_text(low: float, high: float, above: bool) -> str:
    if low == -math.inf:
        return "finite"
    if high == math.inf:
        return f"above {low:g} and finite" if above else f"at least {low:g} and finite"
    return f"in {'(' if above else '['}{low:g}, {high:g}]"


def _number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """Returns `value` as a float in [low, high], or (low, high] if `above`; raises ValueError otherwise."""
    accepted = f"{name} must be a number {_range_text(low, high, above)}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{accepted}, got {quote(value)}")
    try:
        result = float(value)
    except OverflowError:  # of an integer
        result = math.inf
    if not math.isfinite(result) or not low <= result <= high or (above and result == low):
        raise ValueError(f"{accepted}, got {quote(value)}")
    return result


def _integer(name: str, value: Any, low: int, high: int | None = None, *, note: str = "") -> int:
    """Returns `value` as an int of [low, high]; raises ValueError otherwise (bools and floats included)."""
    accepted = f"at least {low}" if high is None else f"in [{low}, {high}]"
    accepted = f"{name} must be an integer {accepted}" + (f" ({note})" if note else "")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{accepted}, got {quote(value)}")
    result = int(value)
    if result < low or (high is not None and result > high):
        raise ValueError(f"{accepted}, got {quote(value)}")
    return result


def _num_logprobs(name: str, value: Any) -> int | None:
    """True means 1 and False means none, as a yes-or-no answer would."""
    if value is None or value is False:
        return None
    return 1 if value is True else _integer(name, value, -1, note="-1 means the whole vocabulary")


def _strings(name: str, values: Any) -> list[str]:
    if values is None:
        return []
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of strings, got {quote(values)}")
    result = list(values)
    for value in result:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} must hold strings that are not empty, got {quote(value)}")
        _check_unicode(name, value)
    return list(dict.fromkeys(result))


def _check_unicode(name: str, text: str) -> None:
    if text.isascii():  # known of every string, without a look at it
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {quote(text)} is not valid Unicode: half of a surrogate pair") from error


def _token_ids(name: str, values: Any) -> list[int]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of token ids, got {quote(values)}")
    result = list(values)
    # Lists can be long: one look at all the types, and at each value only if there is any but int.
    if not set(map(type, result)) <= {int} or min(result, default=0) < 0:
        result = [_integer(f"{name}: a token id", value, 0) for value in result]
    return list(dict.fromkeys(result))


def _clamped_logit_bias(values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise ValueError(f"logit_bias must be a dict of token id to bias, got {quote(values)}")
    result: dict[int, float] = {}
    for key, bias in values.items():
        # JSON objects have string keys.
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key
        token_id = _integer("logit_bias: a token id", token_id, 0)
        infinite = isinstance(bias, float) and math.isinf(bias)
        value = bias if infinite else _number(f"logit_bias[{token_id}]", bias, -math.inf)
        result[token_id] = min(LOGIT_BIAS_LIMIT, max(-LOGIT_BIAS_LIMIT, value))
    return result
