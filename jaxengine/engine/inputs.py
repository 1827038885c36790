"""Prompts in, `Request`s out: tokenising, and all checks, before anything runs."""

from __future__ import annotations

import copy
import functools
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxengine.engine.chat import normalize_conversations, render_chat
from jaxengine.engine.prompts import Prompt, PromptInput, normalize_prompt, normalize_prompts
from jaxengine.engine.prompts import at as _at
from jaxengine.messages import quote
from jaxengine.request import Grammar, Request, RequestSpec
from jaxengine.sampling_params import MAX_BAD_WORD_LEN, MAX_BAD_WORDS, SamplingParams
from jaxengine.workers.grammars import GrammarChecker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_TEXT = 2**16
"""Characters of a text that is tokenised without asking first whether that can be of use."""
TEXT_PIECE = 2**15
"""Characters of the pieces in which the tokens of a longer text are counted."""
MAX_TRUNCATION = 4
"""How many times as long as `max_model_len` a text may be of which `truncate_prompt_tokens` keeps the end."""

__all__ = [
    "InputProcessor",
    "ProcessedInput",
    "Prompt",
    "PromptInput",
    "normalize_conversations",
    "normalize_prompts",
    "render_chat",
]


@dataclass
class ProcessedInput:
    """What the engine adds for one prompt.

    Attributes:
        prompt_text: The prompt's text, if it was given one.
        spec: What is asked, checked. The parameters of all specs of a call share lists and dicts.
        children: One `Request` for each of the `n` completions.
    """

    prompt_text: str | None
    spec: RequestSpec
    children: list[Request]

    @property
    def request_id(self) -> str:
        """The id the caller knows."""
        return self.spec.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's token ids, truncated if asked for."""
        return self.spec.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        """The checked parameters of the whole request."""
        return self.spec.sampling_params


@dataclass
class _Checked:
    """What is made of parameters once, for all prompts of a call that have them."""

    params: SamplingParams
    grammar: Grammar | None
    stop_token_ids: frozenset[int]


