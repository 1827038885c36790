"""Outputs match what was asked of them, whatever the sampling, the neighbours and the scheduling."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from jaxengine import LLM, SamplingParams
from jaxengine import StructuredOutputsParams as Structured

NUMBER = {"type": "number", "minimum": -10, "maximum": 10}
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "colour": {"enum": ["réd", 'a "quoted" one', "tab\t"]},
            "inner": {"type": "object", "properties": {"deep": {"type": ["integer", "null"], "maximum": 99}}},
        },
        "required": ["name", "colour", "inner"],
    },
    {"type": "array", "items": {"anyOf": [NUMBER, {"type": "boolean"}]}, "minItems": 1, "maxItems": 4},
    {"const": {"emoji": "🦙", "list": [1, None]}},
]
BRIEF: Any = {"disable_any_whitespace": True, "disable_additional_properties": True}
CASES: list[tuple[Structured, Callable[[str], bool]]] = [
    (Structured(json=SCHEMAS[0], **BRIEF), lambda text: is_first(json.loads(text))),
    (Structured(json=json.dumps(SCHEMAS[1]), **BRIEF), lambda text: all(is_item(x) for x in json.loads(text))),
    (Structured(json=SCHEMAS[2], whitespace_pattern=" ?"), lambda text: json.loads(text) == SCHEMAS[2]["const"]),
    (Structured(regex=r"([0-9]{1,3}\.){3}[0-9]+"), lambda text: bool(re.fullmatch(r"(\d{1,3}\.){3}\d+", text))),
    (Structured(regex="[à-ÿ]{3}( ?é)?"), lambda text: bool(re.fullmatch("[à-ÿ]{3}( ?é)?", text))),
    (Structured(choice=["yes", "no", "löng \\ \n one"]), lambda text: text in ("yes", "no", "löng \\ \n one")),
    (Structured(grammar='start: "(" start ")" | /[a-z]{1,4}/'), lambda text: is_nested(text)),
    (Structured(grammar='root ::= "[" [0-9]+ ("," [0-9])? "]"'), lambda text: isinstance(json.loads(text), list)),
]


def is_first(value: Any) -> bool:
    names = set(value) == {"name", "colour", "inner"} and set(value["inner"]) <= {"deep"}
    return names and len(value["name"]) <= 12 and value["colour"] in SCHEMAS[0]["properties"]["colour"]["enum"]


def is_item(value: Any) -> bool:
    return isinstance(value, bool) or -10 <= value <= 10


def is_nested(text: str) -> bool:
    depth = len(text) - len(text.lstrip("("))
    return bool(re.fullmatch(rf"\({{{depth}}}[a-z]{{1,4}}\){{{depth}}}", text))


def check(llm: LLM, prompt: Any, temperature: float, seeds: int, max_tokens: int) -> float:
    """Runs all cases in one call, among requests for any text; returns the share that came to its natural end."""
    plain = [
        SamplingParams(temperature=temperature, seed=seed, max_tokens=12, ignore_eos=True, logprobs=logprobs)
        for seed, logprobs in ((1, None), (2, 2))
    ]
    alone = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for params in plain]
    pairs = list(itertools.product(CASES, range(seeds)))
    params = [
        SamplingParams(
            temperature=temperature,
            seed=10 * seed,
            n=2 if temperature else 1,
            max_tokens=max_tokens,
            min_tokens=3 * (seed % 2),
            logprobs=seed % 3 or None,
            structured_outputs=case,
        )
        for (case, _), seed in pairs
    ]
    outputs = llm.generate([prompt] * (len(params) + 2), [plain[0], *params, plain[1]], use_tqdm=False)
    assert [outputs[0].outputs[0].token_ids, outputs[-1].outputs[0].token_ids] == alone
    num_ended = 0
    for output, ((case, is_right), _) in zip(outputs[1:-1], pairs, strict=True):
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length")
            if completion.finish_reason == "stop":
                assert is_right(completion.text), (case, completion.text)
                num_ended += 1
    return num_ended / sum(len(output.outputs) for output in outputs[1:-1])


TINY = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 16, "warmup": "none"}


@pytest.mark.parametrize(
    "options",
    [{}, {"async_scheduling": False, "enable_prefix_caching": False}, {"num_gpu_blocks_override": 20}],
    ids=str,
)
def test_every_text_parses(tiny, options):
    prompt = {"prompt_token_ids": list(range(60, 90))}  # in two chunks
    with LLM(str(tiny), **TINY, **options) as llm:
        for temperature in (1.0,) if options else (0.0, 1.0, 20.0):
            assert check(llm, prompt, temperature, 2, 120) >= 0.5  # it repeats itself
        preemptions = next(m.value for m in llm.get_metrics() if m.name == "jaxengine:num_preemptions")
        assert (preemptions > 0) == ("num_gpu_blocks_override" in options)


def test_outputs_do_not_depend_on_scheduling(tiny):
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=60, structured_outputs=case)
        for (case, _), seed in itertools.product(CASES, range(2))
    ]
    prompts: Any = [{"prompt_token_ids": list(range(50, 60 + i))} for i in range(len(params))]
    found = []
    for options in ({}, {"async_scheduling": False}, {"num_gpu_blocks_override": 20}):
        with LLM(str(tiny), **TINY, **options) as llm:
            found.append([o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_every_text_of_the_real_model_parses(smollm2, temperature):
    assert check(smollm2, "Answer briefly, in the right form:", temperature, 1, 60) >= 0.5


def generate(llm: LLM, **fields: Any) -> Any:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 30} | fields)
    return llm.generate("Hello", params, use_tqdm=False)[0].outputs[0]


@pytest.fixture(scope="module")
def engine(tiny):
    with LLM(str(tiny), **TINY) as llm:
        yield llm


def test_the_end(engine):
    yes = Structured(choice=["yes"])
    eos = engine.get_tokenizer().eos_token_id
    ended = generate(engine, structured_outputs=yes)
    assert (ended.text, ended.finish_reason, ended.stop_reason) == ("yes", "stop", None)
    # Nothing but the end is left: min_tokens and ignore_eos could only repeat it.
    for more in ({"min_tokens": 6}, {"min_tokens": 30}, {"ignore_eos": True}, {"min_tokens": 6, "ignore_eos": True}):
        late = generate(engine, structured_outputs=yes, skip_special_tokens=False, **more)
        assert (late.text.removesuffix("<|end|>"), late.finish_reason) == ("yes", "stop")
        assert late.token_ids[3:] == [eos]
    assert not engine.llm_engine.core._matchers._matchers
    long = generate(engine, structured_outputs=Structured(regex="a*"), min_tokens=9, logit_bias={eos: 100})
    assert long.text == "a" * 8 if len(long.token_ids) == 9 else long.text.strip("a") == ""
    # A stop token of the user's, which no grammar knows, ends it too where it may end.
    stop = next(i for i in range(5) if i != eos)
    bias = {"logit_bias": {stop: 100}, "stop_token_ids": [stop], "structured_outputs": yes}
    stopped = generate(engine, **bias)
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("yes", "stop", stop)
    cut = generate(engine, structured_outputs=Structured(regex="[a-z]{40}"), stop=["a", "e", "i", "o", "u", "y", "m"])
    assert re.fullmatch("[a-z]*", cut.text)
    assert generate(engine, structured_outputs=yes, max_tokens=2).text == "ye"


def test_parameters_that_leave_no_token(engine, caplog):
    """Such a request ends with an error instead of a text of another form."""
    params = {"structured_outputs": Structured(choice=["yes"]), "allowed_token_ids": [1, 70, 71]}
    failed = generate(engine, **params)
    assert (failed.text, failed.finish_reason, failed.stop_reason) == ("", "error", None)
    assert "structured_outputs" in caplog.text
    assert generate(engine, structured_outputs=Structured(choice=["yes"])).text == "yes"
    assert not engine.llm_engine.core._matchers._matchers


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "nothing"}}, "Invalid type"),
        ({"json": {"type": "object", "unevaluatedProperties": False}}, "Unimplemented"),
        ({"json": {"$ref": "https://example.com/schema"}}, "does not fetch"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "\ud800"}, "half of a surrogate pair"),
        ({"grammar": "start: other"}, "other"),
        ({"grammar": "root ::= other"}, "other"),
        ({"grammar": "?" * 5}, "GBNF"),
    ],
    ids=str,
)
def test_wrong_grammars_are_told_before_anything_runs(engine, form, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(engine, structured_outputs=Structured(**form))
    assert "structured_outputs: " in str(caught.value)
    assert not engine.llm_engine.has_unfinished_requests()
