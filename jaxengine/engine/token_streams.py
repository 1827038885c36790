"""Token ids to text, one token at a time, with exactly the text that decoding them all at once would give.

A tokenizer's decoder decides how:

- byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM): a token is some bytes, the text is their UTF-8 decoding;
- SentencePiece with byte fallback (Llama 2, Mistral, Gemma, Phi-3): a token is some text, or one byte `<0xE2>`;
- anything else: the tokenizer decodes a short window of tokens, again and again.

The first two are table look-ups in Python, several times faster than a call into the tokenizer for each token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are not UTF-8."""
MAX_UTF8_BYTES = 4


class TokenStream(Protocol):
    """The text of one sequence of tokens, as it grows."""

    def step(self, token_id: int) -> str:
        """Takes the next token; returns the text that is certain now ("" while a character is incomplete)."""
        ...

    def flush(self) -> str:
        """Returns the text of what is still incomplete: there will be no more tokens."""
        ...


class TokenPieces(Mapping[int, str]):
    """A tokenizer's tokens as pieces of text or bytes, looked up once and shared by all requests.

    As a mapping it gives every token's text on its own: `text_of`.

    Attributes:
        tokenizer: The tokenizer.
        kind: "byte_level", "byte_fallback" or "window": which stream decodes its tokens.
        added_tokens: Token id -> text of the tokens that were added to the vocabulary, special or not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.added_tokens: dict[int, str] = {}
        self.kind, self._replacements, self.max_strip = "window", [], 0
        self._special_texts: frozenset[str] = frozenset()
        self._special_ids: frozenset[int] = frozenset()
        self._token_of: Callable[[int], str | None] = lambda token_id: None
        if backend is not None and hasattr(backend, "get_added_tokens_decoder"):
            added = backend.get_added_tokens_decoder()
            self.added_tokens = {token_id: token.content for token_id, token in added.items()}
            self._special_texts = frozenset(token.content for token in added.values() if token.special)
            self._token_of = backend.id_to_token
            if backend.decoder is not None:
                self._read_decoder(json.loads(backend.decoder.__getstate__()))
        else:
            self._special_ids = frozenset(tokenizer.all_special_ids)
        self._tables = {skip: _PieceTable(self, skip) for skip in (False, True)}
        self._texts: dict[int, str] = {}

    def _read_decoder(self, decoder: dict[str, Any]) -> None:
        """Recognises the decoders that the two fast streams reproduce; any other stays with the window."""
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        names = [step["type"] for step in steps]
        if names == ["ByteLevel"]:
            self.kind = "byte_level"
            return
        replacements = []
        while names and names[0] == "Replace" and "String" in steps[0]["pattern"]:
            replacements.append((steps[0]["pattern"]["String"], steps[0]["content"]))
            names, steps = names[1:], steps[1:]
        if names[:2] != ["ByteFallback", "Fuse"] or names[2:] not in ([], ["Strip"]):
            return
        strip = steps[2] if len(steps) == 3 else {"content": " ", "start": 0, "stop": 0}
        # Text stripped from the end could only be told at the end; more than one character is not seen in practice.
        if strip["content"] == " " and strip["start"] <= 1 and strip["stop"] == 0:
            self.kind, self._replacements, self.max_strip = "byte_fallback", replacements, strip["start"]

    def table(self, skip_special_tokens: bool) -> _PieceTable:
        """Returns token id -> piece, for the two fast kinds: see `_PieceTable`."""
        return self._tables[skip_special_tokens]

    def text_of(self, token_id: int) -> str:
        """Returns one token's text on its own, spaces at its ends included; U+FFFD for part of a character."""
        text = self._texts.get(token_id)
        if text is None:
            if self.kind == "window":
                text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
                assert isinstance(text, str)
            else:
                piece = self._tables[False][token_id]
                text = piece if isinstance(piece, str) else piece.decode("utf-8", "replace")
            self._texts[token_id] = text
        return text

    def __getitem__(self, token_id: int) -> str:
        return self.text_of(token_id)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.tokenizer)

    def is_skipped(self, token_id: int) -> bool:
        """Returns whether the token is a special one, which `skip_special_tokens` leaves out."""
        return token_id in self._special_ids or self._token_of(token_id) in self._special_texts

    def piece(self, token_id: int) -> str | bytes:
        """Returns a token's text, or its bytes where these are not characters of their own."""
        token = self._token_of(token_id)
        if token is None:  # a row of the embedding table that pads the vocabulary
            return ""
        if self.kind == "byte_level":
            if all(character in _BYTE_OF for character in token):
                data = bytes(_BYTE_OF[character] for character in token)
                try:
                    return data.decode()
                except UnicodeDecodeError:
                    return data
            return token
        for old, new in self._replacements:
            token = token.replace(old, new)
        byte = _fallback_byte(token)
        return token if byte is None else byte

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> TokenStream:
        """Returns the stream of the tokens that follow a prompt.

        The prompt decides whether the first token's leading space is text, and may end within a character.
        """
        if self.kind == "window":
            return _WindowStream(self, prompt_token_ids, skip_special_tokens, spaces_between_special_tokens)
        stream_type = _ByteLevelStream if self.kind == "byte_level" else _ByteFallbackStream
        return stream_type(self, self.table(skip_special_tokens), prompt_token_ids)


class _PieceTable(dict[int, "str | bytes"]):
    """Token id -> text, or bytes that are part of a character; filled on use. Tokens left out are ""."""

    def __init__(self, pieces: TokenPieces, skip_special_tokens: bool) -> None:
        super().__init__()
        self._pieces = pieces
        self._skip_special_tokens = skip_special_tokens

    def __missing__(self, token_id: int) -> str | bytes:
        skipped = self._skip_special_tokens and self._pieces.is_skipped(token_id)
        piece = "" if skipped else self._pieces.piece(token_id)
        self[token_id] = piece
        return piece


