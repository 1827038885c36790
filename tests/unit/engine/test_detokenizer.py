"""Incremental text is exactly that of decoding everything at once; stop strings are found wherever they are."""

from __future__ import annotations

import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxengine.engine.detokenizer import IncrementalDetokenizer
from jaxengine.engine.token_streams import TokenPieces
from jaxengine.sampling_params import RequestOutputKind, SamplingParams

SPECIALS = ["<s>", "</s>", "<|im end|>"]  # one with a space, which the byte alphabet does not have


class Wrapped:
    """The part of transformers' fast tokenizers that detokenising uses (importing transformers takes seconds)."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend

    def decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) -> str:
        return self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def finish(backend: Tokenizer) -> Wrapped:
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return Wrapped(backend)


def byte_level() -> Wrapped:
    """All 256 bytes, and merges that leave characters split: halves of two-byte ones, the lead of three-byte ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["he", "ll", "Ġw", "ld", "ab", "bc", "ĠĠ", "Ċ", "Ã©", "âĤ", "ðŁĺ", "ĺĢa", "Ã©Ã", "nd", "Ġand", "st", "op"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *joined]))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return finish(backend)


def byte_fallback(strip: bool = True) -> Wrapped:
    pieces = ["▁", "▁hello", "llo", "▁the", "a", "b", "ab", "c", "é", "日", "▁▁", "st", "op", "<0xZZ>", "▁<0x41>"]
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return finish(backend)


def word_level(decoder: object) -> Wrapped:
    """Decoders without a fast path: the window of tokens."""
    words = ["▁", "▁hello", "llo", "▁the", "a", "b", "##b", "c", "é", "日", "▁▁", "st", "op", ".", "##st", "'", "s"]
    backend = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
    return finish(backend)


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "byte_fallback_no_strip": byte_fallback(strip=False),
    "metaspace": word_level(decoders.Metaspace()),
    "word_piece": word_level(decoders.WordPiece()),
    "no_decoder": word_level(None),
}
PIECES = {name: TokenPieces(tokenizer) for name, tokenizer in TOKENIZERS.items()}  # pyright: ignore[reportArgumentType]
NAMES = list(TOKENIZERS)


def id_of(name: str, token: str) -> int:
    token_id = TOKENIZERS[name].backend_tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def params_of(**fields) -> SamplingParams:
    return SamplingParams(max_tokens=None, **fields)


def is_whole(name: str, token_ids: list[int], skip: bool) -> bool:
    """Whether a prompt ends with a whole character and not with a byte token, which later ones could change."""
    pieces = [PIECES[name].table(skip)[i] for i in token_ids] if name in NAMES[:3] else []
    return isinstance(([""] + [piece for piece in pieces if piece])[-1], str)


def token_lists(name: str, max_size: int = 24) -> st.SearchStrategy[list[int]]:
    backend = TOKENIZERS[name].backend_tokenizer
    # The last id has no token: embedding tables are padded.
    anything = st.integers(0, backend.get_vocab_size())
    specials = st.sampled_from([id_of(name, text) for text in [*SPECIALS, "<tool>"]])
    text = st.text(alphabet="helo wabdé€日😀\u0301\n", max_size=6).map(lambda text: bytes_tokens(name, text))
    parts = st.one_of(anything.map(lambda i: [i]), specials.map(lambda i: [i]), text)
    return st.lists(parts, max_size=max_size).map(lambda lists: [i for part in lists for i in part])


def bytes_tokens(name: str, text: str) -> list[int]:
    """A text's bytes as one token each, where the tokenizer has them."""
    if name == "byte_level":
        to_character = {piece: i for i in range(256) if isinstance(piece := byte_of(i), int)}
        return [to_character[byte] for byte in text.encode()]
    return list(text.encode()) if name.startswith("byte_fallback") else []


def byte_of(token_id: int) -> int | None:
    piece = PIECES["byte_level"].piece(token_id)
    data = piece.encode() if isinstance(piece, str) else piece
    return data[0] if len(data) == 1 else None


