"""What nobody needs any more goes: files that a crash cut off, at the start, and requests whose time is over."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from api.fresh import drop_fresh
from api.status import IS_OVER
from api.store_parts import StoreParts
from cluster.requests import is_whole
from scheduling.plan import RequestId

_DROPPED_AT_ONCE = 500  # requests, so that others' transactions come in between


class Sweeping(StoreParts):
    """A part of the store."""

    def sweep(self) -> int:
        """Removes files that belong to no request: uploads and results that a crash cut off. How many.

        Only at the start, while nobody else has the store open.
        """
        self.restore_fresh()
        if self.objects is None:
            self._forget_torn()
        is_open = {row[0] for row in self._db.rows("SELECT id FROM requests WHERE state IN ('queued', 'running')")}
        is_done = {row[0] for row in self._db.rows("SELECT id FROM requests WHERE state = 'done'")}
        stale = [path for path in self._requests.iterdir() if path.stem not in is_open]
        stale += [path for path in self._results.iterdir() if path.stem not in is_done]
        for path in stale:
            path.unlink(missing_ok=True)
        self.contents.sweep()
        return len(stale) + self.events.sweep(is_open | is_done) + self._sweep_objects(is_open, is_done)

    def restore_fresh(self) -> None:
        """Results that ended just before a crash are in their files. Only while nobody else has the store open."""
        if self._fresh is not None:
            self._fresh.restore()

    def drop_ended(self, ended_before: float, but: Collection[RequestId] = ()) -> list[RequestId]:
        """Drops requests that ended before a time, but not these; `remove_files` follows. Which they were."""
        rows = self._db.rows(f"SELECT id FROM requests WHERE {IS_OVER} AND finished <= ?", (ended_before,))
        old = [RequestId(row[0]) for row in rows if row[0] not in but]
        for first in range(0, len(old), _DROPPED_AT_ONCE):
            some = [(request,) for request in old[first : first + _DROPPED_AT_ONCE]]
            with self._db.transaction(is_durable=False) as db:  # what a crash brings back goes another time
                db.executemany(f"DELETE FROM requests WHERE id = ? AND {IS_OVER}", some)
                db.executemany("DELETE FROM idempotency WHERE request = ?", some)
                drop_fresh(db, [one for (one,) in some])
        self.received.note_durable(*old)
        return old

    def remove_files(self, requests: Iterable[RequestId]) -> None:
        """Results and events of requests that were dropped."""
        for request in requests:
            self.results.drop(request)
            self.events.path(request).unlink(missing_ok=True)
            if self.objects is not None:
                self.objects.remove(f"events/{request}")

    def _forget_torn(self) -> None:
        """Keys of requests that nobody was told of, whose files a crash took: sent again they are new ones."""
        query = "SELECT request FROM idempotency JOIN requests ON id = request WHERE state IN ('queued', 'running')"
        torn = [row for row in self._db.rows(query) if not is_whole(self.request_path(RequestId(row[0])))]
        if torn:
            with self._db.transaction() as db:
                db.executemany("DELETE FROM idempotency WHERE request = ?", [(row[0],) for row in torn])

    def _sweep_objects(self, is_open: set[str], is_done: set[str]) -> int:
        if self.objects is None:
            return 0
        stale = [f"requests/{name}" for name in self.objects.names("requests") if name.partition(".")[0] not in is_open]
        stale += [f"results/{name}" for name in self.objects.names("results") if name not in is_done]
        stale += [f"events/{name}" for name in self.objects.names("events") if name not in is_done]
        self.objects.remove(*stale)
        return len(stale)
