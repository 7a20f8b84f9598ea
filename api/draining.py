"""Whether the service takes requests at all: one file in the store's folder, which all of its processes look at.

While it is there nothing new is accepted; what was accepted before is finished. An operator's drain lasts until an
operator ends it, also over restarts of the gateway; a stop's until the next start, which takes the file away.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from api.database import Database
from polytrace.codec import from_json, to_json
from polytrace.errors import CapacityError, ConflictError

COMING_BACK_S = 10.0  # from the end of a stop until its next start takes requests, at least
RETRY_S = 30.0  # where nobody has said how long it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining:
    """A drain that lasts. Times are seconds since the epoch."""

    since: float
    by: str  # tenant/user
    until: float | None = None  # when the service stops, whatever is left then; None: it goes on, drained


class Drain:
    """Begins and ends drains, and refuses what comes meanwhile. Any thread, any process."""

    def __init__(self, path: Path, db: Database, changed: Callable[[], None]) -> None:
        self._path = path
        self._db = db
        self._changed = changed

    def begin(self, by: str, *, until: float | None = None) -> Draining:
        """Nothing is accepted from its return on. One that lasts stays as it is, unless this one has an end."""
        known = self.now()
        if known is not None and until is None:
            return known
        begun = Draining(since=time.time() if known is None else known.since, by=by, until=until)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        part.write_text(json.dumps(to_json(begun)))
        part.replace(self._path)
        with self._db.transaction(is_durable=False):  # one writer at a time: who had looked before has accepted now
            pass
        self._changed()
        return begun

    def end(self) -> bool:
        """Requests are taken again; whether they were not. Raises ConflictError when the service is stopping."""
        known = self.now()
        if known is not None and known.until is not None:
            raise ConflictError("the service is stopping; it takes requests again after its next start")
        self.forget()
        self._changed()
        return known is not None

    def forget(self) -> None:
        """The service starts: it takes requests, whatever it did before."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def now(self) -> Draining | None:
        """The drain that lasts."""
        try:
            return from_json(Draining, json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return None

    def check(self) -> None:
        """Raises CapacityError with when to come again while there is one."""
        if (found := self.now()) is not None:
            told = "the service is stopping" if found.until is not None else "the service is drained"
            left = RETRY_S if found.until is None else max(0.0, found.until - time.time()) + COMING_BACK_S
            raise CapacityError(f"{told}: it finishes what it has and takes no new requests", retry_after_s=left)
