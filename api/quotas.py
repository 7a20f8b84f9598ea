"""What a tenant has under way, stored and used, held against its limits. And how often it may ask.

`check` runs inside the transaction that accepts a request, so what it counts is true until the request is in. Rates are
in the gateway's memory (`Rates`): a token bucket a tenant, which after a restart begins with what is certainly there.

Refusals are QuotaErrors with the seconds after which the same request may be taken, where these are known: not while
others of the same tenant are under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from api.database import Transaction
from api.identity import owner_name
from api.limits import Demand, Terms
from api.usage import day_of, midnight_after
from polytrace.certificate import LimitLine
from polytrace.errors import CapacityError, QuotaError, TooLargeError
from polytrace.price_tables import in_bytes

RETRY_S = 2.0  # when something has to end first
MIN_RETRY_S, MAX_RETRY_S = 1.0, 15.0  # of full queues; half as long as clients have patience
LATELY_S = 60.0
_ENDS = 64  # the latest, from which is told how fast a deployment's requests go
LATEST = "SELECT finished FROM requests WHERE model = ? AND finished > ? ORDER BY finished DESC LIMIT ?"
_OPEN = "state IN ('queued', 'running')"
_HOLDS = "state IN ('queued', 'running', 'done')"  # requests that have a result, or will


@dataclass(frozen=True, slots=True, kw_only=True)
class Queues:
    """How many unfinished requests a deployment takes, of all tenants and of one."""

    max_open: int
    max_open_of_tenant: int


def check_queues(db: Transaction, terms: Terms, queues: Queues, now: float) -> None:
    """Raises CapacityError when the deployment's queue, or the tenant's part of it, is full."""
    model, tenant = terms.model, terms.tenant
    (waiting,) = db.execute(f"SELECT count(*) FROM requests WHERE model = ? AND {_OPEN}", (model,)).fetchone()
    own = terms.deployments.requests_in_flight
    most = queues.max_open if own is None else min(own, queues.max_open)
    if waiting >= most:
        told = f"{waiting} requests are waiting for {model}, the most it takes; try again later"
        raise CapacityError(told, retry_after_s=_until_worked_off(db, model, waiting, now))
    if waiting < queues.max_open_of_tenant:
        return  # so are the tenant's
    (theirs,) = db.execute(
        f"SELECT count(*) FROM requests WHERE model = ? AND tenant = ? AND {_OPEN}", (model, tenant)
    ).fetchone()
    if theirs >= queues.max_open_of_tenant:
        told = f"{theirs} requests of tenant {tenant} are waiting for {model}, the most it takes of one tenant"
        raise CapacityError(f"{told}; try again later", retry_after_s=_until_worked_off(db, model, theirs, now))


def _until_worked_off(db: Transaction, model: str, waiting: int, now: float) -> float:
    """Seconds in which a deployment ends so many requests, if it goes on as it did lately; RETRY_S when it ended none.

    No more than MAX_RETRY_S: room comes with each request that ends, and a client should find it.
    """
    latest = db.execute(LATEST, (model, now - LATELY_S, _ENDS)).fetchall()
    count, first = len(latest), latest[-1][0] if latest else now
    if count == 0:
        return RETRY_S
    return min(MAX_RETRY_S, max(MIN_RETRY_S, waiting * (now - first) / count))


def check(db: Transaction, terms: Terms, demand: Demand, now: float, *, result_ttl_s: float) -> None:
    """Raises QuotaError, with when to come again, or TooLargeError for what would never be taken."""
    limits, tenant = terms.tenants, terms.tenant
    if (most := limits.requests_in_flight) is not None and (under_way := in_flight(db, tenant)) >= most:
        told = f"tenant {tenant} has {under_way} requests in flight and may have {most} at once"
        raise QuotaError(f"{told}; try again when one has ended", retry_after_s=RETRY_S)
    if (most := limits.tokens_a_day) is not None:
        if demand.tokens > most:
            raise TooLargeError(f"the request has {demand.tokens:,} tokens; tenant {tenant} may use {most:,} a day")
        if demand.tokens > (left := most - tokens_today(db, tenant, now)):
            told = f"the request has {demand.tokens:,} tokens; tenant {tenant} has {max(0, left):,} of {most:,} left"
            raise QuotaError(f"{told} today (UTC)", retry_after_s=midnight_after(now) - now)
    if limits.bytes_stored is not None:
        check_stored(db, tenant, demand.stored_bytes, limits.bytes_stored, "the request", now, result_ttl_s)


def check_stored(
    db: Transaction, tenant: str, wanted: int, most: int, what: str, now: float, result_ttl_s: float | None = None
) -> None:
    """Raises QuotaError when a tenant may not store so many bytes more, TooLargeError when it never may."""
    if wanted > most:
        raise TooLargeError(
            f"{what} leaves {in_bytes(wanted)} on the service; tenant {tenant} may store {in_bytes(most)}"
        )
    excess = stored_bytes(db, tenant) + wanted - most
    if excess > 0:
        told = (
            f"{what} leaves {wanted:,} bytes on the service; tenant {tenant} has {max(0, wanted - excess):,} of "
            f"{most:,} left: delete kept values, or wait until results expire"
        )
        raise QuotaError(told, retry_after_s=_until_expired(db, tenant, excess, now, result_ttl_s))


def used_lines(db: Transaction, terms: Terms, demand: Demand, now: float) -> list[LimitLine]:
    """What the request, and what the tenant has under way, take of the tenant's quotas."""
    tenant, limits = terms.tenant, terms.tenants
    counts: tuple[tuple[str, int, int | None, Callable[[], int]], ...] = (
        ("requests_in_flight", 1, limits.requests_in_flight, lambda: in_flight(db, tenant)),
        ("tokens_a_day", demand.tokens, limits.tokens_a_day, lambda: tokens_today(db, tenant, now)),
        ("bytes_stored", demand.stored_bytes, limits.bytes_stored, lambda: stored_bytes(db, tenant)),
    )
    return [
        LimitLine(what=what, needed=needed, used=used(), limit=limit, whose=f"tenant {tenant}")
        for what, needed, limit, used in counts
        if limit is not None
    ]


