"""JSON schemas that are hard to compile, or to follow, or no schemas."""

from __future__ import annotations

import math
from typing import Any

from tests.server.hostile.table import Attack, in_turn


def ref_chain(length: int, place: str = "$defs") -> dict[str, Any]:
    rules: dict[str, Any] = {f"r{i}": {"$ref": f"#/{place}/r{i + 1}"} for i in range(length)}
    return {"$ref": f"#/{place}/r0", place: rules | {f"r{length}": {"type": "integer"}}}


def property_chain(length: int) -> dict[str, Any]:
    rules: dict[str, Any] = {
        f"r{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/r{i + 1}"}}, "required": ["a"]}
        for i in range(length)
    }
    return {"$ref": "#/$defs/r0", "$defs": rules | {f"r{length}": {"type": "integer"}}}


def choice_chain(length: int, word: str) -> dict[str, Any]:
    rules: dict[str, Any] = {f"r{i}": {word: [{"$ref": f"#/$defs/r{i + 1}"}, {"type": "null"}]} for i in range(length)}
    return {"$ref": "#/$defs/r0", "$defs": rules | {f"r{length}": {"type": "integer"}}}


def bomb(depth: int, fan: int, word: str) -> dict[str, Any]:
    """Each rule names the next one `fan` times."""
    rules: dict[str, Any] = {f"r{i}": {word: [{"$ref": f"#/$defs/r{i + 1}"}] * fan} for i in range(depth)}
    last = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4)}}
    return {"$ref": "#/$defs/r0", "$defs": rules | {f"r{depth}": last}}


def wide_bomb(depth: int, fan: int) -> dict[str, Any]:
    """The same by properties."""
    rules: dict[str, Any] = {
        f"r{i}": {"type": "object", "properties": {f"p{j}": {"$ref": f"#/$defs/r{i + 1}"} for j in range(fan)}}
        for i in range(depth)
    }
    return {"$ref": "#/$defs/r0", "$defs": rules | {f"r{depth}": {"type": "integer"}}}


def patterns(number: int) -> dict[str, Any]:
    found = [{"pattern": f"^(.*{chr(97 + i % 26)}.*){{{i // 26 + 1}}}$"} for i in range(number)]
    return {"type": "string", "allOf": found}


def nested(depth: int, key: str, wrap: str = "object") -> Any:
    """A schema within a schema: made from the inside, because json's own writer stops at a thousand."""
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        match wrap:
            case "object":
                schema = {key: schema}
            case "list":
                schema = {key: [schema]}
            case _:
                schema = {key: {"a": schema}}
    return schema


def _enum_of(number: int, length: int) -> dict[str, Any]:
    return {"enum": [f"{i:0{length}d}" for i in range(number)]}


def _properties(number: int) -> dict[str, Any]:
    names = [f"p{i}" for i in range(number)]
    return {"type": "object", "properties": {name: {"type": "integer"} for name in names}, "required": names}


