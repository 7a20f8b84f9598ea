"""Everything that a tenant, or one of his users, has on the service goes, at an operator's word.

Owns what "everything" is: requests with their results, events and idempotency keys; contents, kept values, states and
edits; uploads under way. Who he is and what he has used stay (`with_usage`: that goes too). Knows nothing of who may
ask for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from api.contents import Contents
from api.database import Transaction
from api.fresh import drop_fresh
from api.identity import owner_name
from api.store import Store
from polytrace.errors import CapacityError, ConflictError
from scheduling.plan import RequestId

ENDING_S = 30.0  # for requests that are cancelled and run to end
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """What has gone."""

    requests: int = 0  # with whatever they had: results, events, keys
    contents: int = 0  # uploaded constants, and what kept values and states had
    kept: int = 0  # kept values and states
    edits: int = 0  # versions
    num_bytes: int = 0  # of contents and edits
    usage: int = 0  # rows: a user's days with a model


def purge(store: Store, tenant: str, user: str | None, *, is_cancelling: bool, with_usage: bool) -> Purged:
    """Drops it all. Returns when the files are gone too.

    Raises ConflictError while requests wait or run, unless `is_cancelling`: then they are cancelled first, and
    CapacityError when some have not ended within ENDING_S. Nothing is dropped then.
    """
    deadline = time.monotonic() + ENDING_S
    while True:
        with store.database.transaction() as db:
            running = _open(db, tenant, user)
            if not running:
                requests, purged = _drop(db, store.contents, tenant, user, with_usage=with_usage)
                break
        if not is_cancelling:
            raise ConflictError(
                f"{len(running)} requests of {_who(tenant, user)} wait or run: let them end, or purge with `cancel`"
            )
        if time.monotonic() > deadline:
            raise CapacityError(
                f"{len(running)} requests of {_who(tenant, user)} are cancelled and still run: ask again"
            )
        for request in running:
            store.cancel(request)
        time.sleep(_LOOK_S)
    store.contents.collect()
    store.remove_files(requests)
    store.gateway_bell.ring()
    return purged


def _open(db: Transaction, tenant: str, user: str | None) -> list[RequestId]:
    who, values = _of(tenant, user)
    rows = db.execute(f"SELECT id FROM requests WHERE {who} AND state IN ('queued', 'running')", values)
    return [RequestId(row[0]) for row in rows]


def _drop(
    db: Transaction, contents: Contents, tenant: str, user: str | None, *, with_usage: bool
) -> tuple[list[RequestId], Purged]:
    who, values = _of(tenant, user)
    rows = db.execute(f"DELETE FROM requests WHERE {who} RETURNING id", values).fetchall()
    requests = [RequestId(row[0]) for row in rows]
    drop_fresh(db, requests)
    # owners are one word, whose beginning is the tenant's
    one = owner_name(tenant, user or "")
    owned, whose = ("owner = ?", (one,)) if user is not None else (f"substr(owner, 1, {len(one)}) = ?", (one,))
    db.execute(f"DELETE FROM idempotency WHERE {owned}", whose)
    edits = db.execute(f"SELECT count(*), coalesce(sum(num_bytes), 0) FROM edits WHERE {owned}", whose).fetchone()
    db.execute(f"DELETE FROM edits WHERE {owned}", whose)
    kept = db.execute(f"DELETE FROM kept WHERE {owned}", whose).rowcount
    sizes = contents.holdings.drop_all(db, owned, whose)
    usage = db.execute(f"DELETE FROM usage WHERE {who}", values).rowcount if with_usage else 0
    if with_usage:
        db.execute(f"DELETE FROM starts WHERE {who}", values)
    purged = Purged(
        requests=len(requests),
        contents=len(sizes),
        kept=kept,
        edits=edits[0],
        num_bytes=edits[1] + sum(sizes),
        usage=usage,
    )
    return requests, purged


def _of(tenant: str, user: str | None) -> tuple[str, Sequence[str]]:
    return ("tenant = ?", (tenant,)) if user is None else ("tenant = ? AND user_name = ?", (tenant, user))


def _who(tenant: str, user: str | None) -> str:
    return tenant if user is None else f"{tenant}/{user}"
