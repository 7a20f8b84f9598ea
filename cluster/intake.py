"""From stored requests to programs: a thread, so that working out a large graph does not hold up the passes of others.

Owns what the controller has claimed and not yet ended: never more than `max_active`, the rest waits in the store.
What comes out are events for the loop: a program to add, a request to cancel, or one that ended before it began.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.requests import Claimed, Finished, RequestStore, read_request
from polytrace.codec import from_json
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError, ServiceError, WireError
from polytrace.wire import result_room
from scheduling.plan import Program, RequestId, ValueFacts
from scheduling.program import compile_program

_log = logging.getLogger(__name__)

RECHECK_S = 5.0  # looks again without a ring, in case one was lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """The owner of a claimed request wants it no more."""

    request: RequestId


IntakeEvent: TypeAlias = Program | Cancel | Finished


class Intake:
    """Claims, works out and hands over. `run_forever` is the body of its thread."""

    def __init__(
        self,
        store: RequestStore,
        description: ModelDescription,
        emit: Callable[[IntakeEvent], None],  # called on the intake's thread
        *,
        max_active: int,
    ) -> None:
        self._store = store
        self._description = description
        self._emit = emit
        self._max_active = max_active
        self._active: set[RequestId] = set()
        self._cancelled: set[RequestId] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    def run_forever(self) -> None:
        """Until `stop`."""
        name = self._description.name
        self._store.wait_for_requests(0.0)  # listens from now on: what came before is seen by the first look
        while not self._is_stopped:
            for claimed in self._store.claim(name, self._max_active - len(self._active)):
                with self._lock:
                    self._active.add(claimed.request)
                self._emit(self._work_out(claimed))
            for request in self._store.cancellations(name):
                with self._lock:
                    is_news = request in self._active and request not in self._cancelled
                    self._cancelled.add(request)
                if is_news:
                    self._emit(Cancel(request=request))
            self._store.wait_for_requests(RECHECK_S)

    def ended(self, requests: set[RequestId]) -> None:
        """Makes room for others. Any thread."""
        with self._lock:
            was_full = len(self._active) >= self._max_active
            self._active -= requests
            self._cancelled -= requests
        if was_full:
            self._store.interrupt()

    def stop(self) -> None:
        self._is_stopped = True
        self._store.interrupt()

    def _work_out(self, claimed: Claimed) -> Program | Finished:
        try:
            return self._program(claimed)
        except PolytraceError as error:
            return Finished(request=claimed.request, error=error)
        except Exception as error:  # noqa: BLE001  one request must not end the controller
            _log.exception("request %s could not be worked out", claimed.request)
            return Finished(
                request=claimed.request,
                error=ServiceError(f"the request could not be worked out: {type(error).__name__}"),
            )

    def _program(self, claimed: Claimed) -> Program:
        try:
            request = read_request(claimed.path, max_nodes=self._description.limits.max_nodes)
        except (WireError, OSError) as error:  # it was whole when it was accepted
            raise ServiceError(f"the stored request cannot be read: {error}") from error
        facts = tuple(None if plain is None else from_json(ValueFacts, plain) for plain in json.loads(claimed.facts))
        program = compile_program(claimed.request, request, self._description, facts)
        data_bytes = max((slot.offset + slot.facts.num_bytes for slot in program.saves), default=0)
        place = self._store.place_result(claimed.request, result_room(program.saves, program.graph), data_bytes)
        return replace(
            program,
            constants={},
            request_file=str(claimed.path),
            result_file=str(place.path),
            result_start=place.start,
        )
