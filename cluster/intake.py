"""From stored requests to programs: a thread, so that working out a large graph does not hold up the passes of others.

Owns what the controller has claimed and not yet ended: never more than `max_active`, the rest waits in the store. A
request that an earlier controller broke down with runs alone: the one that breaks shards takes no neighbour along. What
comes out are events for the loop: a program to add, a request to cancel, or one that ended before it began.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from cluster.contents import with_contents
from cluster.facts import RecordedFacts
from cluster.known_programs import KnownPrograms, WorkedOut, known
from cluster.requests import Claimed, Finished, RequestStore, left_by, read_request
from cluster.results import room_for, with_files
from polytrace.description import ModelDescription
from polytrace.errors import CancelledError, PolytraceError, ServiceError, WireError
from scheduling.plan import Program, RequestId
from scheduling.program import owned
from scheduling.step_saves import data_bytes
from scheduling.working_out import work_out

_log = logging.getLogger(__name__)

CLAIMS_AT_ONCE = 4  # worked out before it looks who is next: another tenant's may have come
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
        shares_across_tenants: bool = False,  # rows and prefixes: as of `DeploymentSpec.share_across`
    ) -> None:
        self._shares_across_tenants = shares_across_tenants
        self._store = store
        self._description = description
        self._emit = emit
        self._max_active = max_active
        self._active: set[RequestId] = set()
        self._claims: dict[RequestId, Claimed] = {}  # of the active ones
        self._known = KnownPrograms()
        self._again: queue.SimpleQueue[RequestId] = queue.SimpleQueue()
        self._cancelled: set[RequestId] = set()
        self._suspect: Claimed | None = None  # claimed, and waiting to be alone
        self._alone: RequestId | None = None  # while it is active nothing else is taken
        self._lock = threading.Lock()
        self._is_stopped = False

    def run_forever(self) -> None:
        """Until `stop`."""
        self._store.wait_for_requests(0.0)  # listens from now on: what came before is seen by the first look
        while not self._is_stopped:
            self._take_requests()
            while not self._again.empty():
                self._emit(self._work_out(self._claims[self._again.get()]))
            self._see_cancellations()
            self._store.wait_for_requests(RECHECK_S)

    def ended(self, requests: set[RequestId]) -> None:
        """Makes room for others. Any thread."""
        with self._lock:
            had_no_room = self._room() <= 0
            self._active -= requests
            for request in requests:
                self._claims.pop(request, None)
            self._cancelled -= requests
        if had_no_room:
            self._store.interrupt()

    def limit_passes(self, pass_tokens: int) -> None:
        """Requests that are worked out from now on take passes of at most so many rows. Any thread."""
        limits = self._description.limits
        if pass_tokens < limits.pass_tokens:
            self._description = replace(self._description, limits=replace(limits, pass_tokens=pass_tokens))

    def work_out_again(self, request: RequestId) -> None:
        """One that was handed over before, for the passes that there are now. Any thread."""
        self._again.put(request)
        self._store.interrupt()

    def stop(self) -> None:
        self._is_stopped = True
        self._store.interrupt()

    def _take_requests(self) -> None:
        """Claims what there is room for. A suspect waits until it is alone, and everything else until it has ended."""
        while True:
            with self._lock:
                if self._suspect is not None and self._active == {self._suspect.request}:
                    claims, self._suspect = [self._suspect], None
                elif (room := self._room()) > 0:
                    claims = self._store.claim(self._description.name, min(room, CLAIMS_AT_ONCE))
                    self._active.update(claimed.request for claimed in claims)
                    self._claims.update((claimed.request, claimed) for claimed in claims)
                    if claims and claims[0].is_suspect:
                        self._suspect, self._alone = claims[0], claims[0].request
                        continue
                else:
                    return
            if not claims:
                return
            for claimed in claims:
                self._emit(self._work_out(claimed))

    def _room(self) -> int:
        return 0 if self._alone in self._active else self._max_active - len(self._active)

    def _see_cancellations(self) -> None:
        for request in self._store.cancellations(self._description.name):
            with self._lock:
                is_news = request in self._active and request not in self._cancelled
                self._cancelled.add(request)
                is_waiting = self._suspect is not None and self._suspect.request == request
                if is_waiting:
                    self._suspect = None
            if is_waiting:
                self._emit(Finished(request=request, error=CancelledError("the request was cancelled")))
            elif is_news:
                self._emit(Cancel(request=request))

    def _work_out(self, claimed: Claimed) -> Program | Finished:
        try:
            began = time.perf_counter()
            program = self._program(claimed)
            self._store.note_planning(claimed.request, time.perf_counter() - began)
            return program
        except PolytraceError as error:
            return Finished(request=claimed.request, error=error)
        except Exception as error:  # noqa: BLE001  one request must not end the controller
            about = {"request": claimed.request, "tenant": claimed.tenant}
            _log.exception("request %s could not be worked out", claimed.request, extra=about)
            return Finished(
                request=claimed.request,
                error=ServiceError(f"the request could not be worked out: {type(error).__name__}"),
            )

    def _program(self, claimed: Claimed) -> Program:
        if claimed.request in self._cancelled:  # before it was worked out again
            raise CancelledError("the request was cancelled")
        worked_out = self._worked_out(claimed)
        program = owned(
            worked_out.program,
            claimed.tenant,
            is_interactive=claimed.is_interactive,
            shares_across_tenants=self._shares_across_tenants,
        )
        place = self._store.place_result(claimed.request, worked_out.room, data_bytes(program))
        return with_files(
            self._placed(program),
            contents=worked_out.contents,
            request_file=str(claimed.path),
            result_file=place.target,
            result_start=place.start,
        )

    def _worked_out(self, claimed: Claimed) -> WorkedOut:
        description = self._description
        try:
            one = known(claimed, description)
            if one is not None and (found := self._known.find(one, claimed.request)) is not None:
                return found
            request = read_request(claimed.path, max_nodes=description.limits.max_nodes)
        except (WireError, OSError) as error:  # it was whole when it was accepted
            raise ServiceError(f"the stored request cannot be read: {error}") from error
        request, contents = with_contents(request, claimed.contents, claimed.states)
        recorded = RecordedFacts(claimed.facts)
        program, _ = work_out(claimed.request, request, recorded.described(description), recorded.infer)
        program = recorded.taped(program)
        room = room_for(program, request, description.num_layers)
        worked_out = WorkedOut(program=program, room=room, contents=contents)
        if one is not None:
            self._known.keep(one, worked_out)
        return worked_out

    def _placed(self, program: Program) -> Program:
        """The program with the files that saves go to which stay on the service."""
        parts = () if program.chain is None else program.chain.parts
        kept = [slot for own in (program, *parts) for slot in own.saves if slot.keep is not None]
        if not kept:
            return program
        places = iter(self._store.place_left(program.request, [left_by(slot) for slot in kept]))

        def placed(own: Program) -> Program:
            saves = []
            for slot in own.saves:
                if slot.keep is not None:
                    place = next(places)
                    slot = replace(slot, file=str(place.path), offset=place.start)
                saves.append(slot)
            return replace(own, saves=tuple(saves))

        program = placed(program)
        if program.chain is None:
            return program
        return replace(program, chain=replace(program.chain, parts=tuple([placed(part) for part in parts])))
