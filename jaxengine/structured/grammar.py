"""From what a user asks of an output's form to a matcher that says which tokens may come next (llguidance)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypedDict

from jaxengine.request import Grammar
from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.structured.cache import SizedCache
from jaxengine.structured.json_schema import close, enforce_formats

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NUM_COMPILED = 64
COMPILED_BYTES = 32 * 2**20
"""Compiled grammars kept, those used last, and the memory that they may take."""
WHITESPACE = r"[ \t]{1,64}|\r?\n[ \t]{0,64}"
"""Between the parts of JSON: enough to indent it, and no more, or a model can write newlines for ever."""


def grammar_text(params: StructuredOutputsParams) -> str:
    """Returns the grammar in llguidance's own form, which is text and can be sent.

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


BYTES_A_CHARACTER = 100
"""Memory that a compiled grammar takes for each of its characters, where nobody has measured it: a large estimate."""


class GrammarCompiler:
    """Makes matchers of grammars for one model's tokens. Its methods may be called from several threads."""

    def __init__(self, get_tokenizer: Callable[[], Any], vocab_size: int = 0, eos_token_ids: Iterable[int] = ()):
        """Nothing is loaded before the first grammar.

        Args:
            get_tokenizer: Gives the model's tokenizer, or a `TokenizerSetup`.
            vocab_size: Columns of the logits; those that no token belongs to are never allowed.
            eos_token_ids: Allowed where the output may end.
        """
        self._get_tokenizer, self._vocab_size, self._eos_token_ids = get_tokenizer, vocab_size, list(eos_token_ids)
        self._compiled: SizedCache[LLMatcher] = SizedCache(COMPILED_BYTES, NUM_COMPILED)

    @functools.cached_property
    def tokenizer(self) -> LLTokenizer:
        """The model's tokens as llguidance knows them.

        Raises:
            ValueError: See `tokenizer_setup`.
        """
        from llguidance import LLTokenizer

        found = self._get_tokenizer()
        setup = found if isinstance(found, dict) else tokenizer_setup(found, self._vocab_size, self._eos_token_ids)
        return LLTokenizer(setup["tokenizer"], n_vocab=setup["num_tokens"], eos_token=setup["eos_token_ids"])

    def matcher(self, grammar: Grammar | str) -> LLMatcher:
        """Returns a new matcher of an output that has not begun.

        Raises:
            ValueError: The grammar is wrong, and why.
        """
        return self.compile(grammar).deep_copy()

    def compile(self, grammar: Grammar | str) -> LLMatcher:
        """Returns what `matcher` copies; kept for the next request with this grammar."""
        grammar = Grammar(grammar, BYTES_A_CHARACTER * len(grammar)) if isinstance(grammar, str) else grammar
        compiled = self._compiled.get(grammar.text)
        if compiled is None:
            compiled = self.compile_anew(grammar.text)
            self._compiled.put(grammar.text, compiled, grammar.num_bytes)
        return compiled

    def compile_anew(self, text: str) -> LLMatcher:
        """Compiles a grammar (see `grammar_text`) and keeps nothing of it.

        Raises:
            ValueError: The grammar is wrong, and why.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer, text, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher


class TokenizerSetup(TypedDict):
    """What a `GrammarCompiler` needs to know of a model's tokens; it can be sent as JSON.

    Attributes:
        tokenizer: Of the tokenizers library, as JSON.
        num_tokens: Columns of the logits, or tokens if there are more; a column that no token belongs to is never
            allowed.
        eos_token_ids: Allowed where the output may end.
    """

    tokenizer: str
    num_tokens: int
    eos_token_ids: list[int]


def tokenizer_setup(tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int]) -> TokenizerSetup:
    """Takes from a tokenizer what grammars need.

    Raises:
        ValueError: The model has none, or one that only Python code knows, or no token that ends an output.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        what = "there is none" if tokenizer is None else f"this one is a {type(tokenizer).__name__}"
        raise ValueError(f"a tokenizer of the tokenizers library is needed: {what}")
    ids = list(eos_token_ids) or [tokenizer.eos_token_id]
    if ids == [None]:
        raise ValueError("a token that ends the output is needed, and the model names none")
    num_tokens = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))
    return {"tokenizer": _plain(backend).to_str(), "num_tokens": num_tokens, "eos_token_ids": ids}


def _plain(backend: Any) -> Any:
    """Returns a copy of a `tokenizers.Tokenizer` that neither pads nor cuts."""
    copy = type(backend).from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
