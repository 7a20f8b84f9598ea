"""Which waiting requests the controller takes: by tenant, so that one with 10,000 does not stand before all others.

Owns the queries. A tenant's own queue is in the order of arrival, but whom somebody waits for goes before those of the
batch that came up to `REQUESTS_AHEAD` requests (of the whole store) earlier: so the batch is overtaken, and not for
ever. Who of the tenants goes first, and how many each may have, is the controller's to say (`cluster.shares`).

Each query reads what the index `requests_of_tenants` begins with, as many rows as it takes: with 10,000 queued it costs
what it costs with ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from api.contents import HAS_ITS_TURN
from api.database import Database, Transaction
from cluster.requests import Divide
from scheduling.plan import RequestId

REQUESTS_AHEAD = 256

# as SQLite must hear it to take the index of open requests
_QUEUED = "state = 'queued' AND state IN ('queued', 'running')"

# the tenants with waiting requests, each found by one look into the index behind the one before
TENANTS = (
    "WITH RECURSIVE waiting (tenant) AS ("
    f"SELECT min(tenant) FROM requests WHERE model = ?1 AND {_QUEUED} "
    f"UNION ALL SELECT (SELECT min(tenant) FROM requests WHERE model = ?1 AND {_QUEUED} "
    "AND requests.tenant > waiting.tenant) FROM waiting WHERE waiting.tenant IS NOT NULL) "
    "SELECT tenant FROM waiting WHERE tenant IS NOT NULL"
)

_OWN = (
    "SELECT id, created, json, attempts, work, owner, tenant, is_interactive, seq FROM (SELECT requests.id AS id, "
    "created, json, attempts, work, owner, tenant, is_interactive, seq FROM requests JOIN facts ON facts.id = "
    f"requests.id WHERE model = ?1 AND tenant = ?2 AND {_QUEUED} AND is_interactive = {{kind}} "
    f"AND {HAS_ITS_TURN} ORDER BY seq LIMIT ?3) AS kind_{{kind}}"
)
FIRST = f"{_OWN.format(kind=1)} UNION ALL {_OWN.format(kind=0)}"


class Waiting(NamedTuple):
    """A row of `requests` that is to be claimed, with its facts."""

    id: RequestId
    created: float
    facts: bytes
    attempts: int
    work: int
    owner: str
    tenant: str
    is_interactive: int
    seq: int

    @property
    def place(self) -> int:
        """In its tenant's queue."""
        return self.seq - REQUESTS_AHEAD * self.is_interactive


def all_to_each(tenants: Sequence[str], limit: int) -> Mapping[str, int]:
    """Whoever is first in the alphabet takes what it can: where there are no shares to keep."""
    return dict.fromkeys(tenants, limit)


def find_waiting(db: Transaction, model: str, limit: int, divide: Divide) -> list[Waiting]:
    """The requests to take now, at most `limit`; a suspect is never taken together with another one.

    `divide` says of the tenants that have some, with the room, how many each may have, whoever is first in front.
    """
    tenants = [row[0] for row in db.execute(TENANTS, (model,))]
    found: list[Waiting] = []
    for tenant, most in divide(tenants, limit).items():
        room = min(most, limit - len(found))
        if room <= 0:
            continue
        own = [Waiting(*row) for row in db.execute(FIRST, (model, tenant, room))]
        found += sorted(own, key=lambda one: one.place)[:room]
    first_suspect = next((place for place, one in enumerate(found) if one.attempts), None)
    return found if first_suspect is None else found[: max(1, first_suspect)]


class Outlook(NamedTuple):
    """How a waiting request stands."""

    queue_position: int  # requests of its tenant that go before it
    expected_start: float | None  # seconds since the epoch; None: none of the tenant's started lately


_LATELY_S = 600.0
_STARTS = 64  # the latest, from which is told how fast a tenant's requests go


def outlook_of(db: Database, row: Sequence[Any], now: float) -> Outlook:
    """`row`: model, tenant, is_interactive and seq of a waiting request.

    Expected is that the tenant's requests go on starting as fast as its latest did: from now, the requests before it
    and itself at so many a second.
    """
    model, tenant, is_interactive, seq = row
    other = seq - REQUESTS_AHEAD if is_interactive else seq + REQUESTS_AHEAD
    ahead = db.rows(
        f"SELECT count(*) FROM requests WHERE model = ? AND tenant = ? AND {_QUEUED} "
        "AND ((is_interactive = ? AND seq < ?) OR (is_interactive = ? AND seq < ?))",
        (model, tenant, is_interactive, seq, 1 - is_interactive, other),
    )[0][0]
    starts = db.rows(
        "SELECT started FROM requests WHERE model = ? AND tenant = ? AND started > ? ORDER BY started DESC LIMIT ?",
        (model, tenant, now - _LATELY_S, _STARTS),
    )
    if not starts:
        return Outlook(ahead, None)
    seconds = max(1e-3, now - starts[-1][0])
    return Outlook(ahead, now + (ahead + 1) * seconds / len(starts))
