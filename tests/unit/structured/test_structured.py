"""Grammars for every kind of tokenizer."""

import pytest

from jaxengine.loading.gguf_tokenizer import gguf_tokenizer
from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.structured.grammar import Grammar, GrammarCompiler, grammar_text, tokenizer_setup
from tests.unit.loading.test_gguf_tokenizer import byte_level_metadata, spm_metadata


@pytest.mark.parametrize("metadata", [byte_level_metadata(merges=("h e",)), spm_metadata()], ids=["bytes", "pieces"])
def test_tokens_of_a_text_are_accepted(metadata):
    tokenizer = gguf_tokenizer(metadata, "f")
    assert tokenizer.eos_token_id is not None
    compiler = GrammarCompiler(lambda: tokenizer_setup(tokenizer, len(tokenizer) + 100, []))
    text = ' the "cell", é🙂'
    matcher = compiler.matcher(Grammar(grammar_text(StructuredOutputsParams(choice=["other", text])), 1))
    token_ids = tokenizer.encode(text.removeprefix(" ") if len(metadata) == 4 else text, add_special_tokens=False)
    for token_id in token_ids:
        assert not matcher.is_accepting()
        assert matcher.consume_token(token_id), tokenizer.convert_ids_to_tokens(token_id)
    assert matcher.is_accepting()
    assert matcher.consume_token(tokenizer.eos_token_id)
    again = compiler.matcher(Grammar(grammar_text(StructuredOutputsParams(choice=["other", text])), 1))
    assert again.consume_token(token_ids[0])


def test_models_without_what_is_needed():
    class Slow:
        """A tokenizer that is Python code."""

    for tokenizer, message in ((None, "there is none"), (Slow(), "a Slow")):
        with pytest.raises(ValueError, match=message):
            tokenizer_setup(tokenizer, 10, [1])


def test_properties_that_a_schema_does_not_name():
    inner = {"properties": {"a": {"enum": [{"properties": {}}]}}}
    schema = {"items": inner, "anyOf": [{"properties": {}, "additionalProperties": True}]}
    text = grammar_text(StructuredOutputsParams(json=schema, disable_additional_properties=True))
    assert text.count('"additionalProperties": false') + text.count('"additionalProperties":false') == 1
