"""Builds the tokenizer that a GGUF file's metadata describes, by the rules of llama.cpp (`src/llama-vocab.cpp`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from jaxengine.loading.light_tokenizer import LightTokenizer

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Regular expressions that split a text into words, as the models' own tokenizer.json files have them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = _CASED % ("", "", r"\p{N}")
_GPT4O = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", r"\p{N}{1,3}")
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

# `tokenizer.ggml.pre` -> expressions, each applied to the pieces that the ones before it leave.
_DIGITS_GPT2 = (r"\p{N}", _GPT2)
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS_GPT2
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
        (_LLAMA3,),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_GPT4O,)),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"),
}
# A word that is a token is taken whole, whatever the merges; and BOS is added unless the file says otherwise.
_WHOLE_WORDS_AND_BOS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "tekken"})

# Tokens that end a turn, which some files do not name in their metadata.
_END_TEXTS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("<eos>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOT>"),
)


def check_tokens(metadata: dict[str, Any], path: str | Path) -> None:
    """Raises ValueError if a key that describes the tokenizer has another type than it should, or another length."""

    def check(key: str, what: str, is_right: Callable[[Any], bool]) -> None:
        value = metadata.get(key)
        if value is not None and not is_right(value):
            raise ValueError(f"{path}: metadata {key} is {value!r:.100}, expected {what}")

    def is_list_of(*kinds: type) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, list) and set(map(type, value)) <= set(kinds)

    for key in ("tokens", "merges"):
        check(_KEY + key, "a list of texts", is_list_of(str))
    check(f"{_KEY}token_type", "a list of integers", is_list_of(int))
    check(f"{_KEY}scores", "a list of numbers", is_list_of(float, int))
    for key in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        check(f"{_KEY}{key}_token_id", "an integer", lambda value: type(value) is int)
    for key in ("model", "pre"):
        check(_KEY + key, "a text", lambda value: isinstance(value, str))
    check("tokenizer.chat_templates", "a list of texts", is_list_of(str))
    num_tokens = len(metadata.get(f"{_KEY}tokens") or [])
    for key in ("token_type", "scores"):
        check(_KEY + key, f"one for each of {num_tokens} tokens", lambda value: not value or len(value) == num_tokens)


def end_of_generation_ids(metadata: dict[str, Any]) -> list[int]:
    """Returns the ids that end generation.

    EOS comes first, then the ends of a turn or of a message, named by the file or known by text.

    Args:
        metadata: Of the GGUF file.
    """
    tokens: list[str] = metadata.get(f"{_KEY}tokens", [])
    types: list[int] | None = metadata.get(f"{_KEY}token_type")
    ids = [_named_ids(metadata)["eos"], metadata.get(f"{_KEY}eot_token_id"), metadata.get(f"{_KEY}eom_token_id")]
    wanted = set(_END_TEXTS)
    ids += [i for i, token in enumerate(tokens) if token in wanted and (types is None or types[i] == _CONTROL)]
    return list(dict.fromkeys(i for i in ids if i is not None and 0 <= i < len(tokens)))


def gguf_tokenizer(metadata: dict[str, Any], path: str | Path) -> LightTokenizer:
    """Builds the tokenizer.

    Args:
        metadata: Of the GGUF file.
        path: The file, for messages.

    Raises:
        ValueError: The vocabulary is missing, or its kind or pre-tokenizer is unknown; lists those that are known.
    """
    tokens: list[str] | None = metadata.get(f"{_KEY}tokens")
    if not tokens:
        raise ValueError(f"{path} has no {_KEY}tokens: it holds no tokenizer")
    model = metadata.get(f"{_KEY}model")
    if model == "gpt2":
        backend, add_bos = _byte_level_bpe(metadata, tokens, path)
    elif model == "llama":
        backend, add_bos = _sentencepiece_bpe(metadata, tokens), True
    else:
        raise ValueError(f"{path} has {_KEY}model {model!r}; known are 'gpt2' (byte-level BPE) and 'llama' (SPM)")
    ids = _named_ids(metadata)
    special_ids = _add_tokens(backend, metadata, tokens, {i for i in ids.values() if i is not None})
    add_bos = metadata.get(f"{_KEY}add_bos_token", add_bos)
    _add_template(backend, tokens, ids["bos"] if add_bos else None, metadata, ids["eos"])
    return LightTokenizer(
        backend,
        name_or_path=str(path),
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        unk_token_id=ids["unk"],
        special_ids=special_ids,
        chat_template=_chat_template(metadata),
    )


def _named_ids(metadata: dict[str, Any]) -> dict[str, int | None]:
    """Returns the ids of BOS, EOS, padding and unknown.

    Where the file names none they are llama.cpp's defaults for SPM, and none for the others.
    """
    defaults = {"bos": 1, "eos": 2, "unk": 0} if metadata.get(f"{_KEY}model") == "llama" else {}
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: metadata.get(f"{_KEY}{key}_token_id", defaults.get(name)) for name, key in keys.items()}
    size = len(metadata.get(f"{_KEY}tokens", []))
    return {name: i if i is not None and 0 <= i < size else None for name, i in ids.items()}


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) == len(tokens) and "" not in vocabulary:
        return vocabulary
    # Some files pad the vocabulary with empty or repeated tokens; each must keep its id.
    vocabulary = {}
    for i, token in enumerate(tokens):
        vocabulary[token if token and token not in vocabulary else f"[UNUSED_{i}]"] = i
    return vocabulary


def _byte_level_bpe(metadata: dict[str, Any], tokens: list[str], path: str | Path) -> tuple[Tokenizer, bool]:
    """Returns a GPT-2-like tokenizer, and whether its pre-tokenizer asks for BOS."""
    pre = metadata.get(f"{_KEY}pre", "default")
    if pre not in _SPLITS:
        raise ValueError(f"{path} has {_KEY}pre {pre!r}; known are {', '.join(sorted(_SPLITS))}")
    if f"{_KEY}merges" not in metadata:
        raise ValueError(f"{path} has no {_KEY}merges: its tokenizer is incomplete")
    # A piece may begin with a space, so the separator is the first one after the first character.
    merges: Any = [(merge[: (i := merge.find(" ", 1))], merge[i + 1 :]) for merge in metadata[f"{_KEY}merges"]]
    backend = Tokenizer(BPE(_vocabulary(tokens), merges, ignore_merges=pre in _WHOLE_WORDS_AND_BOS))
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend, pre in _WHOLE_WORDS_AND_BOS


def _sentencepiece_bpe(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Returns a SentencePiece BPE tokenizer.

    Of all neighbours, the pair that makes the best-scored token merges first.
    """
    vocabulary = _vocabulary(tokens)
    types = metadata.get(f"{_KEY}token_type") or [_NORMAL] * len(tokens)
    scores = metadata.get(f"{_KEY}scores") or [-float(i) for i in range(len(tokens))]
    mergeable = [i for i, kind in enumerate(types) if kind in (_NORMAL, _USER_DEFINED, _UNUSED)]
    mergeable.sort(key=lambda i: -scores[i])  # stable: equal scores by id
    merges = []
    for token in (tokens[i] for i in mergeable):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    unknown = _named_ids(metadata)["unk"]
    unk_token = tokens[unknown] if unknown is not None else None
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get(f"{_KEY}add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(undo)  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _add_tokens(backend: Tokenizer, metadata: dict[str, Any], tokens: list[str], named: set[int]) -> set[int]:
    """Makes the tokenizer find control and user-defined tokens in texts; returns the ids of the special ones."""
    types = metadata.get(f"{_KEY}token_type") or [_NORMAL] * len(tokens)
    special = {i for i, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN)}
    special |= named | set(end_of_generation_ids(metadata))
    user_defined = [i for i, kind in enumerate(types) if kind == _USER_DEFINED and i not in special]
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    backend.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in user_defined])
    return special


def _add_template(
    backend: Tokenizer, tokens: list[str], bos: int | None, metadata: dict[str, Any], eos: int | None
) -> None:
    """Adds BOS before and EOS after each text, where wanted."""
    if not metadata.get(f"{_KEY}add_eos_token", False):
        eos = None
    ends = [(tokens[i], i) for i in (bos, eos) if i is not None]
    if not ends:
        return
    before, after = [tokens[bos]] if bos is not None else [], [tokens[eos]] if eos is not None else []
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *before, "$B:1", *after], special_tokens=ends
    )
    backend.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]


def _chat_template(metadata: dict[str, Any]) -> str | dict[str, str] | None:
    default = metadata.get("tokenizer.chat_template")
    names = metadata.get("tokenizer.chat_templates") or []
    named = {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names}
    templates = {name: template for name, template in named.items() if isinstance(template, str)}
    if not templates:
        return default if isinstance(default, str) else None
    return templates | ({"default": default} if isinstance(default, str) else {})
