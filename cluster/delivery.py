"""From outcomes to results that are kept: a thread, because a disk takes milliseconds to promise anything.

Everything that ended while the disk was busy is committed together.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass

from cluster.requests import Finished, RequestStore
from polytrace.certificate import Receipt
from polytrace.errors import ServiceError
from polytrace.wire import result_header
from scheduling.plan import Program, RequestId

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A program whose saves are all in its result file."""

    program: Program
    receipt: Receipt


class Delivery:
    """Takes what ended, in any number, and commits it. `run_forever` is the body of its thread."""

    def __init__(self, store: RequestStore, ended: Callable[[set[RequestId]], None]) -> None:
        self._store = store
        self._ended = ended
        self._queue: queue.SimpleQueue[Done | Finished | None] = queue.SimpleQueue()

    def put(self, end: Done | Finished) -> None:
        """Any thread; returns at once."""
        self._queue.put(end)

    def run_forever(self) -> None:
        """Until `stop`, and then until everything put before it is kept."""
        while (ends := self._take()) is not None:
            finished = [_finished(end) for end in ends]
            self._store.finish(finished)
            self._ended({end.request for end in finished})

    def stop(self) -> None:
        self._queue.put(None)

    def _take(self) -> list[Done | Finished] | None:
        """All that is there, at least one; None after `stop`."""
        ends: list[Done | Finished] = []
        while not ends or not self._queue.empty():
            end = self._queue.get()
            if end is None:
                if not ends:
                    return None
                self._queue.put(None)
                break
            ends.append(end)
        return ends


def _finished(end: Done | Finished) -> Finished:
    if isinstance(end, Finished):
        return end
    try:
        header = result_header(end.program.saves, end.receipt, end.program.result_start)
    except ValueError as error:
        _log.exception("the receipt of %s could not be written", end.program.request)
        return Finished(request=end.program.request, error=ServiceError(str(error)))
    return Finished(request=end.program.request, header=header)