def in_flight(db: Transaction, tenant: str) -> int:
    """Requests of a tenant that wait or run, on all deployments."""
    return _one(db, f"SELECT count(*) FROM requests WHERE tenant = ? AND {_OPEN}", (tenant,))


def tokens_today(db: Transaction, tenant: str, now: float) -> int:
    """What a tenant's requests have used since midnight UTC, and what those under way may use."""
    used = _one(db, "SELECT coalesce(sum(tokens), 0) FROM usage WHERE tenant = ? AND day = ?", (tenant, day_of(now)))
    return used + _one(db, f"SELECT coalesce(sum(tokens), 0) FROM requests WHERE tenant = ? AND {_OPEN}", (tenant,))


def stored_bytes(db: Transaction, tenant: str) -> int:
    """A tenant's results, contents, kept values and uploads on their way, with what requests under way will leave."""
    results = _one(db, f"SELECT coalesce(sum(result_bytes), 0) FROM requests WHERE tenant = ? AND {_HOLDS}", (tenant,))
    begin = owner_name(tenant, "")
    whose = (len(begin), begin)
    contents = _one(db, "SELECT coalesce(sum(bytes), 0) FROM contents WHERE substr(owner, 1, ?) = ?", whose)
    coming = _one(
        db, "SELECT coalesce(sum(bytes), 0) FROM room WHERE part LIKE 'upload-%' AND substr(owner, 1, ?) = ?", whose
    )
    return results + contents + coming


def _until_expired(db: Transaction, tenant: str, excess: int, now: float, result_ttl_s: float | None) -> float | None:
    """Seconds until so many bytes of results have expired; None when results alone do not do it."""
    if result_ttl_s is None:
        return None
    ended = db.execute(
        "SELECT finished, result_bytes FROM requests WHERE tenant = ? AND state = 'done' AND result_bytes > 0 "
        "ORDER BY finished",
        (tenant,),
    )
    for finished, num_bytes in ended:
        excess -= num_bytes
        if excess <= 0:
            return max(RETRY_S, float(finished) + result_ttl_s - now)
    return None


def _one(db: Transaction, query: str, values: Sequence[Any]) -> int:
    return int(db.execute(query, values).fetchone()[0])


class Rates:
    """Token buckets, by whose they are. Belongs to one event loop.

    A bucket holds a minute's requests and fills evenly. This process may be new: of what came before it knows only the
    requests that were accepted, so a bucket begins with what it has filled with since, at least one, less those.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._levels: dict[tuple[str, str], tuple[float, float]] = {}  # level, and when it was that

    def is_known(self, owner: tuple[str, str]) -> bool:
        return owner in self._levels

    def begin(self, owner: tuple[str, str], a_minute: int, taken: int) -> None:
        """The bucket of somebody of whom `taken` requests were accepted in the last minute."""
        filled = max(1.0, (self._clock() - self._began) * a_minute / 60)
        self._levels.setdefault(owner, (max(0.0, min(filled, a_minute - taken)), self._clock()))

    def wait_s(self, owner: tuple[str, str], a_minute: int) -> float:
        """Seconds until the bucket has one: 0.0 when it has."""
        if a_minute <= 0:
            return float("inf")
        lacking = 1 - self._level(owner, a_minute)
        return 0.0 if lacking <= 1e-9 else lacking * 60 / a_minute

    def begin_full(self, owner: tuple[str, str], a_minute: int) -> None:
        """A bucket that has all it holds, where it does not matter what was before."""
        self._levels.setdefault(owner, (float(a_minute), self._clock()))

    def take(self, owner: tuple[str, str], a_minute: int, count: float = 1.0) -> None:
        """One, or so many; `wait_s` said that there is one. What is taken beyond that comes late."""
        self._levels[owner] = (self._level(owner, a_minute) - count, self._clock())

    def _level(self, owner: tuple[str, str], a_minute: int) -> float:
        level, at = self._levels[owner]
        return min(float(a_minute), level + (self._clock() - at) * a_minute / 60)
