"""Calls and reasoning in what models write; the pieces in which a text comes must change nothing."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxengine.server.parsing.answer import AnswerParser, Part, Reasoning
from jaxengine.server.parsing.reasoning import REASONING_STYLES, ReasoningParser
from jaxengine.server.parsing.tool_calls import TOOL_PARSERS, ToolCall

Plain = str | tuple[str, str]
HI = ("hi", '{"to": "Ann"}')
BYE = ("bye", "{}")
SAY = ("say", '{"text": "</tool_call> {[\\"\'", "n": [1, 2.5, null, true]}')
SAY_JSON = '{"name": "say", "arguments": ' + SAY[1] + "}"


def plain(parts: list[Part]) -> list[Plain]:
    """Calls without their ids, with the pieces of content between them joined."""
    result: list[Plain] = []
    for part in parts:
        if isinstance(part, ToolCall):
            result.append((part.name, part.arguments))
        elif isinstance(part, Reasoning):
            result.append(("reasoning", part.text))
        elif result and isinstance(result[-1], str):
            result[-1] += part
        else:
            result.append(part)
    return result


def parse(name: str, pieces: list[str]) -> list[Plain]:
    parser = AnswerParser(None, TOOL_PARSERS[name]())
    parts = [part for piece in pieces for part in parser.feed(piece, final=False)]
    return plain(parts + parser.feed("", final=True))


CASES = [
    ("hermes", '<tool_call>\n{"name": "hi", "arguments": {"to": "Ann"}}\n</tool_call>', [HI]),
    ("qwen", "Well.\n\n<tool_call>" + SAY_JSON + "</tool_call> Done.", ["Well.", SAY, "Done."]),
    (
        "hermes",
        '<tool_call>{"name":"hi","arguments":{"to":"Ann"}}</tool_call>\n<tool_call>{"name":"bye","arguments":"{}"}',
        [HI, BYE],
    ),
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
    ("pythonic", "[a.say(text='</tool_call> {[\"\\'', n=[1, 2.5, None, True])]", [("a." + SAY[0], SAY[1])]),
]
CONTENT = [
    ("hermes", "a < b, <tool> and <tool_call"),
    ("hermes", "<tool_call>\nnothing</tool_call>"),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": </tool_call>'),
    ("hermes", '<tool_call>{"name": "hi"}</tool_call>'),
    ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": "\\ud800"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": 1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "hi", "arguments": {"to": ' + "[" * 5000 + "]" * 5000 + "}}</tool_call>"),
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


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_calls_are_found(name, text, expected):
    assert parse(name, [text]) == expected
    assert parse(name, list(text)) == expected


@pytest.mark.parametrize(("name", "text"), CONTENT)
def test_what_is_no_call_stays_content(name, text):
    assert parse(name, [text]) == [text]
    assert parse(name, list(text)) == [text]


def test_mistral_ids_have_nine_characters():
    (call,) = TOOL_PARSERS["mistral"]().feed("[TOOL_CALLS]hi{}", final=True)
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


def test_a_call_is_told_as_soon_as_it_is_complete():
    parser = TOOL_PARSERS["hermes"]()
    assert not parser.feed('<tool_call>{"name": "bye", "arguments": {}', final=False)
    assert len(parser.feed("}", final=False)) == 1


def test_calls_beyond_the_limit_are_dropped():
    parser = AnswerParser(None, TOOL_PARSERS["gemma"](), max_calls=1)
    assert plain(parser.feed("[hi(to='Ann'), bye()] end", final=True)) == [HI, "end"]


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "```tool_code", "```json", "```"),
    *('{"name": "hi", "parameters": {"to": "Ann"}}', SAY_JSON, "hi(to='Ann')", "[bye()]", "hi", "{", "}", "[", "]"),
    *('"', "'", "\\", " ", "\n", ";", "<", "`", "x", "<think>", "</think>", "[THINK]", "é"),
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
    assert all(isinstance(json.loads(part[1]), dict) for part in whole if isinstance(part, tuple))
    if all(isinstance(part, str) for part in whole):
        assert "".join(str(part) for part in whole) == text


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
