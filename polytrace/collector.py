"""Python's cycle collector, kept from looking through the whole process while a graph is worked on.

A graph is many small objects and no cycles. As they pile up, the collector goes through all that the process holds,
every module of torch among it, again and again: a third of a second each time, half the cost of a long graph. And what
it looks at of the graph itself is a sixth of the rest, unless it waits for many of them.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_MANY = 50_000  # objects made before the collector looks at them


class _YoungOnly:
    """A context in which the collector looks, seldom, at the objects made since it began; contexts nest and overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._is_ours = True  # False once somebody else is found to have frozen the heap: it is theirs to unfreeze
        self._usual = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                # for good: the count is a walk over all that is frozen, a tenth of a second in a process of the service
                self._is_ours = self._is_ours and not gc.get_freeze_count()
                self._usual = gc.get_threshold()
                if self._usual[0]:  # zero: it is off
                    gc.set_threshold(max(_MANY, self._usual[0]), *self._usual[1:])
                if self._is_ours:
                    gc.freeze()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                gc.set_threshold(*self._usual)
                if self._is_ours:
                    gc.unfreeze()


young_only = _YoungOnly()


def settle() -> None:
    """At the edge of a process that has loaded what it works with: the collector never looks through that again."""
    gc.collect()
    gc.freeze()


@contextmanager
def uncollected() -> Iterator[None]:
    """Python looks for no garbage while the block imports, and what there is behind it counts as old at once.

    It would go through all modules over and over, for a quarter of the time that their imports take.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else it is somebody's, who unfreezes it
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()
