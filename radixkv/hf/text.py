"""The text of a request as its tokens come, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Iterable
from reprlib import repr as shown
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from radixkv.errors import InvalidArgument

__all__ = ["Text", "check_stop_strings", "check_tokenizer"]

_BEFORE = 6
"""Tokens of the prompt that the decoder is shown: some decide whether a space comes first."""


def check_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """The `tokenizers.Tokenizer` of a fast tokenizer of transformers, or itself."""
    inner = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    if inner is not None and not isinstance(inner, Tokenizer):
        raise InvalidArgument(
            f"tokenizer is {shown(tokenizer)}: give AutoTokenizer.from_pretrained(...) or a tokenizers.Tokenizer"
        )
    return inner


def check_stop_strings(strings: Any, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Strings that end a request; they need a tokenizer."""
    if isinstance(strings, str) or not isinstance(strings, Iterable):
        raise InvalidArgument(f"stop_strings is {shown(strings)}: give a sequence of strings, such as ['\\n\\n']")
    found = tuple(strings)
    for i, string in enumerate(found):
        if not isinstance(string, str) or not string:
            raise InvalidArgument(f"stop_strings[{i}] is {shown(string)}: give a string of one character or more")
    if found and tokenizer is None:
        raise InvalidArgument("stop_strings need text: make the Generator with tokenizer=AutoTokenizer...")
    return found


class Text:
    """What one request has said so far, in pieces, without what stopped it.

    The tokenizers library's own stream decodes: a character that is spread over several tokens comes with the last of
    them. What may be the beginning of a stop string is held back until more has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop_strings: tuple[str, ...]) -> None:
        self.pieces: list[str] = []
        self._tokenizer, self._stops, self._held = tokenizer, stop_strings, ""
        self._stream = DecodeStream(ids=prompt[-_BEFORE:].tolist(), skip_special_tokens=True)

    def add(self, token: int) -> bool:
        """Append a token's text; whether a stop string has come."""
        piece = self._stream.step(self._tokenizer, token)
        if not piece:
            return False
        text = self._held + piece
        ends = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        keep = min(ends) if ends else len(text) - self._begun(text)
        self._held = "" if ends else text[keep:]
        if keep:
            self.pieces.append(text[:keep])
        return bool(ends)

    def finish(self) -> None:
        """No more tokens will come: what was held back is text."""
        if self._held:
            self.pieces.append(self._held)
            self._held = ""

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
