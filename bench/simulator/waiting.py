"""What waits in the store, and who is taken out of it next, as `api.claiming` and `cluster.shares` have it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator
from typing import Protocol

from api.claiming import REQUESTS_AHEAD
from bench.simulator.population import Asked
from cluster.shares import divided
from scheduling.fair import FairShares


class Waiting(Protocol):
    """Requests that nobody has taken."""

    def add(self, one: Asked) -> None:
        """Behind those of its tenant."""

    def claim(self, room: int, held: Counter[str]) -> Iterator[Asked]:
        """At most so many; `held` says how many of each tenant are in memory, and is kept up by the caller."""

    def tenants(self) -> Collection[str]:
        """Of whom something waits."""


class InOrder:
    """Of all tenants one queue."""

    def __init__(self) -> None:
        self._queue: deque[Asked] = deque()
        self._counts: Counter[str] = Counter()

    def add(self, one: Asked) -> None:
        self._queue.append(one)
        self._counts[one.tenant] += 1

    def claim(self, room: int, held: Counter[str]) -> Iterator[Asked]:
        for _ in range(min(room, len(self._queue))):
            one = self._queue.popleft()
            self._counts[one.tenant] -= 1
            if not self._counts[one.tenant]:
                del self._counts[one.tenant]
            yield one

    def tenants(self) -> Collection[str]:
        return self._counts


class ByTenant:
    """A queue for each tenant; in it those whom somebody waits for go before the batch, but not for ever."""

    def __init__(self, fair: FairShares) -> None:
        self._fair = fair
        self._queues: dict[str, dict[bool, deque[tuple[int, Asked]]]] = {}  # tenant -> is interactive -> numbered
        self._count = 0

    def add(self, one: Asked) -> None:
        self._count += 1
        own = self._queues.setdefault(one.tenant, {True: deque(), False: deque()})
        own[one.is_interactive].append((self._count, one))

    def claim(self, room: int, held: Counter[str]) -> Iterator[Asked]:
        while room > 0 and self._queues:
            given = divided(self._fair, list(self._queues), held, room)
            if not given:
                return
            for tenant, most in given.items():
                for _ in range(most):
                    if tenant not in self._queues:
                        break
                    room -= 1
                    yield self._take(tenant)

    def tenants(self) -> Collection[str]:
        return self._queues

    def _take(self, tenant: str) -> Asked:
        own = self._queues[tenant]
        # the place in the tenant's queue, as of `api.claiming.Waiting`
        kind = min((kind for kind in own if own[kind]), key=lambda kind: own[kind][0][0] - REQUESTS_AHEAD * kind)
        _, one = own[kind].popleft()
        if not any(own.values()):
            del self._queues[tenant]
        return one