def expected_text(name: str, prompt: list[int], output: list[int], skip: bool) -> str:
    decode = TOKENIZERS[name].decode
    before = decode(prompt, skip_special_tokens=skip)
    everything = decode(prompt + output, skip_special_tokens=skip)
    assert everything.startswith(before)
    return everything[len(before) :]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_text_is_that_of_decoding_everything(name, data):
    skip = data.draw(st.booleans())
    prompt = data.draw(token_lists(name, 4).filter(lambda ids: is_whole(name, ids, skip)))
    output = data.draw(token_lists(name))
    detokenizer = IncrementalDetokenizer(PIECES[name], params_of(skip_special_tokens=skip), prompt)
    seen = ""
    for place, token_id in enumerate(output):
        assert detokenizer.update([token_id]) is None
        seen += detokenizer.next_delta()
        assert detokenizer.text == seen
        if name == "byte_level":
            # Nothing waits longer than a character: only bytes that begin one may be missing.
            so_far = expected_text(name, prompt, output[: place + 1], skip)
            assert so_far.removeprefix(seen) in ("", "\ufffd", "\ufffd\ufffd")
    assert detokenizer.update([], finished=True) is None
    seen += detokenizer.next_delta()
    assert detokenizer.text == seen == expected_text(name, prompt, output, skip)


@pytest.mark.parametrize("name", NAMES[:3])
@given(text=st.text(max_size=40))
@settings(max_examples=40, deadline=None)
def test_split_characters_never_show(name, text):
    token_ids = bytes_tokens(name, text.replace("\ufffd", ""))
    detokenizer = IncrementalDetokenizer(PIECES[name], params_of(), [])
    for token_id in token_ids:
        detokenizer.update([token_id])
        assert "\ufffd" not in detokenizer.next_delta()
    detokenizer.finish()
    assert "\ufffd" not in detokenizer.next_delta()
    assert detokenizer.text == TOKENIZERS[name].decode(token_ids)


def oracle(pieces: list[str], stops: list[str], min_tokens: int, include: bool) -> tuple[str, str | None, int]:
    """Brute force: adds the text a character at a time and looks at all stop strings each time."""
    text = ""
    for place, piece in enumerate(pieces):
        for character in piece:
            text += character
            found = [stop for stop in stops if text.endswith(stop)]
            if found and place >= min_tokens:
                stop = max(found, key=len)
                return (text if include else text[: -len(stop)]), stop, place + 1
    return text, None, len(pieces)


