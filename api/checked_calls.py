"""In a worker: what calls of a model that is called as it is visit, and what they keep for gradients, within a time.

Code of the model's library runs to find it out, on tensors without data. Nobody may hold a worker up with a call that
makes it run for long. Imports torch: workers alone import it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from engine.whole_sites import CallSites
from engine.whole_tapes import CallTapes
from polytrace.description import SiteInfo
from polytrace.errors import TooLargeError
from polytrace.graph import Inputs, Request
from polytrace.tensors import RawTensor
from scheduling.plan import Program
from scheduling.whole import inputs_of_all

PATIENCE_S = 60.0  # for all calls of one request, or one question


class CheckedCalls:
    """Of one model. What is asked raises TooLargeError where it takes too long."""

    def __init__(self, meta: nn.Module, max_tensor_bytes: int, patience_s: float = PATIENCE_S) -> None:
        self._sites = CallSites(meta, max_tensor_bytes)
        self._tapes = CallTapes(self._sites)
        self._patience_s = patience_s

    def of(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> tuple[tuple[SiteInfo, ...], bool]:
        """The sites of one call, and whether its values were looked at."""
        with within(self._patience_s):
            return self._sites.of(inputs, constants), self._sites.has_looked(inputs, constants)

    def of_all(self, request: Request) -> list[tuple[SiteInfo, ...]]:
        """The sites of each call of a request."""
        with within(self._patience_s):
            return [self._sites.of(inputs, request.constants) for inputs in inputs_of_all(request)]

    def tape_bytes(self, program: Program, of_invokes: Sequence[tuple[SiteInfo, ...]]) -> int:
        """What its calls keep for gradients, as of `CallTapes`."""
        with within(self._patience_s):
            return self._tapes.num_bytes(program, of_invokes)


class _TooLong(BaseException):
    """Ends whatever runs. Code of models that catches every Exception lets it through."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TooLargeError when what is inside takes longer. In a process' main thread, where a worker does its work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong:
        raise TooLargeError(
            f"what these calls visit was not found out within {seconds:g} s: send fewer, or smaller ones"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
