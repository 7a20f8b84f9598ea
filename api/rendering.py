"""Conversations rendered by the service, for clients that send messages: in a worker, in a sandbox, within limits.

The template is the model's own; a request cannot bring another. What it sees is plain data (`polytrace.chat`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from polytrace.chat import render
from polytrace.description import ChatFormat
from polytrace.errors import ContextError, GraphError, TooLargeError, UserError

RENDER_S = 2.0
MAX_CHARS = 4 << 20  # of what a template writes


class _TimeIsUp(BaseException):
    """Not an Exception: neither the template nor Jinja may take it for one of theirs."""


def rendered(format: ChatFormat | None, messages: Sequence[Mapping[str, Any]], chat: Mapping[str, Any]) -> str:
    """One conversation as text. Raises UserError for what the template refuses, TooLargeError beyond the limits."""
    if format is None or not format.templates:
        raise UserError("this model came without a chat template: send a prompt to /v1/completions")
    try:
        with _time_limit(RENDER_S):
            text = render(format, [_with_text(message) for message in messages], chat)
    except GraphError as error:
        raise UserError(error.message) from error  # no line of the user's is to blame
    except _TimeIsUp:
        raise TooLargeError(
            f"the model's chat template took longer than {RENDER_S:g} s for this conversation"
        ) from None
    if len(text) > MAX_CHARS:
        raise ContextError(f"the conversation is {len(text)} characters long; at most {MAX_CHARS} are taken")
    return text


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one text, where it came in parts."""
    if not isinstance(message.get("role"), str):
        raise UserError("a message has a role, which is a text")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "\n".join(map(_text, content))}
    if not (content is None or isinstance(content, str)):
        raise UserError(f"a message's content is a text or parts of text, not a {type(content).__name__}")
    return dict(message)


def _text(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(f"parts of a message are texts; {str(kind)[:40]!r} is not possible here")
    return str(part["text"])


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends what runs inside after so many seconds; in a process' main thread, where a worker does its work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
