"""Incremental detokenising of one completion, and its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxengine.engine.stop_strings import StopStrings
from jaxengine.engine.token_streams import TokenPieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxengine.sampling_params import SamplingParams


class IncrementalDetokenizer:
    """The text of one completion while its tokens arrive.

    The text is, at every moment, what decoding the prompt and all tokens so far at once would add to the prompt's text,
    less an incomplete character at its end. Work and memory moved per token do not depend on the length so far.

    A stop string is found as if the text came one character at a time: the occurrence that ends first counts, and of
    two that end together the longer, however the text is split into tokens. Text of the first `min_tokens` tokens
    cannot end an occurrence.

    Args:
        tokenizer: The tokenizer, or its `TokenPieces` (to share their tables between requests); None gives text "".
        params: `detokenize`, `stop`, `min_tokens` and the options about special tokens are read.
        prompt_token_ids: The prompt, which the text continues.

    Attributes:
        num_tokens: Tokens taken so far, up to and with the one that completed a stop string.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | TokenPieces | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
    ) -> None:
        self.num_tokens = 0
        self._stream = None
        if tokenizer is not None and params.detokenize:
            pieces = tokenizer if isinstance(tokenizer, TokenPieces) else TokenPieces(tokenizer)
            self._stream = pieces.stream(
                prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        assert isinstance(params.stop, list)
        self._stops = StopStrings.of(params.stop) if params.stop else None
        self._stop_state = 0
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._chunks: list[str] = []  # all of the text
        self._length = 0
        self._num_delivered = 0  # characters given out by next_delta()
        self._finished = False

    def update(self, new_token_ids: Sequence[int], finished: bool = False, *, stop_token: bool = False) -> str | None:
        """Takes the next tokens.

        Args:
            new_token_ids: The tokens.
            finished: There will be no more; an incomplete character at the end becomes U+FFFD.
            stop_token: The last of them is an EOS or stop token, whose text is left out unless
                `include_stop_str_in_output`.

        Returns:
            The stop string that the text now ends with (or ended with: it is cut), which finishes the completion;
            tokens after the one that completed it are not taken. None if there is none.
        """
        if self._finished:
            return None
        found = None
        if self._stream is None:
            self.num_tokens += len(new_token_ids)
            self._finished = finished
            return None
        num_text_tokens = len(new_token_ids) - (1 if stop_token and not self._include_stop else 0)
        for place, token_id in enumerate(new_token_ids):
            self.num_tokens += 1
            if place < num_text_tokens:
                text = self._stream.step(token_id)
                if text and (found := self._append(text)) is not None:
                    return found
        if finished:
            found = self.finish()
        return found

    def finish(self) -> str | None:
        """Ends the text where it is, as `update` does when finished; returns a stop string that its last bytes make."""
        if self._finished:
            return None
        text = self._stream.flush() if self._stream is not None else ""
        found = self._append(text) if text else None
        self._finished = True
        return found

    @property
    def text(self) -> str:
        """The text so far, without what may yet turn out to be the beginning of a stop string."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        text = self._chunks[0] if self._chunks else ""
        return text[: self._length - self._num_held()]

    def next_delta(self) -> str:
        """Returns the part of `text` that no earlier call has returned."""
        end = self._length - self._num_held()
        num_unread = self._length - self._num_delivered
        taken: list[str] = []
        # From the back, so that the work is that of the new text.
        for chunk in reversed(self._chunks):
            if num_unread <= 0:
                break
            taken.append(chunk[-num_unread:])
            num_unread -= len(chunk)
        delta = "".join(reversed(taken))[: end - self._num_delivered]
        self._num_delivered = end
        return delta

    def _append(self, text: str) -> str | None:
        """Adds text; cuts it after the first stop string, finishes and returns that string if there is one."""
        self._chunks.append(text)
        self._length += len(text)
        if self._stops is None:
            return None
        if self.num_tokens <= self._min_tokens:
            self._stop_state = self._stops.skip(self._stop_state, text)
            return None
        self._stop_state, match = self._stops.search(self._stop_state, text)
        if match is None:
            return None
        self._cut(len(text) - match.end + (0 if self._include_stop else len(match.stop)))
        self._finished = True
        return match.stop

    def _cut(self, num_characters: int) -> None:
        """Removes characters from the end of the text."""
        self._length -= num_characters
        while num_characters and self._chunks:
            last = self._chunks.pop()
            if len(last) > num_characters:
                self._chunks.append(last[: len(last) - num_characters])
            num_characters = max(0, num_characters - len(last))

    def _num_held(self) -> int:
        """Characters at the end that begin a stop string and would have to be taken back if it were completed."""
        if self._stops is None or self._finished or self._include_stop:
            return 0
        return self._stops.num_held(self._stop_state)
