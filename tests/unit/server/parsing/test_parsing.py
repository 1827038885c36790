"""Calls and reasoning in what models write; the pieces in which a text comes must change nothing."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxengine.server.parsing.answer import AnswerParser, Part, Reasoning
from jaxengine.server.parsing.call import Arguments, ToolCall
from jaxengine.server.parsing.reasoning import REASONING_STYLES, ReasoningParser
from jaxengine.server.parsing.tool_calls import TOOL_PARSERS, JSONParser

Plain = str | tuple[str, str]
HI = ("hi", '{"to": "Ann"}')
BYE = ("bye", "{}")
SAY = ("say", '{"text": "</tool_call> {[\\"\'", "n": [1, 2.5, null, true]}')
DEEP = '{"to": ' + "[" * 5000 + "]" * 5000 + "}"
SAY_JSON = '{"name": "say", "arguments": ' + SAY[1] + "}"


def plain(parts: Sequence[Part]) -> list[Plain]:
    """Calls without their ids, with their pieces and those of content joined."""
    result: list[Plain] = []
    for part in parts:
        if isinstance(part, ToolCall):
            result.append((part.name, ""))
        elif isinstance(part, Arguments):
            name, text = result[-1]  # fails if they are those of no call
            result[-1] = name, text + part.text
        elif isinstance(part, Reasoning):
            result.append(("reasoning", part.text))
        elif result and isinstance(result[-1], str):
            result[-1] += part
        else:
            result.append(part)
    return result


def parse(name: str, pieces: list[str]) -> list[Plain]:
    parser = AnswerParser(None, JSONParser() if name == "forced" else TOOL_PARSERS[name]())
    parts = [part for piece in pieces for part in parser.feed(piece, final=False)]
    return plain(parts + parser.feed("", final=True))


CASES = [
    ("hermes", '<tool_call>\n{"name": "hi", "arguments": {"to": "Ann"}}\n</tool_call>', [HI]),
    ("qwen", "Well.\n\n<tool_call>" + SAY_JSON + "</tool_call> Done.", ["Well.", SAY, "Done."]),
    (
        "hermes",
        '<tool_call>{"name":"hi","arguments":{"to":"Ann"}}</tool_call>\n<tool_call>{"name":"bye","arguments":"{}"}',
        [("hi", '{"to":"Ann"}'), BYE],
    ),
    ("hermes", '<tool_call>[{"arguments": {"to": "Ann"}, "id": {"name": 1}, "name": "hi"}]</tool_call>', [HI]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": "Ann"}</tool_call>.', [HI, "."]),
    ("hermes", '<tool_call>{"name": "bye", "arguments": "{\\"a\\": 1}", "parameters": {}}', [("bye", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": "\\ud800"}}', [("hi", '{"to": "\\ud800"}')]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": 1e999}}', [("hi", '{"to": 1e999}')]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": ' + DEEP + "}</tool_call>", [("hi", DEEP)]),
    ("hermes", '<tool_call>{"name": "a\tb", "arguments": {"x": "\n\x01"\n}}', [("a\tb", '{"x": "\\n\\u0001"\n}')]),
    ("llama3_json", '{"name": "hi", "parameters": {"to": "Ann"}}', [HI]),
    (
        "llama3_json",
        ' <|python_tag|>{"name": "hi", "parameters": {"to": "Ann"}}; {"name": "bye", "parameters": {}}',
        [HI, BYE],
    ),
    ("llama3_json", "Call: <|python_tag|>" + SAY_JSON + "; and more", ["Call:", SAY, "and more"]),
    ("mistral", '[TOOL_CALLS] [{"name": "hi", "arguments": {"to": "Ann"}}, ' + SAY_JSON + "]", [HI, SAY]),
    ("mistral", 'So [TOOL_CALLS]hi{"to": "Ann"}[TOOL_CALLS]bye {}', ["So", HI, BYE]),
    ("mistral", '[TOOL_CALLS]hi[CALL_ID]abcdefghi[ARGS]{"to": "Ann"}[TOOL_CALLS]bye[ARGS]{}', [HI, BYE]),
    ("gemma", '[hi(to="Ann"), bye()]', [HI, BYE]),
    ("gemma", "Let me.\n```tool_code\nhi(to='Ann')\nbye()\n```\nDone", ["Let me.", HI, BYE, "Done"]),
    ("gemma", '```json\n{"name": "hi", "parameters": {"to": "Ann"}}\n```', [HI]),
    ("gemma", '{"name": "hi", "parameters": {"to": "Ann"}}', [HI]),
    ("hermes", '<tool_call>{"name": "bye"}</tool_call>', [BYE]),
    ("hermes", '<tool_call>{"name": "bye", "arguments": null}</tool_call> x', [BYE, "x"]),
    ("hermes", '<tool_call>{"arguments": null, "name": "bye"}', [BYE]),
    ("hermes", '<tool_call>{"name": "bye", "arguments": ""}</tool_call>', [BYE]),
    ("hermes", '<tool_call>{"name": "bye"}</tool_call><tool_call>' + SAY_JSON, [BYE, SAY]),
    ("mistral", '[TOOL_CALLS] [{"name": "bye"}, ' + SAY_JSON + "]", [BYE, SAY]),
    ("llama3_json", '<|python_tag|>{"name": "bye"}; {"name": "hi", "parameters": {"to": "Ann"}}', [BYE, HI]),
    ("forced", '[{"name":"bye"},{"name":"hi","parameters":{"to": "Ann"}}]', [BYE, HI]),
    ("pythonic", "[f(a=true, b=[null, {'c': false}])]", [("f", '{"a": true, "b": [null, {"c": false}]}')]),
    ("pythonic", "[mail(from='a', to='b', class=None)]", [("mail", '{"from": "a", "to": "b", "class": null}')]),
    ("pythonic", '[import(x="from=(")]', [("import", '{"x": "from=("}')]),
    ("pythonic", "[a.say(text='</tool_call> {[\"\\'', n=[1, 2.5, None, True])]", [("a." + SAY[0], SAY[1])]),
]
CONTENT = [
    ("hermes", "a < b, <tool> and <tool_call"),
    ("hermes", "<tool_call>\nnothing</tool_call>"),
    ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": { here }}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": "{} {}"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'),
    ("hermes", '<tool_call>{"name": NaN, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\d", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi"], "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": 5}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": []}</tool_call>'),
    ("llama3_json", '{"name": "bye"}'),
    ("llama3_json", '{"name": "Ann", "age"'),
    ("llama3_json", '{"name": 5'),
    ("llama3_json", '{"nam'),
    ("gemma", "[1, 2"),
    ("gemma", '["a('),
    ("gemma", "[hi(to=yes)]"),
    ("llama3_json", '{"name": "Ann", "age": 3}'),
    ("llama3_json", 'As in {"name": "hi", "parameters": {}}'),
    ("llama3_json", '<|python_tag|>brave.call(query="x")'),
    ("mistral", "[TOOL_CALLS]I cannot { do } that"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]" + "x" * 300 + "{}"),
    ("gemma", "[1] a source, and f(x=1)"),
    ("gemma", "```tool_code\nhi('Ann')\n```"),
    ("gemma", "```tool_code\nhi(**x)\n```"),
    ("gemma", "```tool_code\nimport os\n```"),
    ("gemma", "[hi(to={1, 2})]"),
    ("gemma", "[f(x='\\d'), g(x=" + "(" * 300 + ")" * 300 + ")]"),
    ("gemma", "```python\nprint(1)\n```"),
]


BROKEN = [
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": </tool_call> Hm', [("hi", '{"to": '), "Hm"]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": NaN}}', [("hi", '{"to": '), "NaN}}"]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": "\\d"}}', [("hi", '{"to": "'), '\\d"}}']),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"a": [1}}', [("hi", '{"a": [1'), "}}"]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"a": 1,}}', [("hi", '{"a": 1,'), "}}"]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"a": 12', [("hi", '{"a": 12')]),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"a": "\\u00', [("hi", '{"a": "\\u00')]),
    ("mistral", '[TOOL_CALLS]hi{"to": 1, to}', [("hi", '{"to": 1, '), "to}"]),
    ("mistral", '[TOOL_CALLS][{"name": "bye", "arguments": {}}, 5]', [BYE, ", 5]"]),
    ("mistral", '[TOOL_CALLS][{"name": "bye", "arguments": {}}; 5]', [BYE, "; 5]"]),
    ("mistral", '[TOOL_CALLS][{"name": "bye", "arguments": {}}, {"name": 5}]', [BYE, ', {"name": 5}]']),
    ("mistral", '[TOOL_CALLS][{"name": "bye", "arguments": {}}, ', [BYE]),
    ("gemma", '[{"name": "bye", "arguments": {}}, bye()]', [BYE, ", bye()]"]),
]
"""Calls that stop being JSON after they have been told."""


CUT_OFF = [
    ("hermes", "Well. <tool_call>", ["Well."]),
    ("hermes", "<tool_call>\n", []),
    ("hermes", "Well.\n<tool_call>\n{", ["Well."]),
    ("hermes", '<tool_call>{"arguments": {"to": "Ann"}, "name": "h', []),
    ("hermes", '<tool_call>{"name": "hi", "argu', []),
    ("hermes", '<tool_call>{"name": "hi", "arguments": ', []),
    ("hermes", "<tool_call>" + SAY_JSON + '</tool_call><tool_call>{"na', [SAY]),
    ("llama3_json", '<|python_tag|>{"na', []),
    ("llama3_json", '{"name": "h', []),
    ("llama3_json", '{"name": "hi", "parameters": ', []),
    ("mistral", "[TOOL_CALLS]", []),
    ("mistral", "[TOOL_CALLS] [", []),
    ("mistral", '[TOOL_CALLS] [{"name": "hi"', []),
    ("mistral", "Hm [TOOL_CALLS]h", ["Hm"]),
    ("mistral", "[TOOL_CALLS]hi[CALL_ID]abc[AR", []),
    ("gemma", "```tool_code\nhi(to='An", []),
    ("gemma", "[hi(to='Ann'), by", []),
    ("gemma", '[{"name": "h', []),
    ("forced", '[{"name":"h', []),
    ("forced", "[", []),
    ("forced", '[{"name":"hi","parameters":{"to": "Ann"}},{"name', [HI]),
]
"""Calls that the text ends in before they are certain."""


@pytest.mark.parametrize(("name", "text", "expected"), CASES + BROKEN + CUT_OFF)
def test_calls_are_found(name, text, expected):
    assert parse(name, [text]) == expected
    assert parse(name, list(text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("llama3_json", '{"name": "h', []),
        ("llama3_json", '{"name": "hi"', []),
        ("llama3_json", '{"name": "A', ['{"name": "A']),
        ("llama3_json", '{"name": "h"', ['{"name": "h"']),
        ("gemma", "[hi(to='An", []),
        ("gemma", "[see(to='An", ["[see(to='An"]),
    ],
)
def test_names_tell_half_a_call_from_other_text(name, text, expected):
    for pieces in ([text], list(text)):
        parser = TOOL_PARSERS[name](["hi"])
        assert (
            plain([part for piece in pieces for part in parser.feed(piece, final=False)] + parser.feed("", final=True))
            == expected
        )


@pytest.mark.parametrize(("name", "text"), CONTENT)
def test_what_is_no_call_stays_content(name, text):
    assert parse(name, [text]) == [text]
    assert parse(name, list(text)) == [text]


def test_mistral_ids_have_nine_characters():
    call, _ = TOOL_PARSERS["mistral"]().feed("[TOOL_CALLS]hi{}", final=True)
    assert isinstance(call, ToolCall)
    assert len(call.id) == 9
    assert call.id.isalnum()


def test_content_is_not_held_back():
    """Only the spaces and what a marker may begin with are."""
    for name in TOOL_PARSERS:
        parser = TOOL_PARSERS[name]()
        assert parser.feed("Good ", final=False) == ["Good"]
        assert parser.feed("day", final=False) == [" day"]
    parser = TOOL_PARSERS["hermes"]()
    assert parser.feed("x <tool", final=False) == ["x"]
    assert parser.feed("s>", final=False) == [" <tools>"]


def test_arguments_are_told_as_they_come():
    """All but what may become an escape or a number; and nothing before it is certain that there is a call."""
    parser = TOOL_PARSERS["hermes"]()
    assert not parser.feed('<tool_call>{"name": "hi", "arguments": {', final=False)
    call, begun = parser.feed('"to', final=False)
    assert isinstance(call, ToolCall)
    assert begun == Arguments('{"to', False)
    told = [parser.feed(piece, final=False) for piece in ('": "A', "n\\u00", 'e9", "n": 1', "2, ", "[", "}")]
    texts = ['": "A', "n", '\\u00e9", "n": ', "12, "]
    assert told == [*([Arguments(text, False)] for text in texts), ["["], ["}"]]


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("llama3_json", '{"parameters": {"to": "Ann"}, "name": "hi"'),
        ("hermes", '<tool_call>{"name": "hi", "arguments": "{\\"to\\": \\"Ann\\"}"'),
    ],
)
def test_some_calls_can_only_be_told_whole(name, before):
    parser = TOOL_PARSERS[name]()
    assert not [part for character in before[:-1] for part in parser.feed(character, final=False)]
    call, arguments = parser.feed(before[-1], final=False)
    assert isinstance(call, ToolCall)
    assert arguments == Arguments(HI[1], True)


def test_forced_calls_are_told_as_they_come():
    parser = JSONParser()
    told = [parser.feed(piece, final=False) for piece in ('[{"name":"hi","parameters":{"to":"', "An", 'n"}},{"na')]
    assert [len(parts) for parts in told] == [2, 1, 1]
    assert plain([part for parts in told for part in parts]) == [("hi", '{"to":"Ann"}')]
    assert plain(parser.feed('me":"bye","parameters":{}}]', final=True)) == [BYE]


def test_calls_beyond_the_limit_are_dropped():
    parser = AnswerParser(None, TOOL_PARSERS["gemma"](), max_calls=1)
    assert plain(parser.feed("[hi(to='Ann'), bye()] end", final=True)) == [HI, "end"]


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "```tool_code", "```json", "```"),
    *('{"name": "hi", "parameters": {"to": "Ann"}}', SAY_JSON, "hi(to='Ann')", "[bye()]", "hi", "{", "}", "[", "]"),
    *('"', "'", "\\", " ", "\n", ";", "<", "`", "x", "<think>", "</think>", "[THINK]", "é"),
    *('{"name": "hi", "arguments": {"a": ', '{"arguments": {"a": 1}, ', '"name": ', '"hi"', '"\\u00', "e9", ":", ","),
    *("-1", ".5", "tru", "e", "}}", "[[", "null"),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
cuts = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def cut(text: str, lengths: list[int]) -> list[str]:
    pieces = []
    while text:
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(text[:length])
        text = text[length:]
    return pieces


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "gemma"])
@given(text=texts, lengths=cuts)
def test_pieces_change_nothing(name, text, lengths):
    whole = parse(name, [text])
    assert parse(name, cut(text, lengths)) == whole
    check_arguments(TOOL_PARSERS[name]().feed(text, final=True))
    if all(isinstance(part, str) for part in whole):
        content = "".join(str(part) for part in whole)
        assert text.startswith(content)
        begun = TOOL_PARSERS[name].markers + TOOL_PARSERS[name].leading  # what was cut off begins so
        assert content == text or text[len(content) :].lstrip().startswith(begun)


def check_arguments(parts: list[Any]) -> None:
    """Arguments are JSON objects if they are called complete, and only then."""
    while parts:
        part = parts.pop(0)
        if isinstance(part, ToolCall):
            pieces = []
            while parts and isinstance(parts[0], Arguments):
                pieces.append(parts.pop(0))
            assert pieces
            assert not any(piece.is_last for piece in pieces[:-1])
            text = "".join(piece.text for piece in pieces)
            if pieces[-1].is_last:
                assert isinstance(json.loads(text), dict)
            else:
                with pytest.raises(ValueError, match="line"):
                    json.loads(text)


names = st.from_regex(r"[\w.-]{1,12}", fullmatch=True)
nasty = st.text(st.sampled_from("{}[]\"'\\:, \n\t<>`é\u2028\U0001f600x1"), max_size=8) | st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(nasty, inner, max_size=3),
    max_leaves=6,
)
dumps = st.builds(
    lambda value, **options: json.dumps(value, **options),
    st.dictionaries(nasty | st.just("name"), values, max_size=3),
    indent=st.sampled_from([None, 2]),
    ensure_ascii=st.booleans(),
    separators=st.sampled_from([None, (",", ":"), (" , ", " : ")]),
)
several = st.lists(st.tuples(names, dumps), min_size=1, max_size=3)


def written(name: str, calls: list[tuple[str, str]], variant: int) -> str:
    """How models write calls."""
    word = ("arguments", "parameters")[variant % 2]
    fields = [f'"name": {json.dumps(n)}, "{word}": {text}' for n, text in calls]
    if variant // 2 % 2:
        fields = [f'"{word}": {text},\n "name": {json.dumps(n)}, "id": [1, {{"a": "}}"}}]' for n, text in calls]
    objects = ["{" + inside + "}" for inside in fields]
    match name:
        case "hermes":
            return "\n".join(f"<tool_call>\n{item}\n</tool_call>" for item in objects)
        case "llama3_json":
            return "; ".join(objects)
        case "mistral" if variant > 3:
            return "".join(f"[TOOL_CALLS]{n}[ARGS]{text}" for n, text in calls)
    return ("[TOOL_CALLS]" if name == "mistral" else "") + "[" + ", ".join(objects) + "]"


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "gemma", "forced"])
@settings(max_examples=50)
@given(calls=several, variant=st.integers(0, 7), lengths=cuts, where=st.floats(0, 1))
def test_calls_are_what_the_model_wrote(name, calls, variant, lengths, where):
    """Character for character, however it comes; and the beginning of it if the text is cut off."""
    text = written(name, calls, variant)
    assert parse(name, cut(text, lengths)) == calls
    beginning = text[: int(where * len(text))]
    whole = parse(name, [beginning])
    assert parse(name, cut(beginning, lengths)) == whole
    told = [part for part in whole if isinstance(part, tuple)]
    assert whole[: len(told)] == told
    for i, (function, arguments) in enumerate(told):
        assert function == calls[i][0]
        assert calls[i][1].startswith(arguments) if i == len(told) - 1 else arguments == calls[i][1]


def think(name: str, pieces: list[str], prompt: str = "") -> tuple[str, str]:
    parser = ReasoningParser(REASONING_STYLES[name], prompt)
    parts = [parser.feed(piece, final=False) for piece in pieces] + [parser.feed("", final=True)]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "expected"),
    [
        ("qwen3", "", "<think>\nHm\n</think>\n\nYes ", ("Hm", "Yes ")),
        ("qwen3", "", " <thin air> and </think>", ("", " <thin air> and </think>")),
        ("qwen3", "x<think>\n", "Hm</think>Yes", ("Hm", "Yes")),
        ("qwen3", "x<think>\n\n</think>\n\n", "Yes", ("", "Yes")),
        ("qwen3", "", "<think>never ending</thi", ("never ending</thi", "")),
        ("qwen3", "", "<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
        ("deepseek_r1", "", "Hm\n</think>\nYes", ("Hm", "Yes")),
        ("deepseek_r1", "", "<think>Hm</think>Yes", ("Hm", "Yes")),
        ("deepseek_r1", "x</think>\n", "Yes", ("", "Yes")),
        ("deepseek_r1", "", "", ("", "")),
        ("mistral", "", "[THINK]Hm[/THINK]Yes", ("Hm", "Yes")),
    ],
)
def test_reasoning_is_split(name, prompt, text, expected):
    assert think(name, [text], prompt) == expected
    assert think(name, list(text), prompt) == expected


@pytest.mark.parametrize("name", REASONING_STYLES)
@given(text=texts, lengths=cuts, prompt=st.sampled_from(["", "<think>\n", "</think>", "[THINK]"]))
@example(text="<think> </think>", lengths=[7], prompt="")
def test_pieces_change_nothing_in_reasoning(name, text, lengths, prompt):
    assert think(name, cut(text, lengths), prompt) == think(name, [text], prompt)


def test_reasoning_comes_before_calls():
    text = "<think>I <tool_call> </think>\n<tool_call>\n" + SAY_JSON + "\n</tool_call>"
    for pieces in ([text], list(text)):
        parser = AnswerParser(ReasoningParser(REASONING_STYLES["qwen3"], ""), TOOL_PARSERS["hermes"]())
        parts = [part for piece in pieces for part in parser.feed(piece, final=False)] + parser.feed("", final=True)
        assert "".join(part.text for part in parts if isinstance(part, Reasoning)) == "I <tool_call>"
        assert plain([part for part in parts if not isinstance(part, Reasoning)]) == [SAY]
