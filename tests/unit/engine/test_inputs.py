"""Every form of prompt, and every wrong one refused before anything runs."""

from __future__ import annotations

from typing import Any

import jinja2
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jaxengine.engine import wire
from jaxengine.engine.inputs import InputProcessor, Prompt, normalize_conversations, normalize_prompts, render_chat
from jaxengine.sampling_params import SamplingParams, StructuredOutputsParams

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics today') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}{% endfor %}"
    "{% if not loop.last or not open %}\n{% endif %}{% endfor %}"
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ extra }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class FakeTokenizer:
    """A tokenizer of the tokenizers library with the methods of transformers' that inputs use; one token a byte."""

    def __init__(self, chat_template: str | None = CHAT_TEMPLATE) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*alphabet, "Ġd", "Ġdo", "do"])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "d"), ("Ġd", "o"), ("d", "o")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        backend.add_special_tokens([AddedToken("<s>", special=True)])
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>") or 0)]
        )
        self.backend_tokenizer = backend
        self.chat_template = chat_template

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids, skip_special_tokens=False) -> str:
        return self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, *, tools, chat_template, tokenize, continue_final_message, **variables):
        assert not tokenize

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        template = jinja2.Environment().from_string(chat_template or self.chat_template or "")
        return template.render(
            messages=messages, tools=tools, raise_exception=raise_exception, open=continue_final_message, **variables
        )


TOKENIZER = FakeTokenizer()
VOCAB_SIZE = len(TOKENIZER) + 4
BOS = TOKENIZER.backend_tokenizer.token_to_id("<s>") or 0


def processor(**options: Any) -> InputProcessor:
    defaults: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_model_len": 32, "eos_token_ids": [5]}
    return InputProcessor(TOKENIZER, **(defaults | options))  # pyright: ignore[reportArgumentType]


def plain(*texts: str) -> list[Prompt]:
    return [Prompt(text=text) for text in texts]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", plain("a")),
        (["a", "b"], plain("a", "b")),
        (("a", "b"), plain("a", "b")),
        ([1, 2], [Prompt(token_ids=[1, 2])]),
        ((1, 2), [Prompt(token_ids=[1, 2])]),
        (np.array([1, 2]), [Prompt(token_ids=[1, 2])]),
        ([[1, 2], [3]], [Prompt(token_ids=[1, 2]), Prompt(token_ids=[3])]),
        ({"prompt": "a"}, plain("a")),
        ({"prompt_token_ids": [1]}, [Prompt(token_ids=[1])]),
        ({"prompt": "a", "prompt_token_ids": [1], "cache_salt": "s"}, [Prompt("a", [1], "s")]),
        (["a", [1], {"prompt": "b"}, Prompt("c")], [Prompt("a"), Prompt(token_ids=[1]), Prompt("b"), Prompt("c")]),
        ([], []),
    ],
)
def test_forms_of_prompts(prompts, expected):
    assert normalize_prompts(prompts) == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "None"),
        (3, "3"),
        (b"a", "b'a'"),
        ([1, "a"], "'a'"),
        ([True], "True"),
        (["a", 2.5], r"prompts\[1\].*2\.5"),
        (["a", [1, 2.5]], r"prompts\[1\]: prompt_token_ids.*2\.5"),
        ({}, "prompt_token_ids"),
        ({"prompt": 3}, '"prompt".*3'),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids.*'ab'"),
        ({"prompt": "a", "multi_modal_data": {}}, "multi_modal_data"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
    ],
)
def test_what_is_no_prompt(prompts, message):
    with pytest.raises(ValueError, match=message):
        normalize_prompts(prompts)


def test_tokenising_adds_special_tokens():
    (request,) = processor().process("r", "ab")
    assert request.prompt_token_ids == [BOS, *TOKENIZER.encode("ab", add_special_tokens=False)]
    (request,) = processor().process("r", Prompt("ab", add_special_tokens=False))
    assert request.prompt_token_ids[0] != BOS


