"""From outcomes to results that are kept, and word of how far the others are.

A thread, because a disk takes milliseconds to promise anything. Everything that ended while the disk was busy is
committed together.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.requests import Finished, Place, RequestStore, left_by
from cluster.results import end_of, without_holes
from polytrace.certificate import Receipt
from polytrace.errors import RunError, ServiceError
from polytrace.wire import result_header
from scheduling.plan import Program, RequestId, SaveSlot
from scheduling.scheduler import Progress
from scheduling.step_saves import all_slots

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A program whose saves are all in its result file."""

    program: Program
    receipt: Receipt
    saves: tuple[SaveSlot, ...] = ()  # of a generation: those that came


class Delivery:
    """Takes what ended, in any number, and commits it; word of progress goes with it. The body of a thread."""

    def __init__(self, store: RequestStore, ended: Callable[[set[RequestId]], None]) -> None:
        self._store = store
        self._ended = ended
        self._queue: queue.SimpleQueue[Done | Finished | Progress | None] = queue.SimpleQueue()

    def put(self, end: Done | Finished | Progress) -> None:
        """Any thread; returns at once."""
        self._queue.put(end)

    def run_forever(self) -> None:
        """Until `stop`, and then until everything put before it is kept."""
        while (taken := self._take()) is not None:
            progress = [told for told in taken if isinstance(told, Progress)]
            if progress:
                self._store.note_progress(progress)
            finished = [_finished(end) for end in taken if not isinstance(end, Progress)]
            if finished:
                self._store.finish(finished)
                self._ended({end.request for end in finished})

    def stop(self) -> None:
        self._queue.put(None)

    def _take(self) -> list[Done | Finished | Progress] | None:
        """All that is there, at least one; None after `stop`."""
        ends: list[Done | Finished | Progress] = []
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
    came = end.program.saves if end.program.chain is None else end.saves
    returned = without_holes(slot for slot in came if slot.keep is None)
    try:
        header = result_header(returned, end.receipt, end.program.result_start)
    except ValueError as error:
        request = end.program.request
        _log.exception("the receipt of %s could not be written", request, extra={"request": request})
        return Finished(request=end.program.request, error=ServiceError(str(error)))
    receipt = end.receipt
    for slot in came:
        if slot.file is not None and _is_short(slot, end.program):
            told = f"{slot.name!r} was to be kept and came out as {list(slot.facts.shape)}: its generation ended early"
            return Finished(
                request=end.program.request,
                error=RunError(told),
                passes=len(receipt.passes),
                tokens=receipt.tokens,
                token_layers=receipt.token_layers,
                run_seconds=receipt.run_seconds,
            )
    places = (
        Place(left=left_by(slot), path=Path(slot.file), start=slot.offset) for slot in came if slot.file is not None
    )
    return Finished(
        request=end.program.request,
        header=header,
        size=end.program.result_start + end_of(returned),
        left=tuple(places),
        passes=len(receipt.passes),
        generated=receipt.generated,
        tokens=receipt.tokens,
        token_layers=receipt.token_layers,
        moved_bytes=receipt.moved_bytes,
        run_seconds=receipt.run_seconds,
        token_layers_alone=receipt.token_layers_alone,
        saves=tuple(slot for slot in end.saves if slot.keep is None),
    )


def _is_short(slot: SaveSlot, program: Program) -> bool:
    """Whether a value came out smaller than its file was made for."""
    planned = next(own for own in all_slots(program) if own.name == slot.name)
    return planned.facts.shape != slot.facts.shape
