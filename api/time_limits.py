"""A worker does nothing for longer than it may: code of a library that runs on and on is ended from inside."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from polytrace.errors import TooLargeError

_SOON_S = 1e-3  # a timer of 0 would be none


class _TooLongError(BaseException):
    """Goes through whoever handles errors of a program: code of models may catch every Exception."""


@contextmanager
def within(seconds: float, told: str) -> Iterator[None]:
    """Raises TooLargeError, which says what was `told`, when the block takes longer. Blocks may stand in one another:
    the one outside has its own time still. Only in a process' main thread; in others there are no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, ring)
    outer_s, _ = signal.getitimer(signal.ITIMER_REAL)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, min(seconds, outer_s) if outer_s else seconds)
    try:
        yield
    except _TooLongError:
        raise TooLargeError(told) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s:
            signal.setitimer(signal.ITIMER_REAL, max(_SOON_S, outer_s - (time.monotonic() - began)))