@given(
    output=token_lists("byte_level", 12).map(lambda ids: [i for i in ids if i < len(SPECIALS) + 200]),
    letters=st.lists(st.sampled_from("ab c"), max_size=30),
    stops=st.lists(st.text(alphabet="ab c", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
    group=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_against_brute_force(output, letters, stops, include, min_tokens, group):
    pieces = PIECES["byte_level"]
    backend = TOKENIZERS["byte_level"].backend_tokenizer
    by_text = {pieces.text_of(i): i for i in range(backend.get_vocab_size())}
    output = [by_text[c] for c in letters[::2]] + output[:3] + [by_text["ab"], by_text["bc"]]
    output += [by_text[c] for c in letters[1::2]]
    plain = IncrementalDetokenizer(pieces, params_of(), [])
    texts = []
    for token_id in output:
        plain.update([token_id])
        texts.append(plain.next_delta())
    plain.finish()
    texts[-1] += plain.next_delta()
    expected, expected_stop, expected_tokens = oracle(texts, stops, min_tokens, include)

    params = params_of(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    detokenizer = IncrementalDetokenizer(pieces, params, [])
    seen, found = "", None
    for start in range(0, len(output), group):
        found = detokenizer.update(output[start : start + group], finished=start + group >= len(output))
        seen += detokenizer.next_delta()
        assert expected.startswith(seen), "text was shown that had to be taken back"
        if found is not None:
            break
    assert (seen, found, detokenizer.num_tokens) == (expected, expected_stop, expected_tokens)
    assert detokenizer.text == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_only_what_may_begin_a_stop_string_is_held_back(name):
    detokenizer = IncrementalDetokenizer(PIECES[name], params_of(stop=["bcd", "b!"]), [])
    token = {PIECES[name].text_of(i): i for i in range(TOKENIZERS[name].backend_tokenizer.get_vocab_size())}
    detokenizer.update([token["a"]])
    assert detokenizer.next_delta() == "a"
    detokenizer.update([token["ab"]])
    assert detokenizer.next_delta() == "a"
    assert detokenizer.text == "aa"
    detokenizer.update([token["c"]])
    assert detokenizer.next_delta() == ""
    detokenizer.update([token["a"]])
    assert detokenizer.next_delta() == "bca"
    detokenizer.update([token["b"]])
    detokenizer.finish()
    assert detokenizer.next_delta() == "b"
    assert detokenizer.text == "aabcab"


def test_leading_space_depends_on_the_prompt():
    token = partial(id_of, "byte_fallback")
    for prompt, expected in ((["a"], " hello the"), (["<s>"], "hello the"), ([], "hello the")):
        detokenizer = IncrementalDetokenizer(PIECES["byte_fallback"], params_of(), [token(t) for t in prompt])
        detokenizer.update([token("▁hello"), token("▁the")], finished=True)
        assert detokenizer.text == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_prompt_that_ends_within_a_character(name):
    first, *rest = bytes_tokens(name, "€")
    completed = IncrementalDetokenizer(PIECES[name], params_of(), [first])
    completed.update(rest, finished=True)
    assert completed.text == "€"
    other = IncrementalDetokenizer(PIECES[name], params_of(), [first])
    other.update(bytes_tokens(name, "é!"), finished=True)
    assert other.text == "é!"


@pytest.mark.parametrize(
    "data", [b"\xed\xa0", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xff\xe2\x82", b"\xc3\xc3", b"\xf5\x80"]
)
def test_bytes_that_are_not_utf8(data):
    """Half a surrogate and the like: as many U+FFFD as the tokenizer's own decoder writes, before and at the end."""
    by_byte = {byte: i for i in range(256) if (byte := byte_of(i)) is not None}
    for token_ids in ([by_byte[b] for b in data], [by_byte[b] for b in data + b"ab"]):
        detokenizer = IncrementalDetokenizer(PIECES["byte_level"], params_of(), [])
        detokenizer.update(token_ids, finished=True)
        assert detokenizer.text == TOKENIZERS["byte_level"].decode(token_ids)


def test_incomplete_character_is_flushed_at_the_end():
    for name in NAMES[:3]:
        token_ids = bytes_tokens(name, "a😀")[:-1]
        detokenizer = IncrementalDetokenizer(PIECES[name], params_of(), [])
        detokenizer.update(token_ids)
        assert "\ufffd" not in detokenizer.text
        detokenizer.finish()
        assert detokenizer.text == TOKENIZERS[name].decode(token_ids)


def test_stop_tokens_text_is_left_out_unless_asked_for():
    token = partial(id_of, "byte_level")
    for include, expected in ((False, "ab"), (True, "ab</s>")):
        params = params_of(skip_special_tokens=False, include_stop_str_in_output=include)
        detokenizer = IncrementalDetokenizer(PIECES["byte_level"], params, [])
        detokenizer.update([token("ab"), token("</s>")], finished=True, stop_token=True)
        assert detokenizer.text == expected
        assert detokenizer.num_tokens == 2


def test_spaces_between_special_tokens():
    token_ids = [id_of("no_decoder", t) for t in ("a", "<s>", "</s>", "b")]
    for spaces, expected in ((True, "a <s> </s> b"), (False, "a <s></s> b")):
        params = params_of(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        detokenizer = IncrementalDetokenizer(PIECES["no_decoder"], params, [])
        detokenizer.update(token_ids, finished=True)
        assert detokenizer.text.strip() == expected


@pytest.mark.parametrize("detokenize", [True, False])
def test_without_detokenising_there_is_no_text(detokenize):
    tokenizer = None if detokenize else PIECES["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, params_of(detokenize=detokenize), [])
    detokenizer.update([1, 2, 3], finished=True)
    assert (detokenizer.text, detokenizer.next_delta(), detokenizer.num_tokens) == ("", "", 3)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace"])
def test_work_per_token_does_not_grow_with_the_length(name):
    """Quadratic work would make the second half of a long text several times slower than the first."""
    params = params_of(stop=["never seen"], output_kind=RequestOutputKind.DELTA)
    detokenizer = IncrementalDetokenizer(PIECES[name], params, [])
    token_id = id_of(name, "a")
    times = []
    for _ in range(8):
        start = time.process_time()
        for _ in range(800):
            detokenizer.update([token_id])
            detokenizer.next_delta()
        times.append(time.process_time() - start)
    assert min(times[4:]) < 3 * min(times[:4])


def test_text_of_single_tokens():
    token = partial(id_of, "byte_fallback")
    assert PIECES["byte_fallback"].text_of(token("▁hello")) == " hello"
    assert PIECES["byte_fallback"].text_of(token("<0x41>")) == "A"
    assert PIECES["byte_fallback"].text_of(token("<0xE2>")) == "\ufffd"
    assert PIECES["byte_level"].text_of(id_of("byte_level", "Ġw")) == " w"
    assert PIECES["byte_level"].text_of(100_000) == ""
