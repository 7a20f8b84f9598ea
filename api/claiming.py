"""Which waiting requests the controller takes: by tenant, so that one with 10,000 does not stand before all others.

Owns the queries. A tenant's own queue is in the order of arrival, but whom somebody waits for goes before those of the
batch that came up to `REQUESTS_AHEAD` requests (of the whole store) earlier: so the batch is overtaken, and not for
ever. Who of the tenants goes first, and how many each may have, is the controller's to say (`cluster.shares`).

Each query reads what the index `requests_of_tenants` begins with, as many rows as it takes: with 10,000 queued it costs
what it costs with ten. There are two, however many tenants wait: who they are, and the first of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from api.content_uses import HAS_ITS_TURN
from api.database import Database, Transaction
from cluster.requests import Divide
from scheduling.plan import RequestId

REQUESTS_AHEAD = 256
_TENANTS_AT_ONCE = 4096  # in one query

# as SQLite must hear it to take the index of open requests
_QUEUED = "state = 'queued' AND state IN ('queued', 'running')"

# the tenants with waiting requests, each found by one look into the index behind the one before
TENANTS = (
    "WITH RECURSIVE waiting (tenant) AS ("
    "SELECT CAST('' AS TEXT) "  # before all names
    f"UNION ALL SELECT (SELECT min(tenant) FROM requests WHERE model = ?1 AND {_QUEUED} "
    "AND requests.tenant > waiting.tenant) FROM waiting WHERE waiting.tenant IS NOT NULL) "
    "SELECT tenant FROM waiting WHERE tenant > ''"
)

# running requests that are to be cancelled
CANCELLED = (
    "SELECT id FROM requests WHERE model = ? AND state = 'running' AND state IN ('queued', 'running') AND cancelled = 1"
)

_NEXT = (
    "SELECT requests.seq FROM requests WHERE model = ?1 AND requests.tenant = {walk}.tenant "
    f"AND {_QUEUED} AND is_interactive = {{walk}}.kind AND requests.seq > {{after}} AND {HAS_ITS_TURN} "
    "ORDER BY requests.seq LIMIT 1"
)


def first_of(num_tenants: int) -> str:
    """The query for the first so many requests of each of so many tenants, of both kinds: from one to the next by one
    look into the index each. Its values: the model, and of each tenant the name and how many.
    """
    given = ", ".join(f"(CAST(?{2 * n + 2} AS TEXT), CAST(?{2 * n + 3} AS BIGINT))" for n in range(num_tenants))
    first, next_ = _NEXT.format(walk="asked", after="-1"), _NEXT.format(walk="walk", after="walk.seq")
    return (
        f"WITH RECURSIVE given (tenant, most) AS (VALUES {given}), kinds (kind) AS (VALUES (0), (1)), "
        "asked (tenant, kind, most) AS (SELECT tenant, kind, most FROM given CROSS JOIN kinds), "
        f"walk (tenant, kind, more, seq) AS (SELECT asked.tenant, asked.kind, asked.most - 1, ({first}) FROM asked "
        f"UNION ALL SELECT walk.tenant, walk.kind, walk.more - 1, ({next_}) FROM walk "
        "WHERE walk.more > 0 AND walk.seq IS NOT NULL) "
        "SELECT requests.id, created, json, attempts, work, owner, requests.tenant, is_interactive, requests.seq "
        "FROM walk JOIN requests ON requests.seq = walk.seq JOIN facts ON facts.id = requests.id"
    )


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
    def place(self) -> tuple[int, int]:
        """In its tenant's queue."""
        return self.seq - REQUESTS_AHEAD * self.is_interactive, -self.is_interactive


def all_to_each(tenants: Sequence[str], limit: int) -> Mapping[str, int]:
    """Whoever is first in the alphabet takes what it can: where there are no shares to keep."""
    return dict.fromkeys(tenants, limit)


def find_waiting(db: Transaction, model: str, limit: int, divide: Divide) -> list[Waiting]:
    """The requests to take now, at most `limit`; a suspect is never taken together with another one.

    `divide` says of the tenants that have some, with the room, how many each may have, whoever is first in front.
    """
    tenants = [row[0] for row in db.execute(TENANTS, (model,))]
    given = {tenant: min(most, limit) for tenant, most in divide(tenants, limit).items() if most > 0}
    theirs: dict[str, list[Waiting]] = {tenant: [] for tenant in given}
    names = list(given)
    for begin in range(0, len(names), _TENANTS_AT_ONCE):
        some = names[begin : begin + _TENANTS_AT_ONCE]
        values = [model, *(value for tenant in some for value in (tenant, given[tenant]))]
        for row in db.execute(first_of(len(some)), values):
            one = Waiting(*row)
            theirs[one.tenant].append(one)
    found: list[Waiting] = []
    for tenant, own in theirs.items():
        found += sorted(own, key=lambda one: one.place)[: min(given[tenant], limit - len(found))]
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
