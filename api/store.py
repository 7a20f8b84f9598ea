"""Where requests and results are kept: one SQLite file and a folder. The gateway and the controller share it.

    store.db                      states, checked facts, and the deployments (`api.catalogue`)
    requests/<id>.safetensors     as received; gone once the request has ended
    results/<id>.safetensors      filled by the shards (`api.results`); complete when the state says done; it, the
                                  events and the state go some time after the end (`api.expiry`). The database has a
                                  small one too, until the file is on the disk (`api.fresh`)
    contents/<owner>/<hash>       what was uploaded or kept (`api.contents`)
    gateway.counts, controller.counts    what each has counted (`api.tally`)
    events/<id>                   what a generation tells while it runs (`api.events`)
    controller.bell, gateway.bell, events.bell    who wakes whom
    draining                      while nothing new is accepted (`api.draining`)

With a place of objects (`api.objects`) requests, contents and events of what has ended are there too, by the same
names, and results are there alone. The folder then holds only what is at hand: on another machine it fills itself.

Owns durability and the states: queued -> running -> done | failed | cancelled. Knows nothing of graphs and plans.

Invariants
- A request is on disk (file, folder entry, row) before `add` returns, or, where its caller is told nothing before,
  when `secure` does; a result before its state says done.
- A state changes in one transaction whose WHERE names the state it leaves, so each request ends exactly once.
- Ids are 128 random bits. Who may see what is not decided here but where a call comes in (`api.waiting`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from api import figures, idempotency, quotas, starting, usage
from api.audit import Audit
from api.away import AwayError
from api.catalogue import Catalogue, check_taking
from api.claiming import CANCELLED, Outlook, all_to_each, find_waiting, outlook_of
from api.clock import SteadyClock
from api.contents import NOTHING, Contents, Needs, sync
from api.database import Transaction, open_database
from api.doorbell import Doorbell
from api.draining import Drain
from api.edits import KeptEdits
from api.events import EventLog
from api.figures import class_of
from api.fresh import FreshResults, drop_fresh
from api.idempotency import Submit
from api.identity import LOCAL, Identity
from api.keys import Keys
from api.limits import NO_DEMAND, Demand, Terms
from api.logs import logs_as_json
from api.objects import Objects
from api.otlp import Traces
from api.quotas import Queues
from api.results import SMALL_BYTES, FileResults, ObjectResults, Results, allocate
from api.settings import DEFAULT_QUOTA_BYTES, DEFAULT_RESULT_TTL_S
from api.step_values import values_as_json
from api.tally import Tally
from api.telling import Ended, tell_end, tell_ended, tell_pass
from api.tenants import Tenants
from api.usage import Usage
from cluster.config import Heat, Mode
from cluster.requests import Claimed, Divide, Finished, LeftBehind, PassFigures, Place, ResultPlace, is_whole
from polytrace.certificate import LimitLine
from polytrace.errors import (
    CancelledError,
    CapacityError,
    NotFoundError,
    PolytraceError,
    ServiceError,
    WireError,
    from_fields,
)
from polytrace.tensors import num_bytes
from polytrace.wire import content_header
from scheduling.plan import RequestId
from scheduling.scheduler import Progress

_log = logging.getLogger(__name__)

NOTE_S = 0.5  # between two words in the database of how far a generation is: its tokens go into a file
_ABOUT = "tenant, user_name, model, tokens, is_interactive, created, started"  # of one that has ended, for `_ended`
_STATUS = (  # what `_status` reads
    "requests.id, model, state, created, started, finished, error, passes_done, passes, logs, tenant, user_name, "
    "token_layers, moved_bytes, result_bytes"
)
_ANY_WAITING = "SELECT 1 FROM requests WHERE model = ? AND state = 'queued' AND state IN ('queued', 'running') LIMIT 1"
_IS_OVER = "state IN ('done', 'failed', 'cancelled')"
_AT_ONCE = 500  # ids in one query
_DROPPED_AT_ONCE = 500  # requests, so that others' transactions come in between
MAX_ATTEMPTS = 3  # controllers that may die while they run a request before the request is refused
_WORN_OUT = ServiceError(f"the service broke down {MAX_ATTEMPTS} times while it ran this request")


class RequestState(Enum):
    QUEUED = "queued"
    RUNNING = "running"  # the controller has it
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (RequestState.DONE, RequestState.FAILED, RequestState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus:
    """What is known of a request."""

    id: RequestId
    model: str
    tenant: str
    user: str
    state: RequestState
    created: float  # seconds since the epoch, as all times here
    started: float | None
    finished: float | None
    error: PolytraceError | None  # when it failed or was cancelled
    passes_done: int  # of a running request that takes several passes
    passes: int  # how many it takes, 0 while that is not known
    logs: tuple[Mapping[str, Any], ...] = ()  # values that it logged while it runs, as `api.logs` writes them
    # what it did cost, once it has ended; 0 before
    token_layers: int = 0
    moved_bytes: int = 0
    result_bytes: int = 0  # its file
    result: bytes | None = None  # a small one that ended just now, where it was looked for (`Store.news`)


class Store(Catalogue):
    """One per process; its methods may be called from any thread. Construction makes the folder when there is none."""

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
        self.database = opened
        self.tenants, self.keys = Tenants(opened, self.now), Keys(opened, self.now)
        self.audit = Audit(opened, self.now)
        self.edits = KeptEdits(opened)
        self.draining = Drain(self.folder / "draining", opened, self.gateway_bell.ring)
        self.objects = None if objects is None else Objects(objects)
        self.results: Results = FileResults(self._results) if self.objects is None else ObjectResults(self.objects)
        self.contents = Contents(opened, self.folder / "contents", quota_bytes, self.now, self.objects)
        self._put: set[RequestId] = set()  # requests that this process has put among the objects and not accepted yet
        self.events = EventLog(self.folder / "events")
        self._noted: dict[RequestId, float] = {}  # generations -> when their state was last told to the database
        self._syncers = ThreadPoolExecutor(8, thread_name_prefix="store-sync")  # syncs of one burst share the journal
        self._fresh: FreshResults | None = None
        if isinstance(self.results, FileResults):
            self._fresh = FreshResults(opened, self.results, self._syncers)
        self._are_open_kept = False  # whether all that this process found are on the disk
        self._unkept: set[RequestId] = set()  # requests that were accepted here and may not be on the disk yet

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

    # --- the gateway's half

    def new_id(self) -> RequestId:
        return RequestId(secrets.token_hex(16))

    def request_path(self, request: RequestId) -> Path:
        """Where the gateway writes a request as it arrives. Without `add` it is swept at the next start."""
        return self._requests / f"{request}.safetensors"

    def result_path(self, request: RequestId) -> Path:
        """The result, where it is a file; complete when the state says done, and not to be read before."""
        return self._results / f"{request}.safetensors"

    def sync_request(self, request: RequestId) -> None:
        """Makes the received file durable; `add` follows."""
        if self.objects is not None:
            self._put.add(request)
            self.objects.put_file(_object_of(request), self.request_path(request))
            return
        sync(self.request_path(request))
        sync(self._requests)

    def add(
        self,
        request: RequestId,
        model: str,
        facts: bytes,
        *,
        work: int,
        max_open: int,
        max_open_of_tenant: int | None = None,
        caller: Identity = LOCAL,
        is_interactive: bool = True,
        demand: Demand = NO_DEMAND,
        terms: Terms | None = None,
        result_ttl_s: float = DEFAULT_RESULT_TTL_S,
        needs: Needs = NOTHING,
        submit: Submit | None = None,
        is_kept: bool = True,
    ) -> RequestStatus:
        """Accepts a request whose file is durable and wakes the controller. `work`: as in `Claimed`.
        `demand`: what it takes, as certified, which is held against the quotas of `terms`. `submit`: what it is known
        by when it comes again. Unless it `is_kept` neither its file nor its row need be durable: `secure` comes before
        anybody is told that it was accepted.

        Raises CapacityError when the deployment has `max_open` unfinished requests already, or so many of this tenant,
        or it or the whole service takes none, QuotaError when the tenant has no more, NotFoundError when there is no
        deployment, and what `Contents` says when the caller does not have what the request needs; with `submit` what
        `idempotency.check_new` says.
        """
        terms = terms or Terms(tenant=caller.tenant, model=model)
        queues = Queues(max_open=max_open, max_open_of_tenant=max_open_of_tenant or max_open)
        now = self.now()
        self._unkept.add(request)  # before anybody can find it by its key
        try:
            with self._db.transaction(is_durable=False) as db:
                if submit is not None:
                    idempotency.check_new(db, caller.owner, submit)
                self.draining.check()
                if submit is not None:
                    idempotency.note(db, caller.owner, submit, request)
                mode = db.execute("SELECT mode, heat FROM deployments WHERE model = ?", (model,)).fetchone()
                if mode is None:
                    raise NotFoundError(f"there is no model {model} here any more")
                check_taking(model, Mode(mode[0]))
                is_start = mode[1] != "hot" and starting.wake(db, terms, caller, now)
                quotas.check_queues(db, terms, queues, now)
                quotas.check(db, terms, demand, now, result_ttl_s=result_ttl_s)
                (seq,) = db.execute(
                    "INSERT INTO requests "
                    "(id, model, owner, tenant, user_name, is_interactive, tokens, result_bytes, state, created, work) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'queued', ?, ?) RETURNING seq",
                    (
                        request,
                        model,
                        caller.owner,
                        caller.tenant,
                        caller.user,
                        int(is_interactive),
                        demand.tokens,
                        demand.stored_bytes,  # until it has ended
                        now,
                        max(1, work),
                    ),
                ).fetchone()
                if not needs.is_empty:
                    self.contents.use(db, request, seq, caller.owner, needs)
                db.execute("INSERT INTO facts (id, json) VALUES (?, ?)", (request, facts))
        except BaseException as error:
            if not (isinstance(error, AwayError) and error.may_be_done):
                self._unkept.discard(request)
            raise
        if is_kept:
            self._db.settle()
            self._unkept.discard(request)
        self._put.discard(request)
        self.tally.count(figures.ACCEPTED, model, class_of(is_interactive))
        if is_start:
            self.tally.count(figures.STARTS, model)
        self.controller_bell.ring()
        return RequestStatus(
            id=request,
            model=model,
            tenant=caller.tenant,
            user=caller.user,
            state=RequestState.QUEUED,
            created=now,
            started=None,
            finished=None,
            error=None,
            passes_done=0,
            passes=0,
        )

    def secure(self, request: RequestId) -> None:
        """The request is on the disk; or its end is."""
        if request in self._unkept or not self._are_open_kept:
            if self.objects is None:  # else it was put there already
                with contextlib.suppress(FileNotFoundError):
                    self.sync_request(request)
            self._db.settle()
            self._unkept.discard(request)

    def has_ended(self, request: RequestId) -> None:
        """Its end is on the disk, so `secure` has nothing to do."""
        self._unkept.discard(request)

    def keep_open(self) -> None:
        """All requests that wait or run are on the disk: a process before this one may have told nobody of some."""
        if self.objects is None:
            rows = self._db.rows("SELECT id FROM requests WHERE state IN ('queued', 'running')")
            list(self._syncers.map(self._sync_if_there, [RequestId(row[0]) for row in rows]))
            sync(self._requests)
        self._db.settle()
        self._are_open_kept = True

    def submitted(self, owner: str, key: str) -> tuple[RequestId, Submit] | None:
        """The request that an owner's key stands for."""
        rows = self._db.rows("SELECT request, digest FROM idempotency WHERE owner = ? AND key = ?", (owner, key))
        return (RequestId(rows[0][0]), Submit(key=key, digest=rows[0][1])) if rows else None

    def discard(self, request: RequestId) -> None:
        """Drops a received file that was not accepted."""
        self.request_path(request).unlink(missing_ok=True)
        if self.objects is not None and request in self._put:
            self._put.discard(request)
            self._syncers.submit(self._remove_object, _object_of(request))  # callers do not wait for a network

    def statuses(self, requests: Iterable[RequestId]) -> dict[RequestId, RequestStatus]:
        """Of those that exist."""
        found: dict[RequestId, RequestStatus] = {}
        ids = list(requests)
        for first in range(0, len(ids), _AT_ONCE):
            some = ids[first : first + _AT_ONCE]
            query = f"SELECT {_STATUS} FROM requests WHERE id IN ({','.join('?' * len(some))})"
            found |= {row[0]: _status(row) for row in self._db.rows(query, some)}
        return found

    def news(self, requests: Iterable[RequestId]) -> dict[RequestId, RequestStatus]:
        """Of those that have ended, with small results that ended just now, or have run some of their passes."""
        found: dict[RequestId, RequestStatus] = {}
        ids = list(requests)
        for first in range(0, len(ids), _AT_ONCE):
            some = ids[first : first + _AT_ONCE]
            query = (
                f"SELECT {_STATUS}, content FROM requests LEFT JOIN fresh_results ON fresh_results.id = requests.id "
                f"WHERE requests.id IN ({','.join('?' * len(some))}) AND ({_IS_OVER} OR passes_done > 0)"
            )
            for row in self._db.rows(query, some):
                found[row[0]] = replace(_status(row), result=None if row[-1] is None else bytes(row[-1]))
        return found

    def status(self, request: RequestId) -> RequestStatus | None:
        return self.statuses([request]).get(request)

    def cancel(self, request: RequestId) -> RequestStatus | None:
        """Cancels a waiting request at once and asks the controller to cancel a running one; a finished one stays."""
        error = CancelledError("the request was cancelled before it ran")
        with self._db.transaction() as db:
            gone = db.execute(
                "UPDATE requests SET state = 'cancelled', finished = ?, error = ? WHERE id = ? AND state = 'queued' "
                f"RETURNING id, {_ABOUT}",
                (self.now(), json.dumps(error.to_fields()), request),
            ).fetchall()
            asked = db.execute(
                "UPDATE requests SET cancelled = 1 WHERE id = ? AND state = 'running'", (request,)
            ).rowcount
            if gone:
                db.execute("DELETE FROM facts WHERE id = ?", (request,))
                asked |= self.contents.end_uses(db, request)
        self.contents.collect()
        if gone:
            self._tell_over(gone, error)
            self._drop_behind(request, has_result=False)
            self.gateway_bell.ring()
        if asked:
            self.controller_bell.ring()
        return self.status(request)

    def limit_texts(self, tenant: str, model: str) -> tuple[str | None, str | None]:
        """The limits of a tenant and of a deployment as they stand there, None where there is no such."""
        own = self._db.rows("SELECT limits FROM tenants WHERE name = ?", (tenant,))
        of_model = self._db.rows("SELECT limits FROM deployments WHERE model = ?", (model,))
        return (own[0][0] if own else None), (of_model[0][0] if of_model else None)

    def limit_deployment(self, model: str, limits: str) -> None:
        """Gives a deployment its limits. Raises NotFoundError."""
        with self._db.transaction() as db:
            if not db.execute("UPDATE deployments SET limits = ? WHERE model = ?", (limits, model)).rowcount:
                raise NotFoundError(f"there is no deployment {model[:100]!r} here")

    def accepted_since(self, at: float, *, tenant: str | None = None, model: str | None = None) -> int:
        """How many requests of a tenant, or to a deployment, were accepted since then."""
        which, value = ("tenant", tenant) if tenant is not None else ("model", model)
        query = f"SELECT count(*) FROM requests WHERE {which} = ? AND created >= ?"
        return int(self._db.rows(query, (value, at))[0][0])

    def quota_lines(self, terms: Terms, demand: Demand) -> list[LimitLine]:
        """What a request, and what is under way, take of its tenant's quotas."""
        with self._db.transaction(is_durable=False) as db:
            return quotas.used_lines(db, terms, demand, self.now())

    def check_quotas(self, terms: Terms, demand: Demand, *, result_ttl_s: float) -> None:
        """Raises what `add` would."""
        with self._db.transaction(is_durable=False) as db:
            quotas.check(db, terms, demand, self.now(), result_ttl_s=result_ttl_s)

    def check_stored(self, tenant: str, num_bytes: int, most: int) -> None:
        """Raises QuotaError, or TooLargeError, when a tenant may not store so much more."""
        with self._db.transaction(is_durable=False) as db:
            quotas.check_stored(db, tenant, num_bytes, most, "the upload", self.now())

    def usage(self, month: str, *, tenant: str | None = None, user: str | None = None) -> list[Usage]:
        """What was used in a month."""
        return usage.usage_of(self._db, month, tenant, user)

    def open_requests(self) -> dict[str, dict[RequestState, int]]:
        """How many requests wait and run, by model."""
        counts: dict[str, dict[RequestState, int]] = {}
        query = "SELECT model, state, count(*) FROM requests WHERE state IN ('queued', 'running') GROUP BY model, state"
        for model, state, count in self._db.rows(query):
            counts.setdefault(model, {})[RequestState(state)] = count
        return counts

    def num_open(self, model: str) -> int:
        return sum(self.open_requests().get(model, {}).values())

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

    def _forget_torn(self) -> None:
        """Keys of requests that nobody was told of, whose files a crash took: sent again they are new ones."""
        query = "SELECT request FROM idempotency JOIN requests ON id = request WHERE state IN ('queued', 'running')"
        torn = [row for row in self._db.rows(query) if not is_whole(self.request_path(RequestId(row[0])))]
        if torn:
            with self._db.transaction() as db:
                db.executemany("DELETE FROM idempotency WHERE request = ?", [(row[0],) for row in torn])

    def drop_ended(self, ended_before: float, but: Collection[RequestId] = ()) -> list[RequestId]:
        """Drops requests that ended before a time, but not these; `remove_files` follows. Which they were."""
        rows = self._db.rows(f"SELECT id FROM requests WHERE {_IS_OVER} AND finished <= ?", (ended_before,))
        old = [RequestId(row[0]) for row in rows if row[0] not in but]
        for first in range(0, len(old), _DROPPED_AT_ONCE):
            some = [(request,) for request in old[first : first + _DROPPED_AT_ONCE]]
            with self._db.transaction(is_durable=False) as db:  # what a crash brings back goes another time
                db.executemany(f"DELETE FROM requests WHERE id = ? AND {_IS_OVER}", some)
                db.executemany("DELETE FROM idempotency WHERE request = ?", some)
                drop_fresh(db, [one for (one,) in some])
        self._unkept.difference_update(old)
        return old

    def remove_files(self, requests: Iterable[RequestId]) -> None:
        """Results and events of requests that were dropped."""
        for request in requests:
            self.results.drop(request)
            self.events.path(request).unlink(missing_ok=True)
            if self.objects is not None:
                self.objects.remove(f"events/{request}")

    def bring_events(self, request: RequestId) -> None:
        """The events of a request that has ended are at hand, if it has any, though another machine wrote them."""
        if self.objects is not None and not self.events.path(request).exists():
            self.objects.get_file(f"events/{request}", self.events.path(request))

    # --- the controller's half (cluster.requests.RequestStore)

    def requeue(self, model: str, *, is_clean: bool) -> int:
        with self._db.transaction() as db:
            if is_clean:
                db.execute(
                    "UPDATE requests SET attempts = attempts - 1 WHERE model = ? AND state = 'running'", (model,)
                )
            worn_out = db.execute(
                "UPDATE requests SET state = 'failed', finished = ?, error = ? "
                f"WHERE model = ? AND state = 'running' AND attempts >= ? RETURNING id, {_ABOUT}",
                (self.now(), json.dumps(_WORN_OUT.to_fields()), model, MAX_ATTEMPTS),
            ).fetchall()
            count = db.execute(
                "UPDATE requests SET state = 'queued', started = NULL WHERE model = ? AND state = 'running'", (model,)
            ).rowcount
            self.contents.end_uses_of_ended(db)
        self._tell_over(worn_out, _WORN_OUT)
        self.contents.collect()
        self.gateway_bell.ring()
        return count

    def claim(self, model: str, limit: int, divide: Divide = all_to_each) -> list[Claimed]:
        if limit <= 0:
            return []
        if not self._db.rows(_ANY_WAITING, (model,)):  # most rings are about something else: no writer waits for this
            return []
        with self._db.transaction(is_durable=False) as db:  # a claim that a crash forgets is a request that still waits
            found = find_waiting(db, model, limit, divide)
            for begin in range(0, len(found), _AT_ONCE):
                some = [one.id for one in found[begin : begin + _AT_ONCE]]
                db.execute(
                    "UPDATE requests SET state = 'running', started = ?, attempts = attempts + 1 "
                    f"WHERE id IN ({','.join('?' * len(some))})",
                    (self.now(), *some),
                )
            states = self.contents.states_now(db, {one.id: one.owner for one in found})
        for one in found:
            self._bring(one.id)
        return [
            Claimed(
                request=one.id,
                path=self.request_path(one.id),
                accepted=one.created,
                work=one.work,
                facts=one.facts,
                contents=self.contents.folder_of(one.owner),
                states=states.get(one.id, {}),
                is_suspect=one.attempts > 0,
                tenant=one.tenant,
                is_interactive=bool(one.is_interactive),
            )
            for one in found
        ]

    def weights(self) -> dict[str, float]:
        """Of the tenants whose share is not 1."""
        return {row[0]: row[1] for row in self._db.rows("SELECT name, weight FROM tenants WHERE weight <> 1.0")}

    def counters(self, model: str) -> dict[str, float]:
        """What `save_counters` has kept."""
        return {row[0]: row[1] for row in self._db.rows("SELECT tenant, counter FROM shares WHERE model = ?", (model,))}

    def save_counters(self, model: str, changed: Mapping[str, float], gone: Collection[str]) -> None:
        """Keeps counters of tenants (`scheduling.fair`); those that are gone have what a newcomer has."""
        with self._db.transaction(is_durable=False) as db:
            rows = [(model, tenant, counter) for tenant, counter in changed.items()]
            for begin in range(0, len(rows), _AT_ONCE):
                some = rows[begin : begin + _AT_ONCE]
                db.execute(
                    f"INSERT INTO shares (model, tenant, counter) VALUES {', '.join(['(?, ?, ?)'] * len(some))} "
                    "ON CONFLICT (model, tenant) DO UPDATE SET counter = excluded.counter",
                    [value for row in some for value in row],
                )
            db.executemany("DELETE FROM shares WHERE model = ? AND tenant = ?", [(model, tenant) for tenant in gone])

    def queue_outlook(self, request: RequestId) -> Outlook | None:
        """Where a waiting request stands and when it may start; None when it does not wait."""
        rows = self._db.rows(
            "SELECT model, tenant, is_interactive, seq FROM requests WHERE id = ? AND state = 'queued'", (request,)
        )
        return outlook_of(self._db, rows[0], self.now()) if rows else None

    def unclaim(self, model: str, held: Collection[RequestId]) -> int:
        """What is claimed and not held by the controller waits again: it never heard of it. How many."""
        rows = self._db.rows("SELECT id FROM requests WHERE model = ? AND state = 'running'", (model,))
        lost = [RequestId(row[0]) for row in rows if row[0] not in held]
        if lost:
            self.give_back(lost, ())
        return len(lost)

    def give_back(self, requests: Iterable[RequestId], suspects: Iterable[RequestId]) -> None:
        doubted = set(suspects)
        with self._db.transaction() as db:
            worn_out = [
                row
                for request in doubted
                for row in db.execute(
                    "UPDATE requests SET state = 'failed', finished = ?, error = ? "
                    f"WHERE id = ? AND state = 'running' AND attempts >= ? RETURNING id, {_ABOUT}",
                    (self.now(), json.dumps(_WORN_OUT.to_fields()), request, MAX_ATTEMPTS),
                ).fetchall()
            ]
            db.executemany(
                "UPDATE requests SET state = 'queued', started = NULL, passes_done = 0, passes = 0, logs = '[]', "
                "attempts = attempts - ? WHERE id = ? AND state = 'running'",
                [(int(request not in doubted), request) for request in requests],
            )
            self.contents.end_uses_of_ended(db)
        self._tell_over(worn_out, _WORN_OUT)
        self.contents.collect()
        self.controller_bell.ring()
        self.gateway_bell.ring()

    def refuse(self, model: str, error: PolytraceError) -> None:
        open_ = "model = ? AND state IN ('queued', 'running')"
        with self._db.transaction() as db:
            rows = db.execute(f"SELECT id, {_ABOUT} FROM requests WHERE {open_}", (model,)).fetchall()
            refused = [row[0] for row in rows]
            db.execute(
                f"UPDATE requests SET state = 'failed', finished = ?, error = ? WHERE {open_}",
                (self.now(), json.dumps(error.to_fields()), model),
            )
            db.executemany("DELETE FROM facts WHERE id = ?", [(request,) for request in refused])
            for request in refused:
                self.contents.end_uses(db, request)
        self.contents.collect()
        self.gateway_bell.ring()
        self.controller_bell.ring()  # others may have waited for their states
        self._tell_over(rows, error)
        for request in refused:
            self.events.forget(request)
            self._drop_behind(request, has_result=False)

    def cancellations(self, model: str) -> list[RequestId]:
        return [row[0] for row in self._db.rows(CANCELLED, (model,))]

    def place_result(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        return self.results.place(request, room, data_bytes)

    def place_left(self, request: RequestId, left: Sequence[LeftBehind]) -> list[Place]:
        with self._db.transaction(is_durable=False) as db:
            paths = self.contents.place(db, request, left)
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
                    "error = ?3, logs = '[]', token_layers = ?4, moved_bytes = ?5, result_bytes = ?6 "
                    "WHERE id = ?7 AND state = 'running' "
                    f"RETURNING {_ABOUT}",
                    (
                        state.value,
                        now,
                        end.error and json.dumps(end.error.to_fields()),
                        end.token_layers,
                        end.moved_bytes,
                        (end.size or 0) if end.error is None else 0,
                        end.request,
                    ),
                ).fetchone()
                if row is not None:
                    usage.enter(db, end, row[:3], row[3], now)
                    db.execute("DELETE FROM facts WHERE id = ?", (end.request,))
                    if content is not None and end.error is None and self._fresh is not None:
                        self._fresh.enter(db, end.request, content)
                    are_awaited |= self.contents.end_uses(db, end.request)
                    changed.append(_ended(end, row))
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
            self._noted.pop(end.request, None)
            self.events.forget(end.request)
            self.results.forget(end.request)
        drop = self._drop_behind
        dropping = map if self.objects is None else self._syncers.map
        list(dropping(lambda one: drop(one.end.request, has_result=one.end.error is None), changed))

    def note_progress(self, progress: Sequence[Progress]) -> None:
        """How far running requests are; who waits for them hears of it."""
        generating = [told for told in progress if told.tokens or told.saves]
        for told in generating:
            values = values_as_json(told.request, told.saves, told.result_start, self.results)
            self.events.append(told.request, told.tokens, values)
        if generating:
            self.events_bell.ring()
        rows = [
            (told.passes_done, told.passes, logs_as_json(told, self.results), told.request)
            for told in progress
            if self._is_due(told)
        ]
        if not rows:
            return
        with self._db.transaction(is_durable=False) as db:
            db.executemany(
                "UPDATE requests SET passes_done = ?, passes = ?, logs = ? WHERE id = ? AND state = 'running'", rows
            )
        self.gateway_bell.ring()

    def cool(self, model: str, heat: Heat, why: str, cause: str) -> bool:
        is_so = super().cool(model, heat, why, cause)
        if is_so:
            self.tally.count(figures.RESTS, model, cause)
        return is_so

    def note_pass(self, model: str, told: PassFigures) -> None:
        tell_pass(self.tally, model, told)
        if self.traces is not None:
            self.traces.tell_pass(model, told)

    def note_planning(self, request: RequestId, seconds: float) -> None:
        if self.traces is not None:
            self.traces.tell_planning(request, seconds)

    def wait_for_requests(self, timeout_s: float) -> None:
        self.controller_bell.wait(timeout_s)

    def interrupt(self) -> None:
        self.controller_bell.ring()

    # --- inside

    def _tell_over(self, rows: Iterable[Sequence[Any]], error: PolytraceError) -> None:
        """Requests, as their rows say, have ended without a result."""
        now = self.now()
        for request, *about in rows:
            ended = _ended(Finished(request=request, error=error), about)
            tell_end(self.tally, ended.model, class_of(ended.is_interactive), error)
            if self.traces is not None:
                self.traces.tell(ended, now)

    def _bring(self, request: RequestId) -> None:
        """A claimed request's files are at hand, though another machine received them. Missing ones fail it later."""
        if self.objects is None:
            return
        path = self.request_path(request)
        if not path.exists():
            self.objects.get_file(_object_of(request), path)
        self.contents.bring_used(request)

    def _sweep_objects(self, is_open: set[str], is_done: set[str]) -> int:
        if self.objects is None:
            return 0
        stale = [f"requests/{name}" for name in self.objects.names("requests") if name.partition(".")[0] not in is_open]
        stale += [f"results/{name}" for name in self.objects.names("results") if name not in is_done]
        stale += [f"events/{name}" for name in self.objects.names("events") if name not in is_done]
        self.objects.remove(*stale)
        return len(stale)

    @property
    def _requests(self) -> Path:
        return self.folder / "requests"

    @property
    def _results(self) -> Path:
        return self.folder / "results"

    def _is_due(self, told: Progress) -> bool:
        """Whether the database is to hear of it: every time, but of a generation only now and then."""
        now = time.monotonic()
        if told.tokens and now - self._noted.get(told.request, -NOTE_S) < NOTE_S:
            return False
        if told.tokens:
            self._noted[told.request] = now
        return True

    def _commit(self, end: Finished) -> tuple[Finished, list[str], bytes | None]:
        """Writes the header of a complete result and makes its files durable; with the hashes of what it leaves, and
        a small result, which the database makes durable.
        """
        if end.header is None:
            return end, [], None
        try:
            digests = [self.contents.commit_place(place) for place in end.left]
            values = values_as_json(end.request, end.saves, len(end.header), self.results)
            self.events.complete(end.request, end.generated, values)
            if end.generated and self.objects is not None:
                self.objects.put_file(f"events/{end.request}", self.events.path(end.request))
            content = self.results.commit(end.request, end.header, end.size)
        except (OSError, WireError) as error:
            told = ServiceError(f"the result could not be kept: {error}")
            return Finished(request=end.request, error=told), [], None
        return end, digests, content

    def _sync_if_there(self, request: RequestId) -> None:
        with contextlib.suppress(FileNotFoundError):
            sync(self.request_path(request))

    def _remove_object(self, name: str) -> None:
        assert self.objects is not None
        with contextlib.suppress(AwayError):  # a sweep takes it
            self.objects.remove(name)

    def _drop_behind(self, request: RequestId, *, has_result: bool) -> None:
        """Drops the file of a request that has ended, and what there is of its result if it has none."""
        self.request_path(request).unlink(missing_ok=True)
        try:
            if self.objects is not None:
                self.objects.remove(_object_of(request))
            if not has_result:
                self.results.drop(request)
        except AwayError as error:  # the request has ended all the same, and a sweep takes what is left
            _log.warning("files of %s stay for now: %s", request, error, extra={"request": request})

    def _leave(self, db: Transaction, end: Finished, digests: Sequence[str]) -> Finished:
        """What a request leaves gets its names, all of it, or the request fails."""
        db.execute("SAVEPOINT leaving")
        try:
            self.contents.leave(db, end.request, list(zip(end.left, digests, strict=True)))
        except (PolytraceError, OSError) as error:
            db.execute("ROLLBACK TO leaving")
            told = error if isinstance(error, PolytraceError) else ServiceError(f"what it keeps could not be: {error}")
            end = Finished(request=end.request, error=told)
        db.execute("RELEASE leaving")
        return end


def _is_running(db: Transaction, request: RequestId) -> bool:
    row = db.execute("SELECT 1 FROM requests WHERE id = ? AND state = 'running'", (request,)).fetchone()
    return row is not None


def _ended(end: Finished, about: Sequence[Any]) -> Ended:
    """`about`: what _ABOUT names of the request's row."""
    tenant, user, model, tokens, is_interactive, created, started = about
    return Ended(end, tenant, user, model, bool(is_interactive), created, started, tokens)


def _object_of(request: RequestId) -> str:
    return f"requests/{request}.safetensors"


def _status(row: Sequence[Any]) -> RequestStatus:
    return RequestStatus(
        id=row[0],
        model=row[1],
        state=RequestState(row[2]),
        created=row[3],
        started=row[4],
        finished=row[5],
        error=from_fields(json.loads(row[6])) if row[6] else None,
        passes_done=row[7],
        passes=row[8],
        logs=tuple(json.loads(row[9])),
        tenant=row[10],
        user=row[11],
        token_layers=row[12],
        moved_bytes=row[13],
        result_bytes=row[14] if RequestState(row[2]).is_final else 0,  # what it may leave, until then
    )