def test_request_fields():
    params = SamplingParams(stop_token_ids=[7], max_tokens=None)
    (request,) = processor().process("r", [1, 2, 3], params, priority=2, arrival_time=1.5, cache_salt="s")
    assert (request.request_id, request.prompt_token_ids, request.max_tokens) == ("r", [1, 2, 3], 29)
    assert (request.priority, request.arrival_time, request.cache_salt) == (2, 1.5, "s")
    assert request.stop_token_ids == {5, 7}
    assert request.sampling_params is not params
    (request,) = processor().process("r", [1] * 30, SamplingParams(ignore_eos=True))
    assert request.max_tokens == 2
    assert request.stop_token_ids == set()


def test_children():
    item = processor().process_one("r", "a", SamplingParams(n=3, seed=10, temperature=1.0))
    assert [child.request_id for child in item.children] == ["0_r", "1_r", "2_r"]
    assert [child.sampling_params.seed for child in item.children] == [10, 11, 12]
    assert [child.sampling_params.n for child in item.children] == [1, 1, 1]
    assert (item.request_id, item.prompt_text, item.params.n) == ("r", "a", 3)
    unseeded = processor().process("r", "a", SamplingParams(n=2))
    assert [child.sampling_params.seed for child in unseeded] == [None, None]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt_token_ids=.*at least one token"),
        (Prompt("", add_special_tokens=False), {}, "prompt=''"),
        ([1] * 32, {}, "32 tokens.*max_model_len=32"),
        ("a" * 40, {}, "41 tokens"),
        ([VOCAB_SIZE], {}, f"prompt_token_ids.*got {VOCAB_SIZE}"),
        ([-1], {}, "prompt_token_ids.*-1"),
        ([1], {"logprobs": 21}, "logprobs.*max_logprobs=20.*21"),
        ([1], {"logprobs": -1}, "logprobs.*-1"),
        ([1], {"prompt_logprobs": 21}, "prompt_logprobs.*21"),
        ([1], {"allowed_token_ids": [VOCAB_SIZE]}, f"allowed_token_ids.*{VOCAB_SIZE}"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, f"logit_bias.*{VOCAB_SIZE}"),
        ([1], {"stop_token_ids": [VOCAB_SIZE]}, f"stop_token_ids.*{VOCAB_SIZE}"),
        ([1], {"truncate_prompt_tokens": 32}, "truncate_prompt_tokens.*max_model_len=32.*32"),
        ([1], {"bad_words": ["a long bad word"]}, "bad_words.*a long bad word.*8"),
        ([1], {"bad_words": [chr(ord("!") + i) for i in range(80)]}, "bad_words make 81.*64"),
    ],
)
def test_wrong_requests(prompt, params, message):
    with pytest.raises(ValueError, match=message):
        processor().process("r", prompt, SamplingParams(**params))


def test_whole_vocabulary_of_logprobs_if_allowed():
    assert processor(max_logprobs=-1).process("r", [1], SamplingParams(logprobs=-1))
    assert processor(max_logprobs=VOCAB_SIZE).process("r", [1], SamplingParams(logprobs=-1))


def test_truncation_keeps_the_end():
    ids = list(range(40))
    (request,) = processor().process("r", ids, SamplingParams(truncate_prompt_tokens=3))
    assert request.prompt_token_ids == [37, 38, 39]
    (request,) = processor().process("r", ids, SamplingParams(truncate_prompt_tokens=-1, max_tokens=10))
    assert request.prompt_token_ids == ids[-22:]
    assert request.max_tokens == 10
    (request,) = processor().process("r", [1, 2], SamplingParams(truncate_prompt_tokens=5))
    assert request.prompt_token_ids == [1, 2]


