"""Requests as received: their files, in the folder or among the objects too, and which are surely on the disk.

A request that is accepted may not be on the disk yet where its caller is told nothing of it; `secure` comes before
anybody is told.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Executor
from pathlib import Path

from api.away import AwayError
from api.database import Database
from api.disk import sync
from api.objects import Objects
from scheduling.plan import RequestId


class Received:
    """Its methods may be called from any thread."""

    def __init__(self, db: Database, folder: Path, objects: Objects | None, syncers: Executor) -> None:
        self._db = db
        self._folder = folder
        self._objects = objects
        self._syncers = syncers
        self._put: set[RequestId] = set()  # that this process has put among the objects and not accepted yet
        self._not_durable: set[RequestId] = set()  # that were accepted here and may not be on the disk yet
        self._are_open_durable = False  # whether all that this process found are on the disk

    def path(self, request: RequestId) -> Path:
        """Where the gateway writes a request as it arrives. Unless it is accepted it is swept at the next start."""
        return self._folder / f"{request}.safetensors"

    def sync(self, request: RequestId) -> None:
        """Makes the received file durable; `Store.add` follows."""
        if self._objects is not None:
            self._put.add(request)
            self._objects.put_file(_object_of(request), self.path(request))
            return
        sync(self.path(request))
        sync(self._folder)

    def begin(self, request: RequestId) -> None:
        """It is about to be accepted, and may not be on the disk then."""
        self._not_durable.add(request)

    def note_durable(self, *requests: RequestId) -> None:
        """They, or their ends, are on the disk, or they were not accepted: `secure` has nothing to do."""
        self._not_durable.difference_update(requests)

    def note_accepted(self, request: RequestId) -> None:
        """Its object stays."""
        self._put.discard(request)

    def secure(self, request: RequestId) -> None:
        """The request is on the disk; or its end is."""
        if request in self._not_durable or not self._are_open_durable:
            if self._objects is None:  # else it was put there already
                with contextlib.suppress(FileNotFoundError):
                    self.sync(request)
            self._db.settle()
            self._not_durable.discard(request)

    def secure_open(self) -> None:
        """All requests that wait or run are on the disk: a process before this one may have told nobody of some."""
        if self._objects is None:
            rows = self._db.rows("SELECT id FROM requests WHERE state IN ('queued', 'running')")
            list(self._syncers.map(self._sync_if_there, [RequestId(row[0]) for row in rows]))
            sync(self._folder)
        self._db.settle()
        self._are_open_durable = True

    def discard(self, request: RequestId) -> None:
        """Drops a received file that was not accepted."""
        self.path(request).unlink(missing_ok=True)
        if self._objects is not None and request in self._put:
            self._put.discard(request)
            self._syncers.submit(self._remove_object, request)  # callers do not wait for a network

    def bring(self, request: RequestId) -> None:
        """Its file is at hand, though another machine received it. A missing one fails the request later."""
        if self._objects is not None and not self.path(request).exists():
            self._objects.get_file(_object_of(request), self.path(request))

    def drop(self, request: RequestId) -> None:
        """It has ended. Raises AwayError when its object stays for now, which a sweep takes."""
        self.path(request).unlink(missing_ok=True)
        if self._objects is not None:
            self._objects.remove(_object_of(request))

    def _sync_if_there(self, request: RequestId) -> None:
        with contextlib.suppress(FileNotFoundError):
            sync(self.path(request))

    def _remove_object(self, request: RequestId) -> None:
        assert self._objects is not None
        with contextlib.suppress(AwayError):  # a sweep takes it
            self._objects.remove(_object_of(request))


def _object_of(request: RequestId) -> str:
    return f"requests/{request}.safetensors"