class InputProcessor:
    """Makes checked `Request`s of prompts and parameters.

    Args:
        tokenizer: None if prompts are token ids only and nothing is detokenised.
        vocab_size: Rows of the model's embedding table: token ids are below it.
        max_model_len: Tokens of prompt and output together at most.
        max_logprobs: Largest `logprobs` and `prompt_logprobs`; -1 means no limit.
        eos_token_ids: Tokens that end the output unless `ignore_eos`.
        default_params: Used where a caller gives None.
        max_bad_words: See `MAX_BAD_WORDS`.
        max_bad_word_len: See `MAX_BAD_WORD_LEN`.
        grammars: Checks the grammars of structured outputs; None if there are none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        vocab_size: int,
        max_model_len: int,
        max_logprobs: int = 20,
        eos_token_ids: Iterable[int] = (),
        default_params: SamplingParams | None = None,
        max_bad_words: int = MAX_BAD_WORDS,
        max_bad_word_len: int = MAX_BAD_WORD_LEN,
        grammars: GrammarChecker | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_logprobs = max_logprobs
        self.eos_token_ids = frozenset(eos_token_ids)
        self.default_params = default_params or SamplingParams()
        self.max_bad_words = max_bad_words
        self.max_bad_word_len = max_bad_word_len
        self._grammars = grammars

    def process_batch(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Callable[[int], str] | Sequence[str],
        priority: int | Sequence[int] | None = None,
        arrival_time: float = 0.0,
    ) -> list[ProcessedInput]:
        """Makes the requests of a call of `generate`: of all prompts, or, if one is wrong, of none.

        Args:
            prompts: One prompt or many.
            params: One for all prompts, or one each; None means the default.
            request_ids: An id for each prompt, or a function of its place.
            priority: One for all prompts, or one each; None means 0.
            arrival_time: Seconds.

        Raises:
            ValueError: Says which prompt, field and value is wrong.
        """
        normal = normalize_prompts(prompts)
        num = len(normal)
        all_params = self._one_each("sampling_params", params, num, SamplingParams)
        priorities = self._one_each("priority", priority, num, numbers.Integral)
        ids = [request_ids(i) for i in range(num)] if callable(request_ids) else list(request_ids)
        if len(ids) != num:
            raise ValueError(f"request_ids must be as many as the prompts ({num}), got {len(ids)}")
        for form in {id(p): p.structured_outputs for p in all_params if p is not None}.values():
            if form is not None and self._grammars is not None:
                _at("structured_outputs", self._grammars.begin, form)  # all at once, not one after the other
        results = []
        checked: dict[int, _Checked] = {}  # by the identity of the parameters
        for i, prompt in enumerate(normal):
            where = f"prompts[{i}]" if num > 1 else "prompt"
            key = id(all_params[i])
            if key not in checked:
                checked[key] = _at(where, self._checked, all_params[i])
            results.append(_at(where, self._make, ids[i], prompt, checked[key], int(priorities[i] or 0), arrival_time))
        return results

    def process(
        self,
        request_id: str,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        priority: int = 0,
        arrival_time: float = 0.0,
        cache_salt: str | None = None,
    ) -> list[Request]:
        """Makes the `n` requests of one prompt: see `process_one`."""
        return self.process_one(request_id, prompt, params, priority, arrival_time, cache_salt).children

    def process_one(
        self,
        request_id: str,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        priority: int = 0,
        arrival_time: float = 0.0,
        cache_salt: str | None = None,
    ) -> ProcessedInput:
        """Tokenises and checks one prompt and its parameters; neither is changed.

        Raises:
            ValueError: Names the field and the value that is wrong.
        """
        normal = normalize_prompt(prompt)
        return self._make(request_id, normal, self._checked(params), priority, arrival_time, cache_salt)

    def _checked(self, params: SamplingParams | None) -> _Checked:
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {quote(params)}")
        params = params.clone()
        self._check_params(params)
        params.bad_words_token_ids = self._tokenize_bad_words(params.bad_words or [])
        stop_token_ids = frozenset(params.stop_token_ids or ()) | (
            frozenset() if params.ignore_eos else self.eos_token_ids
        )
        return _Checked(params, self._grammar(params), stop_token_ids)

    def _make(
        self,
        request_id: str,
        prompt: Prompt,
        checked: _Checked,
        priority: int,
        arrival_time: float,
        cache_salt: str | None = None,
    ) -> ProcessedInput:
        params = copy.copy(checked.params)
        token_ids = self._prompt_token_ids(prompt, params)
        room = self.max_model_len - len(token_ids)
        spec = RequestSpec(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling_params=params,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            stop_token_ids=checked.stop_token_ids,
            priority=priority,
            arrival_time=arrival_time,
            cache_salt=prompt.cache_salt if cache_salt is None else cache_salt,
            grammar=checked.grammar,
        )
        return ProcessedInput(prompt.text, spec, [Request.of(own) for own in spec.completions()])

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Raises:
            ValueError: There is no tokenizer, or the text is not valid Unicode (half of a surrogate pair, from JSON).
        """
        if self.tokenizer is None:
            raise ValueError(f"prompt={quote(text)}: there is no tokenizer; give prompt_token_ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt is not valid Unicode: half of a surrogate pair at {error.start}") from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    @property
    def max_characters(self) -> int:
        """Characters of the longest text that may be tokenised at all."""
        return max(MAX_TRUNCATION * self.max_model_len * self._longest_token, LONG_TEXT)

    def check_length(self, text: str, *, times: int = 1) -> None:
        """Checks that a text may have as few tokens as fit, before it is tokenised: that takes long and much memory.

        It cannot if it has more characters than so many of the longest tokens; and it does not if its pieces have twice
        as many tokens, which they are counted for from the beginning until they do.

        Args:
            text: The text.
            times: It may have so many times `max_model_len` tokens.

        Raises:
            ValueError: It has too many.
        """
        if len(text) <= LONG_TEXT or self.tokenizer is None:
            return
        advice = f"max_model_len={self.max_model_len} leaves room for {self.max_model_len - 1} and one output token"
        advice += "; shorten it" if times > 1 else "; shorten it or set truncate_prompt_tokens"
        num_tokens = times * self.max_model_len
        if len(text) > num_tokens * self._longest_token:
            longest = f"tokens of at most {self._longest_token} characters"
            raise ValueError(f"the prompt has {len(text)} characters in {longest}, but {advice}")
        if len(text) <= 8 * num_tokens:  # as texts of usual tokens have
            return
        num_counted = 0
        for start in range(0, len(text), TEXT_PIECE):
            piece = text[start : start + TEXT_PIECE]
            num_counted += len(self.tokenizer.encode(piece, add_special_tokens=False))
            if num_counted > 2 * num_tokens:
                raise ValueError(f"the prompt has more than {num_tokens} tokens, but {advice}")

    @functools.cached_property
    def _longest_token(self) -> int:
        """Characters of the vocabulary's longest token, as it spells it, which is no shorter than its text."""
        tokenizer: Any = self.tokenizer
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        return max(map(len, vocabulary), default=2**10)

    @staticmethod
    def _one_each(name: str, values: Any, num: int, kind: type) -> list[Any]:
        """Spreads one value over `num` prompts, or checks that a list has one for each."""
        if values is None or isinstance(values, kind):
            return [values] * num
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise ValueError(f"{name} must be {kind.__name__} or a list of them, got {quote(values)}")
        if len(values) != num:
            raise ValueError(f"{name} must be one for all prompts or one each: got {len(values)} for {num} prompts")
        for value in values:
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be {kind.__name__} or a list of them, got {quote(value)} in the list")
        return list(values)

    def _prompt_token_ids(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        token_ids = prompt.token_ids
        if token_ids is None:
            assert prompt.text is not None
            self.check_length(prompt.text, times=1 if params.truncate_prompt_tokens is None else MAX_TRUNCATION)
            token_ids = self.tokenize(prompt.text, add_special_tokens=prompt.add_special_tokens)
        if not token_ids:
            given = "prompt_token_ids=[]" if prompt.token_ids is not None else f"prompt={quote(prompt.text)}"
            raise ValueError(f"{given}: a prompt must have at least one token")
        self._check_in_vocabulary("prompt_token_ids", token_ids)
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-self._num_kept(params) :]
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len={self.max_model_len} leaves room for "
                f"{self.max_model_len - 1} and one output token; shorten it or set truncate_prompt_tokens"
            )
        return token_ids

    def _num_kept(self, params: SamplingParams) -> int:
        """Tokens of the prompt that `truncate_prompt_tokens` keeps; for -1 all that leave room for `max_tokens`."""
        num_kept = params.truncate_prompt_tokens
        assert num_kept is not None
        if num_kept == -1:
            return max(1, self.max_model_len - (params.max_tokens or 1))
        if num_kept >= self.max_model_len:
            raise ValueError(
                f"truncate_prompt_tokens must be below max_model_len={self.max_model_len}, or -1, got {num_kept}"
            )
        return num_kept

    def _check_params(self, params: SamplingParams) -> None:
        # A parameter object may have been changed since it was made, which checks nothing by itself.
        params.__post_init__()
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            asked = self.vocab_size if value == -1 else value
            if asked is not None and self.max_logprobs != -1 and asked > self.max_logprobs:
                raise ValueError(
                    f"{name} must be at most max_logprobs={self.max_logprobs}, got {value}"
                    + (f" (the whole vocabulary, {self.vocab_size})" if value == -1 else "")
                )
        self._check_in_vocabulary("stop_token_ids", params.stop_token_ids or ())
        self._check_in_vocabulary("allowed_token_ids", params.allowed_token_ids or ())
        self._check_in_vocabulary("logit_bias", params.logit_bias or ())
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={quote(params.stop)}: there is no tokenizer to make text to search in")

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        """The grammar of structured outputs, looked at once here so that a wrong one is told before anything runs."""
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            raise ValueError("structured_outputs: there is no tokenizer")
        return _at("structured_outputs", self._grammars.grammar, params.structured_outputs)

    def _check_in_vocabulary(self, name: str, token_ids: Iterable[int]) -> None:
        # min and max: prompts are long, and this is on the way to the first token.
        lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{name}: token ids must be in [0, {self.vocab_size}), got {wrong}")

    def _tokenize_bad_words(self, words: Iterable[str]) -> list[list[int]]:
        """Returns the token sequences of words, each as it is at the beginning of a text and after a space.

        The form after a space counts only if it is as long and begins with another token, as in vLLM: a tokenizer that
        writes the space as a token of its own would otherwise ban what follows that token.
        """
        sequences: list[list[int]] = []
        for word in words:
            if self.tokenizer is None:
                raise ValueError(f"bad_words: {quote(word)} needs a tokenizer, and there is none")
            if len(word) > LONG_TEXT:
                raise ValueError(f"bad_words: {quote(word)} has {len(word)} characters: it has too many tokens")
            bare, spaced = (
                list(self.tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " ")
            )
            if not bare:
                raise ValueError(f"bad_words: {quote(word)} has no tokens")
            forms = [bare]
            if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
                forms.append(spaced)
            for form in forms:
                if len(form) > self.max_bad_word_len:
                    raise ValueError(
                        f"bad_words: {quote(word)} has {len(form)} tokens, "
                        f"at most {self.max_bad_word_len} are supported"
                    )
                if form not in sequences:
                    sequences.append(form)
        if len(sequences) > self.max_bad_words:
            raise ValueError(
                f"bad_words make {len(sequences)} token sequences (a word may make two), "
                f"at most {self.max_bad_words} are supported"
            )
        return sequences
