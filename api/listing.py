"""Requests in pages, the newest first, as their owners and operators look through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from api.database import Database
from api.status import RequestState, RequestStatus
from api.store import Store
from scheduling.plan import RequestId

MAX_PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which requests; None is all."""

    state: RequestState | None = None
    model: str | None = None
    tenant: str | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some requests, and where the next page begins; None behind the last one."""

    requests: Sequence[RequestStatus]
    before: int | None


def page_of(store: Store, wanted: Wanted, limit: int, before: int | None = None) -> Page:
    """At most `limit` requests that were accepted before the one with this number.

    By number and not by offset: what comes and goes meanwhile shifts no page.
    """
    found = _numbers(store.database, wanted, limit + 1, before)
    statuses = store.statuses(request for _, request in found[:limit])  # one that has expired meanwhile is not there
    requests = [statuses[request] for _, request in found[:limit] if request in statuses]
    return Page(requests=requests, before=found[limit - 1][0] if len(found) > limit else None)


def _numbers(db: Database, wanted: Wanted, limit: int, before: int | None) -> list[tuple[int, RequestId]]:
    narrow: dict[str, object] = {
        "state = ?": None if wanted.state is None else wanted.state.value,
        "model = ?": wanted.model,
        "tenant = ?": wanted.tenant,
        "user_name = ?": wanted.user,
        "seq < ?": before,
    }
    given = {condition: value for condition, value in narrow.items() if value is not None}
    where = f"WHERE {' AND '.join(given)} " if given else ""
    rows = db.rows(f"SELECT seq, id FROM requests {where}ORDER BY seq DESC LIMIT ?", [*given.values(), limit])
    return [(int(seq), RequestId(request)) for seq, request in rows]