REFERENCES = {
    **{f"chain_{n}": (lambda n=n: ref_chain(n)) for n in (500, 5_000, 50_000)},
    "chain_definitions": lambda: ref_chain(5_000, "definitions"),
    "chain_elsewhere": lambda: ref_chain(5_000, "x-rules"),
    "chain_properties": lambda: property_chain(5_000),
    **{f"chain_{word}": (lambda word=word: choice_chain(5_000, word)) for word in ("anyOf", "oneOf", "allOf")},
    "circle_of_one": lambda: {"$ref": "#"},
    "circle_of_two": lambda: {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "circle_allof": lambda: {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"minimum": 1}]}}},
    "circle_required": lambda: {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "long_pointer": lambda: {"$ref": "#" + "/a" * 1_000_000},
    "pointer_into_it": lambda: {"$ref": "#/$defs/a/$ref/$ref", "$defs": {"a": {"$ref": "#/$defs"}}},
    "elsewhere": lambda: {"$ref": "http://127.0.0.1:1/schema.json"},
    "of_a_file": lambda: {"$ref": "file:///etc/passwd"},
    "many": lambda: {"anyOf": [{"$ref": "#/$defs/a"}] * 100_000, "$defs": {"a": {"type": "integer"}}},
}
BOMBS = {
    **{f"{word}_{n}": (lambda n=n, word=word: bomb(n, 2, word)) for word in ("allOf", "anyOf") for n in (16, 30)},
    "oneOf_30": lambda: bomb(30, 2, "oneOf"),
    "allOf_fan_10": lambda: bomb(12, 10, "allOf"),
    "properties_12_10": lambda: wide_bomb(12, 10),
    **{f"patterns_{n}": (lambda n=n: patterns(n)) for n in (8, 26, 200)},
    "not_patterns": lambda: {"type": "string", "allOf": [{"not": {"pattern": f".*{i}.*"}} for i in range(30)]},
    "anyof_in_allof": lambda: {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}, "required": [f"p{i}{j}"]} for j in range(10)]}
            for i in range(12)
        ]
    },
    "lengths_in_allof": lambda: {"type": "string", "allOf": [{"minLength": i, "maxLength": 2_000} for i in range(500)]},
}
NUMBERS = {
    "multiple_of_1000003": lambda: {"type": "integer", "multipleOf": 1000003},
    "multiple_of_2_61": lambda: {"type": "integer", "multipleOf": 2**61 - 1},
    "multiple_of_small": lambda: {"type": "number", "multipleOf": 1e-9},
    "multiple_of_1e300": lambda: {"type": "number", "multipleOf": 1e300},
    "multiple_of_0": lambda: {"type": "number", "multipleOf": 0},
    "multiple_of_negative": lambda: {"type": "integer", "multipleOf": -7},
    "multiples": lambda: {"type": "integer", "allOf": [{"multipleOf": n} for n in (7919, 6841, 5573)]},
    "multiple_in_range": lambda: {"type": "integer", "multipleOf": 99991, "minimum": 3, "maximum": 10**18 + 7},
    "huge_range": lambda: {"type": "integer", "minimum": -(10**400), "maximum": 10**400},
    "huge_float_range": lambda: {"type": "number", "minimum": -1e308, "maximum": 1.7976931348623157e308},
    "empty_range": lambda: {"type": "integer", "minimum": 5, "maximum": 4},
    "nan": lambda: {"type": "number", "minimum": math.nan},
    "infinity": lambda: {"type": "number", "maximum": math.inf, "multipleOf": math.inf},
    "digits": lambda: {"type": "number", "minimum": 0.1234567890123456789, "maximum": 0.123456789012345679},
}
SIZES = {
    **{f"enum_{n}": (lambda n=n: _enum_of(n, 7)) for n in (10_000, 100_000, 1_000_000)},
    "enum_of_long": lambda: _enum_of(10, 1_000_000),
    "enum_of_objects": lambda: {"enum": [{"a": [i, {"b": i}]} for i in range(50_000)]},
    "enums_in_items": lambda: {"type": "array", "prefixItems": [_enum_of(100, 5)] * 1_000, "items": False},
    **{f"max_length_{n}": (lambda n=n: {"type": "string", "maxLength": n}) for n in (10**5, 10**9, 10**30)},
    **{f"min_length_{n}": (lambda n=n: {"type": "string", "minLength": n}) for n in (10**5, 10**9)},
    "min_length_pattern": lambda: {"type": "string", "pattern": "^[a-z ]*$", "minLength": 10**5, "maxLength": 10**6},
    **{f"max_items_{n}": (lambda n=n: {"type": "array", "maxItems": n}) for n in (10**5, 10**9)},
    **{f"min_items_{n}": (lambda n=n: {"type": "array", "minItems": n}) for n in (10**5, 10**9)},
    "items_of_items": lambda: {"type": "array", "minItems": 999, "items": {"type": "array", "minItems": 999}},
    "max_properties": lambda: {"type": "object", "minProperties": 10**6, "maxProperties": 10**9},
    **{f"properties_{n}": (lambda n=n: _properties(n)) for n in (10_000, 100_000)},
    "required_alone": lambda: {"type": "object", "required": [f"r{i}" for i in range(100_000)]},
    "pattern_properties": lambda: {
        "type": "object",
        "patternProperties": {f"^x{i}.*y$": {"type": "integer"} for i in range(3_000)},
    },
    "types": lambda: {"type": ["string", "integer", "object"] * 100_000},
    "const_of_megabytes": lambda: {"const": "x" * 8_000_000},
    "prefix_items": lambda: {"type": "array", "prefixItems": [{"type": "integer"}] * 100_000},
    "description": lambda: {"type": "integer", "description": "x" * 15_000_000},
    "formats": lambda: {"type": "array", "prefixItems": [{"type": "string", "format": "date-time"}] * 20_000},
    "pattern_of_megabytes": lambda: {"type": "string", "pattern": "|".join(f"w{i:06d}" for i in range(200_000))},
    "pattern_repeats": lambda: {"type": "string", "pattern": "^((a{1,300}){1,300}){1,300}$"},
}
WRONG = {
    **{
        f"defs_{name}": (lambda value=value: {"type": "object", "$defs": value})
        for name, value in {
            "null": None,
            "list": [1],
            "string": "x",
            "number": 1,
            "true": True,
            "of_null": {"a": None},
            "of_list": {"a": []},
            "of_number": {"a": 1},
        }.items()
    },
    **{
        name: (lambda schema=schema: schema)
        for name, schema in {
            "properties_list": {"type": "object", "properties": [1]},
            "required_text": {"type": "object", "required": "a"},
            "items_text": {"type": "array", "items": "a"},
            "enum_text": {"enum": "abc"},
            "enum_empty": {"enum": []},
            "type_number": {"type": 5},
            "type_nested": {"type": [["string"]]},
            "ref_number": {"$ref": 5},
            "ref_empty": {"$ref": ""},
            "ref_escapes": {"$ref": "#/$defs/%ZZ~3~"},
            "anyof_object": {"anyOf": {"a": {}}},
            "allof_empty": {"allOf": []},
            "allof_null": {"allOf": [None, False]},
            "pattern_number": {"type": "string", "pattern": 5},
            "pattern_open": {"type": "string", "pattern": "(" * 5_000},
            "max_length_text": {"type": "string", "maxLength": "9"},
            "max_length_negative": {"type": "string", "maxLength": -1},
            "max_items_float": {"type": "array", "maxItems": 1e300},
            "format_list": {"type": "string", "format": ["date"]},
            "lone_surrogate": {"type": "object", "properties": {"\ud800": {"const": "\udfff"}}, "required": ["\ud800"]},
            "null_bytes": {"type": "object", "properties": {"\0": {"enum": ["\0", "\uffff"]}}},
            "const_nan": {"const": math.nan},
            "private_keys": {"x-guidance": {"whitespace_pattern": "(", "lazy": 5, "item_separator": 5}},
            "grammars_key": {"grammars": [{"lark_grammar": "start: start"}]},
        }.items()
    },
}
DEEP = {
    f"{key}_{depth}": (lambda key=key, wrap=wrap, depth=depth: nested(depth, key, wrap))
    for key, wrap in (
        *(("items", "object"), ("not", "object"), ("additionalProperties", "object")),
        *(("anyOf", "list"), ("allOf", "list"), ("properties", "named")),
    )
    for depth in (100, 300, 480)
}
"""As deep as json's own writer goes; `json_bodies.DEEP` goes deeper."""

ATTACKS: list[Attack] = [
    *in_turn("references", REFERENCES),
    *in_turn("bombs", BOMBS),
    *in_turn("numbers", NUMBERS),
    *in_turn("sizes", SIZES),
    *in_turn("wrong_schemas", WRONG),
    *in_turn("wrong_defs", {k: v for k, v in WRONG.items() if k.startswith("defs")}, ways=6),
    *in_turn("deep_schemas", DEEP),
]
