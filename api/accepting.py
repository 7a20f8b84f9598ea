"""Requests are accepted: held against queues and quotas, known by their keys, and put into the database."""

from __future__ import annotations

import secrets

from api import figures, idempotency, quotas, starting
from api.away import AwayError
from api.catalogue import check_taking
from api.figures import class_of
from api.idempotency import Submit
from api.identity import LOCAL, Identity
from api.limits import NO_DEMAND, Demand, Terms
from api.needs import NOTHING, Needs
from api.quotas import Queues
from api.settings import DEFAULT_RESULT_TTL_S
from api.status import RequestState, RequestStatus
from api.store_parts import StoreParts
from cluster.config import Mode
from polytrace.errors import NotFoundError
from scheduling.plan import RequestId


class Accepting(StoreParts):
    """A part of the store."""

    def new_id(self) -> RequestId:
        return RequestId(secrets.token_hex(16))

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
        is_durable: bool = True,
    ) -> RequestStatus:
        """Accepts a request whose file has arrived and wakes the controller; unless `is_durable`, `received.secure`
        comes before anybody is told. `is_durable`: its file is on the disk, and its row is when this returns.
        `work`: as in `Claimed`. `demand`: what it takes, as certified, which is held against the quotas of `terms`.
        `submit`: what it is known by when it comes again.

        Raises CapacityError when the deployment has `max_open` unfinished requests already, or so many of this tenant,
        or it or the whole service takes none, QuotaError when the tenant has no more, NotFoundError when there is no
        deployment, and what `Contents` says when the caller does not have what the request needs; with `submit` what
        `idempotency.check_new` says.
        """
        terms = terms or Terms(tenant=caller.tenant, model=model)
        queues = Queues(max_open=max_open, max_open_of_tenant=max_open_of_tenant or max_open)
        now = self.now()
        self.received.begin(request)  # before anybody can find it by its key
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
                    self.contents.uses.begin(db, request, seq, caller.owner, needs)
                db.execute("INSERT INTO facts (id, json) VALUES (?, ?)", (request, facts))
        except BaseException as error:
            if not (isinstance(error, AwayError) and error.may_be_done):
                self.received.note_durable(request)
            raise
        if is_durable:
            self._db.settle()
            self.received.note_durable(request)
        self.received.note_accepted(request)
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

    def submitted(self, owner: str, key: str) -> tuple[RequestId, Submit] | None:
        """The request that an owner's key stands for."""
        rows = self._db.rows("SELECT request, digest FROM idempotency WHERE owner = ? AND key = ?", (owner, key))
        return (RequestId(rows[0][0]), Submit(key=key, digest=rows[0][1])) if rows else None
