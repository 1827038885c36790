"""A tokenizer with the methods of transformers' fast tokenizers that the engine uses, without importing transformers.

That import alone would be half of a start; `tokenizers`, which does the work, is imported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from tokenizers import Tokenizer

from jaxengine.loading.chat_template import render_template


class Encoded(dict[str, Any]):
    """What calling the tokenizer gives: `input_ids` and `attention_mask`, as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class LightTokenizer:
    """Wraps a `tokenizers.Tokenizer` in the interface of `transformers.PreTrainedTokenizerFast`.

    Attributes:
        backend_tokenizer: Does the work; its post-processor adds BOS and EOS where the model wants them.
        name_or_path: Where it comes from.
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: None where the model has none.
        chat_template: Jinja template, or templates by name ("default", "tool_use", ...), or None.
        all_special_ids: Ids that `skip_special_tokens` leaves out, ascending.
    """

    is_fast = True

    def __init__(
        self,
        backend: Tokenizer,
        *,
        name_or_path: str = "",
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        unk_token_id: int | None = None,
        special_ids: Iterable[int] = (),
        chat_template: str | dict[str, str] | None = None,
    ):
        self.backend_tokenizer = backend
        self.name_or_path = name_or_path
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self.pad_token_id, self.unk_token_id = pad_token_id, unk_token_id
        self.chat_template = chat_template
        self.all_special_ids = sorted(special_ids)
        self._special_ids = frozenset(self.all_special_ids)

    def __repr__(self) -> str:
        return f"LightTokenizer(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size})"

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Tokens in all; every special token is part of the model's vocabulary."""
        return len(self)

    @property
    def bos_token(self) -> str | None:
        """Beginning of a text."""
        return self._token(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        """End of a text."""
        return self._token(self.eos_token_id)

    @property
    def pad_token(self) -> str | None:
        """Padding."""
        return self._token(self.pad_token_id)

    @property
    def unk_token(self) -> str | None:
        """What cannot be written otherwise."""
        return self._token(self.unk_token_id)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that exist; chat templates see them as variables."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        return {name: token for name in names if (token := getattr(self, name)) is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The tokens of `all_special_ids`, in the same order."""
        return [token for token in map(self._token, self.all_special_ids) if token is not None]

    def get_vocab(self) -> dict[str, int]:
        """Returns all tokens, in the model's own spelling, with their ids."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Returns the tokens that are looked for in the text before anything else."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items()}

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True, **_: Any) -> Encoded:
        """Tokenises one text or several; see `encode`.

        Returns:
            `input_ids` and `attention_mask`: a list of ints for one text, a list of such lists for several.
        """
        if isinstance(text, str):
            ids: Any = self.encode(text, add_special_tokens)
            return Encoded(input_ids=ids, attention_mask=[1] * len(ids))
        encodings = self.backend_tokenizer.encode_batch(list(text), add_special_tokens=add_special_tokens)
        ids = [encoding.ids for encoding in encodings]
        return Encoded(input_ids=ids, attention_mask=[[1] * len(row) for row in ids])

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        """Tokenises one text. Special tokens written in the text become their ids.

        Args:
            text: The text.
            add_special_tokens: Add BOS and EOS where the model wants them.
        """
        # A batch lets other threads run meanwhile; and this one leaves out places in the text, which nobody asks for.
        (encoding,) = self.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """Returns the text of one id or of several; bytes that are no valid UTF-8 become U+FFFD."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(token_id) for token_id in token_ids]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Returns what `decode` gives for each of several sequences."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    def tokenize(self, text: str, add_special_tokens: bool = False, **_: Any) -> list[str]:
        """Returns the tokens of a text, in the model's own spelling."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).tokens

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str | None]: ...
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Returns tokens in the model's own spelling (`Ġthe`, `▁the`); None for ids that the vocabulary lacks."""
        if isinstance(ids, int):
            return self._token(ids)
        skipped = self._special_ids if skip_special_tokens else ()
        return [self._token(token_id) for token_id in map(int, ids) if token_id not in skipped]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Returns the ids of tokens; the unknown token's id (None without one) for those that the vocabulary lacks."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Returns the text of tokens in the model's own spelling."""
        decoder = self.backend_tokenizer.decoder
        return decoder.decode(list(tokens)) if decoder is not None else " ".join(tokens)

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """Returns the template to use: the one given (a template, or the name of one), else the model's.

        Raises:
            ValueError: The model has no chat template, or none of that name.
        """
        own = self.chat_template
        templates = own if isinstance(own, dict) else {"default": own} if own else {}
        if chat_template is not None:
            return templates.get(chat_template, chat_template)
        name = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if name not in templates:
            found = f"its templates are named {', '.join(templates)}" if templates else "it has none"
            raise ValueError(f"chat_template is None, and {self.name_or_path} has no default chat template: {found}")
        return templates[name]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """Writes messages as the model was trained to see them; see `render_template`.

        Args:
            conversation: The messages of one conversation, or a list of conversations.
            tools, documents, add_generation_prompt, continue_final_message: As for `render_template`.
            chat_template: Instead of the model's own.
            tokenize: Return ids instead of text, without adding BOS (templates write their own).
            return_dict: With `tokenize`, return `Encoded` instead of the bare ids.
            variables: Further variables of the template.
        """
        template = self.get_chat_template(chat_template, tools)
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        texts = [
            render_template(
                template,
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.special_tokens_map, **variables},
            )
            for messages in (conversation if batched else [conversation])
        ]
        if not tokenize:
            return texts if batched else texts[0]
        encoded = self(texts if batched else texts[0], add_special_tokens=False)
        return encoded if return_dict else encoded["input_ids"]

    def _token(self, token_id: int | None) -> str | None:
        return None if token_id is None or token_id < 0 else self.backend_tokenizer.id_to_token(token_id)
