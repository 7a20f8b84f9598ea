"""What all parts of the store stand on: the database and the folder, who wakes whom, and what is told of an end.

Owns their construction and their end. What is done with requests is in the parts: `api.accepting`, `api.handover`,
`api.ending`, `api.sweeping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from api.allowances import Allowances
from api.audit import Audit
from api.catalogue import Catalogue
from api.clock import SteadyClock
from api.contents import Contents
from api.database import Database, open_database
from api.doorbell import Doorbell
from api.draining import Drain
from api.edits import KeptEdits
from api.events import EventLog
from api.figures import class_of
from api.fresh import FreshResults
from api.keys import Keys
from api.objects import Objects
from api.otlp import Traces
from api.progress import ProgressNotes
from api.received import Received
from api.results import FileResults, ObjectResults, Results
from api.settings import DEFAULT_QUOTA_BYTES
from api.tally import Tally
from api.telling import Ended, tell_end
from api.tenants import Tenants
from cluster.requests import Finished
from polytrace.errors import PolytraceError
from scheduling.plan import RequestId

ABOUT = "tenant, user_name, model, tokens, is_interactive, created, started"  # of one that has ended, for `ended_of`


class StoreParts(Catalogue):
    """Its methods, and those of its parts, may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        *,
        database: str | None = None,
        objects: str | None = None,
        quota_bytes: int = DEFAULT_QUOTA_BYTES,
        clock: Callable[[], float] | None = None,
        counts_as: str = "gateway",
    ) -> None:
        """`database`: a URL as `open_database` takes it; None: a SQLite file in the folder. `objects`: a URL as
        `Objects` takes it, where everything durable is put; None: in the folder. `counts_as`: the role of this process,
        which no other has that counts anything.
        """
        self.folder = folder.resolve()
        self.now = clock or SteadyClock()  # seconds since the epoch
        for path in (self.folder, self._requests, self._results):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.tally = Tally(self.counts_path(counts_as))
        self.traces: Traces | None = None  # where an operator wants some
        self.controller_bell = Doorbell(self.folder / "controller.bell")
        self.gateway_bell = Doorbell(self.folder / "gateway.bell")
        self.events_bell = Doorbell(self.folder / "events.bell")  # rung at every step: it costs the gateway little
        opened = open_database(database or f"sqlite:///{self.folder / 'store.db'}")
        super().__init__(opened, ring_controller=self.controller_bell.ring, ring_gateway=self.gateway_bell.ring)
        self.tenants, self.keys = Tenants(opened, self.now), Keys(opened, self.now)
        self.audit = Audit(opened, self.now)
        self.edits = KeptEdits(opened)
        self.draining = Drain(self.folder / "draining", opened, self.gateway_bell.ring)
        self.objects = None if objects is None else Objects(objects)
        self.results: Results = FileResults(self._results) if self.objects is None else ObjectResults(self.objects)
        self.contents = Contents(opened, self.folder / "contents", quota_bytes, self.now, self.objects)
        self.events = EventLog(self.folder / "events")
        self._syncers = ThreadPoolExecutor(8, thread_name_prefix="store-sync")  # syncs of one burst share the journal
        self._fresh: FreshResults | None = None
        if isinstance(self.results, FileResults):
            self._fresh = FreshResults(opened, self.results, self._syncers)
        self.received = Received(opened, self._requests, self.objects, self._syncers)
        self.allowances = Allowances(opened, self.now)
        self._progress = ProgressNotes(
            opened,
            self.results,
            self.events,
            ring_gateway=self.gateway_bell.ring,
            ring_events=self.events_bell.ring,
        )

    def hold(self) -> bool:
        """Keeps other services from this store's database, until it is closed; False when another one has it."""
        return self._db.hold()

    def close(self) -> None:
        """Gives the files back. Nothing is lost without it."""
        if self._fresh is not None:
            self._fresh.close()
        self._syncers.shutdown()
        self.tally.save()
        if self.traces is not None:
            self.traces.close()
        self._db.close()
        self.controller_bell.close()
        self.gateway_bell.close()
        self.events_bell.close()

    def counts_path(self, role: str) -> Path:
        """Where a process of this role keeps what it has counted."""
        return self.folder / f"{role}.counts"

    def request_path(self, request: RequestId) -> Path:
        """A request as it was received."""
        return self.received.path(request)

    @property
    def database(self) -> Database:
        """For those who ask more than the store's own methods do."""
        return self._db

    @property
    def _requests(self) -> Path:
        return self.folder / "requests"

    @property
    def _results(self) -> Path:
        return self.folder / "results"

    def _tell_over(self, rows: Iterable[Sequence[Any]], error: PolytraceError) -> None:
        """Requests, as their rows say, have ended without a result."""
        now = self.now()
        for request, *about in rows:
            ended = ended_of(Finished(request=request, error=error), about)
            tell_end(self.tally, ended.model, class_of(ended.is_interactive), error)
            if self.traces is not None:
                self.traces.tell(ended, now)


def ended_of(end: Finished, about: Sequence[Any]) -> Ended:
    """`about`: what ABOUT names of the request's row."""
    tenant, user, model, tokens, is_interactive, created, started = about
    return Ended(end, tenant, user, model, bool(is_interactive), created, started, tokens)
