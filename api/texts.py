"""From tokens, one after another, to text that is never taken back.

A character may take several tokens, and a stop text too: what could still become another character, or the beginning of
a stop text, is held back until it is known. All pieces together are the text of all tokens behind their prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"  # how the bytes of half a character read
_CONTEXT = 8  # tokens of the prompt that the first new one is read behind


class TextStream:
    """The text of one sequence. `tokenizer`: a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._first = 0  # tokens from here on are read together
        self._read = len(self._ids)  # ... and the text of those from here on has not been given

    def add(self, token: int) -> str:
        """What is sure of the text now and was not before."""
        self._ids.append(token)
        before, now = self._decoded(self._read), self._decoded(len(self._ids))
        if len(now) <= len(before) or now.endswith(_BROKEN):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left at the end, half characters too."""
        before, now = self._decoded(self._read), self._decoded(len(self._ids))
        self._first = self._read = len(self._ids)
        return now[len(before) :]

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
