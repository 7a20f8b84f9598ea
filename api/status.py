"""What is known of a request: its state, and what it has cost. Owns the queries that look it up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from api.database import Database
from polytrace.errors import PolytraceError, from_fields
from scheduling.plan import RequestId

_AT_ONCE = 500  # ids in one query
IS_OVER = "state IN ('done', 'failed', 'cancelled')"
_STATUS = (  # what `_status_of` reads
    "requests.id, model, state, created, started, finished, error, passes_done, passes, logs, tenant, user_name, "
    "token_layers, moved_bytes, result_bytes"
)


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
    passes_done: int  # of one that runs and takes several, and of one that is done; how far one came that failed
    passes: int  # how many it takes, 0 while that is not known
    logs: tuple[Mapping[str, Any], ...] = ()  # values that it logged while it runs, as `api.logs` writes them
    # what it did cost, once it has ended; 0 before
    token_layers: int = 0
    moved_bytes: int = 0
    result_bytes: int = 0  # its file
    result: bytes | None = None  # a small one that ended just now, where it was looked for (`news`)


def statuses(db: Database, requests: Iterable[RequestId]) -> dict[RequestId, RequestStatus]:
    """Of those that exist."""
    found: dict[RequestId, RequestStatus] = {}
    for some in _parts_of(requests):
        query = f"SELECT {_STATUS} FROM requests WHERE id IN ({','.join('?' * len(some))})"
        found |= {row[0]: _status_of(row) for row in db.rows(query, some)}
    return found


def news(db: Database, requests: Iterable[RequestId]) -> dict[RequestId, RequestStatus]:
    """Of those that have ended, with small results that ended just now, or have run some of their passes."""
    found: dict[RequestId, RequestStatus] = {}
    for some in _parts_of(requests):
        query = (
            f"SELECT {_STATUS}, content FROM requests LEFT JOIN fresh_results ON fresh_results.id = requests.id "
            f"WHERE requests.id IN ({','.join('?' * len(some))}) AND ({IS_OVER} OR passes_done > 0)"
        )
        for row in db.rows(query, some):
            found[row[0]] = replace(_status_of(row), result=None if row[-1] is None else bytes(row[-1]))
    return found


def _parts_of(requests: Iterable[RequestId]) -> Iterator[list[RequestId]]:
    ids = list(requests)
    for first in range(0, len(ids), _AT_ONCE):
        yield ids[first : first + _AT_ONCE]


def _status_of(row: Sequence[Any]) -> RequestStatus:
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
