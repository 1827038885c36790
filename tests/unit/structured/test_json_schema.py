"""Changes to JSON schemas before they become grammars, and what these then accept."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxengine.loading.resolve import resolve_model
from jaxengine.sampling_params import StructuredOutputsParams
from jaxengine.structured.grammar import GrammarCompiler, grammar_text, tokenizer_setup
from jaxengine.structured.json_schema import close, enforce_formats, relocate, rewrite

A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
SUITE = Path(__file__).parent / "data" / "json_schema_suite.json.gz"
"""Draft 2020-12 of https://github.com/json-schema-org/JSON-Schema-Test-Suite, commit 44401e0c; MIT, by J. Berman."""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = resolve_model(None).tokenizer()
    return GrammarCompiler(lambda: tokenizer_setup(tokenizer, 49152, [2, 0]))


def accepts(compiler: GrammarCompiler, texts: list[str], schema: Any, **options: Any) -> list[bool]:
    """Which texts a schema takes."""
    params = StructuredOutputsParams(json=json.dumps(schema), **options)
    first = compiler.compile_anew(grammar_text(params))
    tokenizer = Tokenizer.from_str(compiler._get_tokenizer()["tokenizer"])
    taken = []
    for text in texts:
        matcher, ids = first.deep_copy(), tokenizer.encode(text, add_special_tokens=False).ids
        taken.append(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())
    return taken


KEYWORDS = ("default", "enum", "const", "examples", "properties", "items", "$ref", "$defs", "not", "format", "allOf")


@pytest.mark.parametrize("name", ["other", *KEYWORDS, "patternProperties", "additionalProperties", "definitions"])
def test_a_property_may_have_the_name_of_a_keyword(compiler, name):
    """It is closed as any other is, and so is a definition with such a name."""
    texts = ['{"x":{"a":1}}'.replace("x", name), '{"x":{"a":1,"z":1}}'.replace("x", name), '{"a":1}']
    for schema in (
        {"type": "object", "properties": {name: A}},
        {"type": "object", "properties": {name: {"$ref": f"#/$defs/{name}"}}, "$defs": {name: A}},
    ):
        got = accepts(compiler, texts, schema, disable_additional_properties=True)
        assert got == [True, False, name == "a"]


@pytest.mark.parametrize("keyword", ["const", "default", "enum", "examples"])
def test_what_looks_like_a_schema_in_data_is_none(keyword):
    value = [A] if keyword in ("enum", "examples") else A
    assert close({keyword: value}) == {keyword: value}
    assert close({"properties": {"x": {keyword: value}}})["properties"] == {"x": {keyword: value}}


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"allOf": [A, B]}, ['{"a":1,"b":2}'], ['{"a":1}', '{"a":1,"b":2,"c":3}']),
        ({"anyOf": [A, B]}, ['{"a":1}', '{"b":2}'], ['{"a":1,"b":2}', '{"a":1,"c":3}']),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, ['{"a":1}'], ['{"a":1,"c":3}']),
        ({"$ref": "#/$defs/A", "properties": B["properties"], "$defs": {"A": A}}, ['{"a":1,"b":2}'], ['{"a":1,"c":3}']),
        ({"allOf": [{"$ref": "#/$defs/A"}], "$defs": {"A": A}}, ['{"a":1}'], ['{"a":1,"c":3}']),
        (
            A | {"properties": A["properties"] | {"n": {"$ref": "#"}}},
            ['{"a":1,"n":{"a":2}}'],
            ['{"a":1,"n":{"a":2,"c":3}}'],
        ),
        ({"type": "object", "patternProperties": {"^a": True}}, ['{"ab":1}', "{}"], ['{"b":1}']),
        (A | {"additionalProperties": True}, ['{"a":1,"c":3}'], ["{}"]),
        (
            {"properties": {"k": True}, "anyOf": [A, B], "type": "object"},
            ['{"k":1,"a":1}', '{"k":1,"b":1}'],
            ['{"k":1}'],
        ),
        ({"type": "array", "items": A}, ['[{"a":1}]'], ['[{"a":1,"c":3}]']),
        ({"type": "array", "prefixItems": [A], "items": B}, ['[{"a":1},{"b":1}]'], ['[{"a":1},{"b":1,"c":3}]']),
    ],
)
def test_closed_schemas_allow_what_they_name(compiler, schema, taken, refused):
    got = accepts(compiler, taken + refused, schema, disable_additional_properties=True, disable_any_whitespace=True)
    assert got == [True] * len(taken) + [False] * len(refused)


def test_one_object_at_two_places_is_two_schemas():
    shared = dict(A)
    closed = close({"properties": {"x": shared, "y": {"allOf": [shared, B]}}})
    assert closed["properties"]["x"]["additionalProperties"] is False
    assert "additionalProperties" not in closed["properties"]["y"]["allOf"][0]


