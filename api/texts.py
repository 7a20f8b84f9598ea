"""From tokens, one after another, to text that is never taken back.

A character may take several tokens, and a stop text too: what could still become another character, or the beginning of
a stop text, is held back until it is known. All pieces together are the text of all tokens behind their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"  # how the bytes of half a character read
_CONTEXT = 8  # tokens of the prompt that the first new one is read behind
_MAX_HELD = 16  # tokens without a whole character among them; more are no text, and it is told which bytes are broken
_BYTES = 4  # of a character, so that as many tokens may be one


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that have no text of their own."""
    return frozenset(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)


class TextStream:
    """The text of one sequence. `tokenizer`: a `tokenizers.Tokenizer`, whose `special` tokens are left out."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids = [token for token in prompt[-_CONTEXT:] if token not in special]
        self._first = 0  # tokens from here on are read together
        self._read = len(self._ids)  # ... and the text of those from here on has not been given

    def add(self, token: int) -> str:
        """What is sure of the text now and was not before."""
        if token in self._special:
            return ""
        self._ids.append(token)
        before, now = self._decoded(self._read), self._decoded(len(self._ids))
        if len(now) > len(before) and not now.endswith(_BROKEN):
            return self._given(len(self._ids), now, before)
        if len(self._ids) - self._read > _MAX_HELD:
            for stop in range(len(self._ids) - _BYTES, len(self._ids) - 2 * _BYTES, -1):
                if now.startswith(sure := self._decoded(stop)) and len(sure) > len(before):
                    return self._given(stop, sure, before)
        return ""

    def rest(self) -> str:
        """What is left at the end, half characters too."""
        return self._given(len(self._ids), self._decoded(len(self._ids)), self._decoded(self._read))

    def _given(self, stop: int, text: str, before: str) -> str:
        self._first, self._read = self._read, stop
        return text[len(before) :]

    def _decoded(self, stop: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._first : stop], skip_special_tokens=True))


class StopCutter:
    """Cuts a text that comes in pieces before the first of the stop texts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_over = False

    def add(self, piece: str) -> str:
        """What is sure to stand before every stop text."""
        if self.is_over:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_over, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back and is no stop text after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters a stop text begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
