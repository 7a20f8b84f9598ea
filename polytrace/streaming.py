"""Tokens of a generation as they come: to a function that hears them, or to a loop.

A generation runs when its block ends, so a loop over its tokens has the block in a thread of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from polytrace.certificate import Token
from polytrace.continuations import new_text
from polytrace.errors import PolytraceError
from polytrace.graph import Invoke
from polytrace.tracebacks import shorten

_CUT = "\ufffd"  # how a tokenizer spells bytes that are no character yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece(Token):
    """A token, and the text that it adds to its sequence: nothing where a character is not whole yet."""

    text: str = ""


class Pieces:
    """Makes pieces of tokens, which come in their order."""

    def __init__(self, tokenizer: Any, invokes: Sequence[Invoke]) -> None:
        self._tokenizer = tokenizer
        self._invokes = invokes
        self._ids: dict[tuple[int, int], list[int]] = {}  # by invoke and sequence: new tokens so far
        self._texts: dict[tuple[int, int], str] = {}  # ... and their text, as far as it is told

    def of(self, tokens: Iterable[Token]) -> Iterator[Piece]:
        """A piece for each token."""
        for token in tokens:
            known = {field.name: getattr(token, field.name) for field in fields(Token)}
            yield Piece(**known, text=self._text(token))

    def _text(self, token: Token) -> str:
        if self._tokenizer is None:
            return ""
        key = (token.invoke, token.sequence)
        ids = self._ids.setdefault(key, [])
        ids.append(token.id)
        text = new_text(self._tokenizer, self._invokes[token.invoke].sequences[token.sequence], ids)
        if text.endswith(_CUT) and token.finish is None:
            return ""
        before = self._texts.get(key, "")
        self._texts[key] = text
        return text[len(before) :]


class _LeftError(Exception):
    """Nobody listens any more."""


def streamed(run: Callable[[Callable[[Piece], None]], None]) -> Iterator[Piece]:
    """What `run`, in a thread of its own, hands to the function that it is given. Raises what it raises.

    When the loop is left, so is the generation, with its next token.
    """
    heard: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
    has_left = threading.Event()

    def hear(piece: Piece) -> None:
        if has_left.is_set():
            raise _LeftError
        heard.put(piece)

    def work() -> None:
        try:
            run(hear)
            heard.put(None)
        except BaseException as error:  # noqa: BLE001  it is raised where the loop is
            heard.put(error)

    thread = threading.Thread(target=work, name="polytrace-stream", daemon=True)
    thread.start()
    try:
        while (piece := heard.get()) is not None:
            if isinstance(piece, BaseException):
                if isinstance(piece, PolytraceError):
                    shorten(piece)
                raise piece
            yield piece
    finally:
        has_left.set()
        thread.join()
