"""From what a user asks of an output's form to a matcher that says which tokens may come next (llguidance)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.structured.json_schema import close, enforce_formats

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NUM_COMPILED = 64
"""Compiled grammars kept, those used last."""
WHITESPACE = r"[ \t]{1,64}|\r?\n[ \t]{0,64}"
"""Between the parts of JSON: enough to indent it, and no more, or a model can write newlines for ever."""


def grammar_text(params: StructuredOutputsParams) -> str:
    """The grammar in llguidance's own form, which is text and can be sent.

    Raises:
        ValueError: A grammar in GBNF that cannot be read.
    """
    from llguidance import LLMatcher, grammar_from

    if params.json_object or params.json is not None:
        schema = params.json if params.json is not None else {"type": "object"}
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if params.disable_additional_properties:
            schema = close(schema)
        schema = enforce_formats(schema)
        options: Any = {"whitespace_flexible": not params.disable_any_whitespace}
        if not params.disable_any_whitespace:
            options["whitespace_pattern"] = params.whitespace_pattern or WHITESPACE
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, params.choice)))
    assert params.grammar is not None
    return grammar_from("grammar", params.grammar)


class GrammarCompiler:
    """Makes matchers of grammars for one model's tokens. Its methods may be called from several threads."""

    def __init__(self, get_tokenizer: Callable[[], Any], vocab_size: int, eos_token_ids: Iterable[int]):
        """Nothing is loaded before the first grammar.

        Args:
            get_tokenizer: Gives the model's tokenizer, or None.
            vocab_size: Columns of the logits; those that no token belongs to are never allowed.
            eos_token_ids: Allowed where the output may end.
        """
        self._get_tokenizer = get_tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self.compile = functools.lru_cache(NUM_COMPILED)(self._compile)

    @functools.cached_property
    def tokenizer(self) -> LLTokenizer:
        """The model's tokens as llguidance knows them.

        Raises:
            ValueError: The model has none, or ones that only Python code knows, or no token that ends an output.
        """
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        tokenizer = self._get_tokenizer()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            what = "there is none" if tokenizer is None else f"this one is a {type(tokenizer).__name__}"
            raise ValueError(f"a tokenizer of the tokenizers library is needed: {what}")
        eos_token_ids = self._eos_token_ids or [tokenizer.eos_token_id]
        if eos_token_ids == [None]:
            raise ValueError("a token that ends the output is needed, and the model names none")
        num_tokens = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(_plain(backend).to_str(), n_vocab=num_tokens, eos_token=eos_token_ids)

    def matcher(self, grammar: str) -> LLMatcher:
        """A new matcher of an output that has not begun.

        Args:
            grammar: See `grammar_text`.

        Raises:
            ValueError: The grammar is wrong, and why.
        """
        return self.compile(grammar).deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        """What `matcher` copies; kept for the next request with this grammar."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher


def _plain(backend: Any) -> Any:
    """A copy of a `tokenizers.Tokenizer` that neither pads nor cuts."""
    copy = type(backend).from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