def test_bad_words_with_and_without_a_space():
    ids = {text: TOKENIZER.encode(text, add_special_tokens=False) for text in ("do", " do", "a", " a", "be")}
    (request,) = processor().process("r", [1], SamplingParams(bad_words=["do", "a", "be"]))
    # " do" is one other token; " be" has its space as a token of its own, and so is banned by "be" as it is.
    assert request.sampling_params.bad_words_token_ids is not None
    assert ids["do"] in request.sampling_params.bad_words_token_ids
    assert ids[" do"] in request.sampling_params.bad_words_token_ids
    assert ids["be"] in request.sampling_params.bad_words_token_ids


def test_changed_parameters_are_checked_again():
    params = SamplingParams()
    params.top_p = 0.0
    with pytest.raises(ValueError, match="top_p"):
        processor().process("r", "a", params)


def test_without_a_tokenizer():
    inputs = InputProcessor(None, vocab_size=10, max_model_len=8)
    assert inputs.process("r", [1, 2])[0].prompt_token_ids == [1, 2]
    stop, bad_words = SamplingParams(stop="a"), SamplingParams(bad_words=["a"])
    for prompt, params in (("a", SamplingParams()), ([1], stop), ([1], bad_words)):
        with pytest.raises(ValueError, match=r"no tokenizer|there is none"):
            inputs.process("r", prompt, params)


def test_batches():
    items = processor().process_batch(
        ["a", [1], {"prompt": "b"}],
        [SamplingParams(max_tokens=i) for i in (1, 2, 3)],
        request_ids=str,
        priority=[3, 2, 1],
    )
    assert [item.request_id for item in items] == ["0", "1", "2"]
    assert [item.children[0].max_tokens for item in items] == [1, 2, 3]
    assert [item.children[0].priority for item in items] == [3, 2, 1]
    shared = SamplingParams(max_tokens=4)
    items = processor().process_batch(["a", "b"], shared, request_ids=["x", "y"], priority=1)
    assert [item.children[0].max_tokens for item in items] == [4, 4]
    assert items[0].children[0].sampling_params is not items[1].children[0].sampling_params
    assert processor().process_batch([], request_ids=str) == []
    assert processor(default_params=SamplingParams(max_tokens=9)).process("r", "a")[0].max_tokens == 9


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", []], {}, r"prompts\[1\]: prompt_token_ids"),
        (["a", [1] * 99], {}, r"prompts\[1\].*99"),
        (["a", "b"], {"params": [SamplingParams()]}, "sampling_params.*1 for 2 prompts"),
        (["a", "b"], {"params": [SamplingParams(), None]}, "sampling_params.*None"),
        ("a", {"params": {"temperature": 1}}, "sampling_params.*temperature"),
        (["a", "b"], {"priority": [1]}, "priority.*1 for 2 prompts"),
        (["a"], {"priority": "high"}, "priority.*'high'"),
        (["a"], {"request_ids": ["x", "y"]}, "request_ids"),
    ],
)
def test_wrong_batches(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        processor().process_batch(prompts, **({"request_ids": str} | options))


USER = {"role": "user", "content": "hi"}


def chat(messages, **options) -> str:
    return render_chat(TOKENIZER, messages, **options)  # pyright: ignore[reportArgumentType]


def test_chat_is_rendered():
    assert chat([USER]) == "<|user|>hi\n<|assistant|>"
    assert chat([USER], add_generation_prompt=False) == "<|user|>hi\n"
    answer = {"role": "assistant", "content": "Well"}
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat([USER, answer], **options) == "<|user|>hi\n<|assistant|>Well"
    assert chat([USER], chat_template="{{ messages[0].content }}!") == "hi!"
    assert chat([USER], chat_template_kwargs={"extra": "more"}).endswith("more<|assistant|>")
    assert "[f]" in chat([USER], tools=[{"type": "function", "function": {"name": "f"}}])
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert chat([parts]) == "<|user|>a\nb\n<|assistant|>"


def test_tool_calls_arguments_are_decoded():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 41}'}}
    assert chat([USER, {"role": "assistant", "content": None, "tool_calls": [call]}]).startswith(
        "<|user|>hi\n<|assistant|>41"
    )


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "at least one message"),
        ("hi", {}, "'hi'"),
        (USER, {}, "list of messages"),
        (["hi"], {}, r"messages\[0\].*'hi'"),
        ([{"content": "hi"}], {}, "role.*None"),
        ([USER, {"role": "usr", "content": "hi"}], {}, r"messages\[1\]: role .*'usr'"),
        ([{"role": "user"}], {}, "content"),
        ([{"role": "user", "content": 3}], {}, "content.*3"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "image_url"),
        ([{"role": "critic", "content": "hm"}], {}, "no critics today"),
        ([USER], {"continue_final_message": True}, "add_generation_prompt"),
        ([USER], {"tools": {"name": "f"}}, "tools"),
        ([USER], {"tools": ["f"]}, "tools"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}], {}, "arguments.*JSON"),
    ],
)
def test_wrong_chats(messages, options, message):
    with pytest.raises(ValueError, match=message):
        chat(messages, **options)