def test_references_hold_elsewhere(compiler):
    parts = {
        "n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        "u": {"$ref": "#/$defs/U"},
        "v": {"$ref": "#/definitions/V"},
        "w": {"$ref": "#/properties/u"},
        "$ref": {"type": "integer"},
    }
    fields = {"properties": parts, "required": list(parts), "additionalProperties": False}
    whole = {"type": "object", **fields, "$defs": {"U": {"enum": ["a"]}}, "definitions": {"V": {"enum": ["b"]}}}
    other = {"type": "object", "properties": {"u": {"$ref": "#/$defs/U"}}, "$defs": {"U": {"enum": ["c"]}}}
    both = {"0": relocate(whole, "/$defs/0"), "1": relocate(other, "/$defs/1")}
    text = '{"n":null,"u":"a","v":"b","w":"a","$ref":1}'
    schema = {"$ref": "#/$defs/0", "$defs": both}
    nested = text.replace("null", text)
    assert accepts(compiler, [text, nested, text.replace('"a"', '"c"')], schema) == [True, True, False]
    assert accepts(compiler, ['{"u":"c"}', '{"u":"a"}'], {"$ref": "#/$defs/1", "$defs": both}) == [True, False]


FORMATS = {
    "date": (["2024-02-29", "2000-02-29", "2021-12-31"], ["2021-02-29", "1900-02-29", "2021-04-31", "2021-13-01", "x"]),
    "time": (
        ["23:59:60Z", "12:00:00.5+01:30", "23:59:60.25z"],
        ["22:59:60Z", "23:59:60+01:00", "24:00:00Z", "12:00:00"],
    ),
    "date-time": (["2024-02-29T12:00:00Z"], ["2023-02-29T12:00:00Z", "2024-02-29T12:00:60Z", "2024-02-29"]),
    "hostname": (
        ["a", "a-b.c1", "x" * 63 + ".de"],
        ["", "-a", "a-", "x" * 64, "ab--c", ".".join(["x" * 63] * 4), "a..b"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_enforced(compiler, name):
    for texts, want in zip(FORMATS[name], (True, False), strict=True):
        got = accepts(compiler, [json.dumps(text) for text in texts], {"type": "string", "format": name})
        assert got == [want] * len(texts), texts
    texts, _ = FORMATS[name]
    also = {"type": "string", "format": name, "pattern": "2", "allOf": [{"minLength": 2}]}
    assert accepts(compiler, [json.dumps(text) for text in texts], also) == ["2" in text for text in texts]


def test_white_space_is_bounded(compiler):
    nested = json.dumps([[[{"a": [1, {"a": 2}]}]]], indent=8)
    texts = [nested, json.dumps({"a": 1}), "{\n\n\n\n" + '"a":1}', "{" + " " * 80 + '"a":1}']
    assert accepts(compiler, texts, {}) == [True, True, False, False]


@pytest.mark.parametrize("depth", [50, 3000, 100_000])
def test_schemas_may_be_nested_deeply(depth):
    schema: Any = {"format": "date", "properties": {"a": True}}
    for _ in range(depth):
        schema = {"items": schema}
    for change in (close, enforce_formats, lambda found: relocate(found, "/$defs/a")):
        changed, num = change(schema), 0
        while "items" in changed:
            changed, num = changed["items"], num + 1
        assert num == depth
    while "items" in schema:  # Python frees what is nested so deeply by recursion
        schema = schema.pop("items")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYWORDS, "pattern", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_no_schema_is_too_odd_to_be_changed(value):
    """Whatever stands where a schema should: what is no schema stays, and what was given is not changed."""
    before = json.dumps(value)
    for change in (close, enforce_formats, lambda found: relocate(found, "/x")):
        change(value)
        assert json.dumps(value) == before
    assert rewrite(value, lambda found: {}) == value


@pytest.mark.slow
def test_nothing_that_the_suite_calls_invalid_is_taken(compiler):
    """What a keyword or format that cannot be enforced is in is refused; the rest is as strict as it must be."""
    counts: dict[tuple[bool, bool], int] = {}
    wrong = []
    for name, groups in json.loads(gzip.decompress(SUITE.read_bytes())).items():
        for group in groups:
            try:
                accepts(compiler, [], group["schema"])
            except ValueError:
                continue
            texts = [json.dumps(data, ensure_ascii=False) for data, _ in group["tests"]]
            for (data, valid), taken in zip(group["tests"], accepts(compiler, texts, group["schema"]), strict=True):
                counts[valid, taken] = counts.get((valid, taken), 0) + 1
                wrong += [(name, group["schema"], data)] if taken and not valid else []
    assert not wrong
    assert counts[False, False] > 400
    assert counts[True, True] > 450
