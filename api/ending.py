"""Requests end: done, failed or cancelled, each exactly once, and what they leave has its names then.

A state changes in one transaction whose WHERE names the state it leaves; a result is on disk before its state is done.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence

from api import usage
from api.away import AwayError
from api.database import Transaction
from api.disk import allocate
from api.results import SMALL_BYTES
from api.status import RequestState, RequestStatus, statuses
from api.step_values import values_as_json
from api.store_parts import ABOUT, StoreParts, ended_of
from api.telling import Ended, tell_ended
from cluster.requests import Finished, LeftBehind, Place, ResultPlace
from polytrace.errors import CancelledError, CapacityError, PolytraceError, ServiceError, WireError
from polytrace.tensors import num_bytes
from polytrace.wire import content_header
from scheduling.plan import RequestId

_log = logging.getLogger(__name__)


class Ending(StoreParts):
    """A part of the store."""

    def cancel(self, request: RequestId) -> RequestStatus | None:
        """Cancels a waiting request at once and asks the controller to cancel a running one; a finished one stays."""
        error = CancelledError("the request was cancelled before it ran")
        with self._db.transaction() as db:
            gone = db.execute(
                "UPDATE requests SET state = 'cancelled', finished = ?, error = ? WHERE id = ? AND state = 'queued' "
                f"RETURNING id, {ABOUT}",
                (self.now(), json.dumps(error.to_fields()), request),
            ).fetchall()
            asked = db.execute(
                "UPDATE requests SET cancelled = 1 WHERE id = ? AND state = 'running'", (request,)
            ).rowcount
            if gone:
                db.execute("DELETE FROM facts WHERE id = ?", (request,))
                asked |= self.contents.uses.end(db, request)
        self.contents.collect()
        if gone:
            self._tell_over(gone, error)
            self._drop_behind(request, has_result=False)
            self.gateway_bell.ring()
        if asked:
            self.controller_bell.ring()
        return statuses(self._db, [request]).get(request)

    def refuse(self, model: str, error: PolytraceError) -> None:
        open_ = "model = ? AND state IN ('queued', 'running')"
        with self._db.transaction() as db:
            rows = db.execute(f"SELECT id, {ABOUT} FROM requests WHERE {open_}", (model,)).fetchall()
            refused = [row[0] for row in rows]
            db.execute(
                f"UPDATE requests SET state = 'failed', finished = ?, error = ? WHERE {open_}",
                (self.now(), json.dumps(error.to_fields()), model),
            )
            db.executemany("DELETE FROM facts WHERE id = ?", [(request,) for request in refused])
            for request in refused:
                self.contents.uses.end(db, request)
        self.contents.collect()
        self.gateway_bell.ring()
        self.controller_bell.ring()  # others may have waited for their states
        self._tell_over(rows, error)
        for request in refused:
            self.events.forget(request)
            self._drop_behind(request, has_result=False)

    def place_result(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        return self.results.place(request, room, data_bytes)

    def place_left(self, request: RequestId, left: Sequence[LeftBehind]) -> list[Place]:
        with self._db.transaction(is_durable=False) as db:
            paths = self.contents.kept.place(db, request, left)
        self.contents.collect()
        places = []
        for each, path in zip(left, paths, strict=True):
            header = content_header(each.dtype, each.shape)
            path.unlink(missing_ok=True)  # an earlier attempt's, which may be a content by now
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                allocate(fd, len(header) + num_bytes(each.dtype, each.shape))
                os.pwrite(fd, header, 0)
            except OSError as error:
                told = f"the service has no room for {each.name!r}, which is to stay there: {error.strerror}"
                raise CapacityError(told) from error  # its end drops what has been placed
            finally:
                os.close(fd)
            places.append(Place(left=each, path=path, start=len(header)))
        return places

    def finish(self, finished: Sequence[Finished]) -> None:
        began = self.now()
        # 1) the files, all of a burst at once; a result that cannot be kept fails its own request only
        are_small = all(end.size is not None and end.size <= SMALL_BYTES and not end.left for end in finished)
        ended = list((map if are_small and self._fresh is not None else self._syncers.map)(self._commit, finished))
        if any(end.header is not None and content is None for end, _, content in ended):
            self.results.settle()
        # 2) the states
        now = self.now()
        changed: list[Ended] = []
        are_awaited = False
        with self._db.transaction() as db:
            for end, digests, content in ended:
                if digests and _is_running(db, end.request):  # it may be told twice, and leaves its values once
                    end = self._leave(db, end, digests)
                state = (
                    RequestState.DONE
                    if end.error is None
                    else RequestState.CANCELLED
                    if isinstance(end.error, CancelledError)
                    else RequestState.FAILED
                )
                row = db.execute(
                    "UPDATE requests SET state = ?1, finished = CASE WHEN created > ?2 THEN created ELSE ?2 END, "
                    "error = ?3, logs = '[]', token_layers = ?4, moved_bytes = ?5, result_bytes = ?6, "
                    "passes_done = coalesce(?8, passes_done), passes = coalesce(?8, passes) "
                    "WHERE id = ?7 AND state = 'running' "
                    f"RETURNING {ABOUT}",
                    (
                        state.value,
                        now,
                        end.error and json.dumps(end.error.to_fields()),
                        end.token_layers,
                        end.moved_bytes,
                        (end.size or 0) if end.error is None else 0,
                        end.request,
                        end.passes,
                    ),
                ).fetchone()
                if row is not None:
                    usage.enter(db, end, row[:3], row[3], now)
                    db.execute("DELETE FROM facts WHERE id = ?", (end.request,))
                    if content is not None and end.error is None and self._fresh is not None:
                        self._fresh.enter(db, end.request, content)
                    are_awaited |= self.contents.uses.end(db, end.request)
                    changed.append(ended_of(end, row))
        self.gateway_bell.ring()
        self.contents.collect()
        if self._fresh is not None and changed:
            self._fresh.settle_soon()
        if are_awaited:
            self.controller_bell.ring()
        for each in changed:
            tell_ended(self.tally, each, now)
            if self.traces is not None:
                self.traces.tell(each, now, kept_from=began)
        # 3) what is no longer needed
        for end in finished:
            self._progress.forget(end.request)
            self.events.forget(end.request)
            self.results.forget(end.request)
        drop = self._drop_behind
        dropping = map if self.objects is None else self._syncers.map
        list(dropping(lambda one: drop(one.end.request, has_result=one.end.error is None), changed))

    def _commit(self, end: Finished) -> tuple[Finished, list[str], bytes | None]:
        """Writes the header of a complete result and makes its files durable; with the hashes of what it leaves, and
        a small result, which the database makes durable.
        """
        if end.header is None:
            return end, [], None
        try:
            digests = [self.contents.kept.commit(place) for place in end.left]
            values = values_as_json(end.request, end.saves, len(end.header), self.results)
            self.events.complete(end.request, end.generated, values)
            if end.generated and self.objects is not None:
                self.objects.put_file(f"events/{end.request}", self.events.path(end.request))
            content = self.results.commit(end.request, end.header, end.size)
        except (OSError, WireError) as error:
            told = ServiceError(f"the result could not be kept: {error}")
            return Finished(request=end.request, error=told), [], None
        return end, digests, content

    def _leave(self, db: Transaction, end: Finished, digests: Sequence[str]) -> Finished:
        """What a request leaves gets its names, all of it, or the request fails."""
        db.execute("SAVEPOINT leaving")
        try:
            self.contents.kept.leave(db, end.request, list(zip(end.left, digests, strict=True)))
        except (PolytraceError, OSError) as error:
            db.execute("ROLLBACK TO leaving")
            told = error if isinstance(error, PolytraceError) else ServiceError(f"what it keeps could not be: {error}")
            end = Finished(request=end.request, error=told)
        db.execute("RELEASE leaving")
        return end

    def _drop_behind(self, request: RequestId, *, has_result: bool) -> None:
        """Drops the file of a request that has ended, and what there is of its result if it has none."""
        try:
            self.received.drop(request)
            if not has_result:
                self.results.drop(request)
        except AwayError as error:  # the request has ended all the same, and a sweep takes what is left
            _log.warning("files of %s stay for now: %s", request, error, extra={"request": request})


def _is_running(db: Transaction, request: RequestId) -> bool:
    row = db.execute("SELECT 1 FROM requests WHERE id = ? AND state = 'running'", (request,)).fetchone()
    return row is not None