@pytest.mark.parametrize("arguments", ["{", '{"x": "half', "[1]", "no JSON", '"x"', "[" * 3000])
def test_arguments_that_are_no_object_go_on_as_text(arguments):
    """A model was cut off, or wrote something else: its client sends back what it was answered."""
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    call = {"function": {"name": "f", "arguments": arguments}}
    assert chat([USER, {"role": "assistant", "tool_calls": [call]}], chat_template=template) == arguments


def test_developers_are_systems_where_the_template_does_not_know_them():
    template = "{% for m in messages %}{{ m.role }} {% endfor %}"
    developer = {"role": "developer", "content": "Be brief."}
    assert chat([developer, USER], chat_template=template) == "system user "
    assert chat([developer, USER], chat_template=template + "{# developer #}") == "developer user "


def test_a_model_without_a_chat_template():
    tokenizer = FakeTokenizer(chat_template=None)
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(tokenizer, [USER])  # pyright: ignore[reportArgumentType]
    assert render_chat(tokenizer, [USER], chat_template="x") == "x"  # pyright: ignore[reportArgumentType]


def test_conversations():
    assert normalize_conversations([USER]) == [[USER]]
    assert normalize_conversations([[USER], [USER, USER]]) == [[USER], [USER, USER]]
    for wrong in ([], "hi", USER, [[USER], "hi"]):
        with pytest.raises(ValueError, match="messages"):
            normalize_conversations(wrong)  # pyright: ignore[reportArgumentType]


def wide(**options: Any) -> InputProcessor:
    """One whose tokenizer tells its vocabulary and counts what it is asked to tokenise."""

    class Counting(FakeTokenizer):
        num_characters = 0

        def get_vocab(self) -> dict[str, int]:
            return self.backend_tokenizer.get_vocab()

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            self.num_characters += len(text)
            return super().encode(text, add_special_tokens)

    defaults: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_model_len": 32}
    return InputProcessor(Counting(), **(defaults | options))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("max_model_len", [32, 5_000, 100_000])
@pytest.mark.parametrize("given", [{}, {"truncate_prompt_tokens": 3}, {"truncate_prompt_tokens": -1}])
def test_texts_that_are_far_too_long_are_hardly_tokenised(max_model_len, given):
    inputs = wide(max_model_len=max_model_len)
    with pytest.raises(ValueError, match=f"the prompt has .*max_model_len={max_model_len} leaves room for"):
        inputs.process("r", "a" * 15_000_000, SamplingParams(**given))
    tokenizer: Any = inputs.tokenizer
    assert tokenizer.num_characters <= 2 * 4 * max_model_len + 2**15


