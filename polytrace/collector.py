"""Python's cycle collector, kept from looking through the whole process while a graph is worked on.

A graph is many small objects and no cycles. As they pile up, the collector goes through all that the process holds,
every module of torch among it, again and again: a third of a second each time, half the cost of a long graph.
"""

from __future__ import annotations

import gc
import threading
from types import TracebackType


class _YoungOnly:
    """A context in which the collector looks at the objects made since it began; contexts nest and overlap freely."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._is_ours = True  # False once somebody else is found to have frozen the heap: it is theirs to unfreeze

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1 and self._is_ours:
                self._is_ours = not gc.get_freeze_count()
                if self._is_ours:
                    gc.freeze()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._is_ours:
                gc.unfreeze()


young_only = _YoungOnly()