class _ByteLevelStream:
    """UTF-8 decoding of the tokens' bytes; bytes that can never be UTF-8 become U+FFFD at once."""

    def __init__(self, pieces: TokenPieces, table: _PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._table = table
        self._pending = b""
        self._prompt_tail = _incomplete_tail(table, prompt_token_ids)

    def step(self, token_id: int) -> str:
        piece = self._table[token_id]
        if isinstance(piece, str):
            if piece and (self._pending or self._prompt_tail):
                # A token of whole characters cannot complete one.
                piece = self._pending.decode("utf-8", "replace") + piece
                self._pending = self._prompt_tail = b""
            return piece
        if self._prompt_tail:
            # The output begins within a character of the prompt only if its bytes really go on with it.
            piece = self._prompt_tail + piece if _may_be_utf8(self._prompt_tail + piece[:1]) else piece
            self._prompt_tail = b""
        data = self._pending + piece
        text, num_decoded = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[num_decoded:]
        return text

    def flush(self) -> str:
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text


class _ByteFallbackStream:
    """SentencePiece pieces; a run of byte tokens is text if all of it is UTF-8, else one U+FFFD a byte.

    So a run is certain only when another token ends it, and is held back until then.
    """

    def __init__(self, pieces: TokenPieces, table: _PieceTable, prompt_token_ids: Sequence[int]) -> None:
        self._table = table
        self._run: list[bytes] = []
        self._prompt_tail = _incomplete_tail(table, prompt_token_ids)
        # The decoder strips one space from the very beginning, which is the output's only if the prompt has no text.
        follows_text = any(table[token_id] for token_id in prompt_token_ids)
        self._num_strip = 0 if follows_text else pieces.max_strip

    def step(self, token_id: int) -> str:
        piece = self._table[token_id]
        if isinstance(piece, bytes):
            self._run.append(piece)
            return ""
        if not piece:
            return ""
        text = self._end_run() + piece if self._run else piece
        self._prompt_tail = b""
        return self._stripped(text) if self._num_strip else text

    def flush(self) -> str:
        return self._stripped(self._end_run()) if self._run else ""

    def _end_run(self) -> str:
        run = b"".join(self._run)
        # The tail of the prompt belongs to the character only if the output completes it.
        candidates = (self._prompt_tail + run, run) if self._prompt_tail else (run,)
        self._run, self._prompt_tail = [], b""
        for candidate in candidates:
            try:
                return candidate.decode()
            except UnicodeDecodeError:
                continue
        return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        num_strip, self._num_strip = self._num_strip, 0
        return text[1:] if num_strip and text.startswith(" ") else text


class _WindowStream:
    """Any other decoder: decodes the tokens since the last certain text, after the tokens of that text for context."""

    CONTEXT = 8  # tokens of the prompt that the first window begins with
    MAX_PENDING = 32  # tokens without certain text (bytes that never become a character) before it is given up

    def __init__(
        self, pieces: TokenPieces, prompt_token_ids: Sequence[int], skip_special_tokens: bool, spaces: bool
    ) -> None:
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._join_added = not skip_special_tokens and not spaces
        self._window = [t for t in prompt_token_ids if not (self._skip and pieces.is_skipped(t))][-self.CONTEXT :]
        self._num_context = len(self._window)
        self._context_text = self._decode(self._window)
        self._last_added = False

    def step(self, token_id: int) -> str:
        if self._skip and self._pieces.is_skipped(token_id):
            return ""
        self._window.append(token_id)
        if len(self._window) - self._num_context > self.MAX_PENDING:
            text = self.flush()
        else:
            text = self._decode(self._window)
            if len(text) <= len(self._context_text) or text.endswith(REPLACEMENT):
                return ""
            text = self._advance(text)
        return self._without_space(token_id, text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window)) if len(self._window) > self._num_context else ""

    def _advance(self, text: str) -> str:
        new_text = text[len(self._context_text) :]
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._context_text = self._decode(self._window)
        return new_text

    def _without_space(self, token_id: int, text: str) -> str:
        """Drops the space between two added tokens, where the decoder joins tokens with spaces."""
        added = self._pieces.added_tokens.get(token_id)
        neighbours, self._last_added = added is not None and self._last_added, added is not None
        return added if self._join_added and neighbours and added is not None else text

    def _decode(self, token_ids: list[int]) -> str:
        text = self._pieces.tokenizer.decode(
            token_ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _incomplete_tail(table: _PieceTable, prompt_token_ids: Sequence[int]) -> bytes:
    """Returns the bytes at the end of a prompt that begin a character and do not complete it."""
    tail = b""
    for token_id in reversed(prompt_token_ids):
        piece = table[token_id]
        if isinstance(piece, str):
            if piece:
                break
            continue
        tail = piece + tail
        if len(tail) >= MAX_UTF8_BYTES:
            break
    return tail[codecs.utf_8_decode(tail, "replace", False)[1] :]


def _may_be_utf8(data: bytes) -> bool:
    """Returns whether some bytes could follow to make `data` UTF-8."""
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _fallback_byte(token: str) -> bytes | None:
    """Returns the byte of a token like `<0xE2>`, None for any other."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return bytes.fromhex(token[3:5])
    except ValueError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest follows from U+0100 on.

    The table is part of GPT-2's vocabulary format (Radford et al. 2019).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