def test_long_texts_that_fit_are_tokenised_once():
    inputs = wide(max_model_len=400_000)
    (request,) = inputs.process("r", "a" * 399_990, SamplingParams(max_tokens=1))
    assert len(request.prompt_token_ids) == 399_991
    tokenizer: Any = inputs.tokenizer
    assert tokenizer.num_characters == 399_990
    short = wide(max_model_len=32).process("r", "a" * 2**16, SamplingParams(truncate_prompt_tokens=3))
    assert len(short[0].prompt_token_ids) == 3


def test_parameters_are_checked_once_and_shared():
    many = {"n": 1000, "logit_bias": dict.fromkeys(range(200), 1.0), "stop": [f"stop {i}" for i in range(10_000)]}
    params = SamplingParams(**many, seed=3, allowed_token_ids=list(range(200)), stop_token_ids=[7])
    num_checks = 0

    class Counting(InputProcessor):
        def _check_params(self, params: SamplingParams) -> None:
            nonlocal num_checks
            num_checks += 1
            super()._check_params(params)

    inputs = Counting(TOKENIZER, vocab_size=VOCAB_SIZE, max_model_len=32)  # pyright: ignore[reportArgumentType]
    items = inputs.process_batch([[1], [2]], params, request_ids=["x", "y"])
    assert num_checks == 1
    children = [child for item in items for child in item.children]
    assert len(children) == 2000
    for name in ("logit_bias", "stop", "allowed_token_ids", "stop_token_ids", "bad_words_token_ids"):
        assert len({id(getattr(child.sampling_params, name)) for child in children}) == 1, name
        assert getattr(children[0].sampling_params, name) is not getattr(params, name), name
    assert len({id(child.stop_token_ids) for child in children}) == 1
    assert [child.sampling_params.seed for child in items[1].children] == list(range(3, 1003))
    # One message tells the core of all of them, and their parameters are read there once.
    data = wire.encode(wire.Add.of(list(range(1000)), items[0].children))
    assert len(data) < 60_000
    message = wire.decode_to_core(data)
    assert isinstance(message, wire.Add)
    read = message.requests()
    assert [request.sampling_params.seed for request in read] == list(range(3, 1003))
    assert [request.request_id for request in read] == [child.request_id for child in items[0].children]
    assert len({id(request.sampling_params.logit_bias) for request in read}) == 1
    assert read[0].sampling_params.logit_bias == params.logit_bias


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_halves_of_surrogate_pairs_are_refused_everywhere(text):
    wrong: list[dict[str, Any]] = [{"stop": text}, {"stop": [text]}, {"bad_words": [text]}]
    for fields in wrong:
        with pytest.raises(ValueError, match="not valid Unicode"):
            SamplingParams(**fields)
    wrong = [{"regex": text}, {"choice": [text]}, {"grammar": text}]
    for fields in wrong:
        with pytest.raises(ValueError, match="not valid Unicode"):
            StructuredOutputsParams(**fields)
    with pytest.raises(ValueError, match="not valid Unicode"):
        processor().process("r", text)


def test_what_messages_quote_is_short():
    long = "x\n" * 1_000_000
    for call in (
        lambda: SamplingParams(stop=[long, ""]),
        lambda: SamplingParams(temperature=long),  # pyright: ignore[reportArgumentType]
        lambda: SamplingParams(temperature=10**400),
        lambda: SamplingParams(n=10**5000),
        lambda: SamplingParams(stop=[long], detokenize=False),
        lambda: processor().process("r", [1], SamplingParams(bad_words=[long])),
        lambda: normalize_prompts({"prompt": "a", long: 1}),  # pyright: ignore[reportArgumentType]
        lambda: StructuredOutputsParams(json=long),
        lambda: render_chat(TOKENIZER, [{"role": long, "content": "x"}]),  # pyright: ignore[reportArgumentType]
        lambda: render_chat(TOKENIZER, [{"role": "user", "content": [long, 5]}]),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        assert len(str(caught.value)) < 600
        assert "\n" not in str(caught.value)
