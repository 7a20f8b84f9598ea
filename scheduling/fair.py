"""Fair shares of tenants: what each was served, divided by its weight, and who is next.

The virtual counters of VTC (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024) over the cost of
passes instead of tokens. A tenant's counter grows by cost / weight when a pass is planned and is put right by what was
measured; whoever has the least goes first. Owns the counters; knows nothing of passes, stores and shards.

Words: a tenant is *backlogged* while something of it that could have gone was left out of the last pass. L is the cost
of the largest pass so far, w a tenant's weight.

Bounds, each tested
- Credit: none. Who was away, or had less to run than its share, begins beside the least of the backlogged.
- Gap: counters of two backlogged tenants are at most L / min(w) apart, if what is measured is what was planned. So what
  two of equal weight are served while both are backlogged differs by at most 2 L.
- Ageing: a tenant that others are not behind goes into the very next pass. One that is ahead goes at the latest when
  every other one has caught up: others are served at most the sum over them of w_j x (its counter - theirs) + L each.
- Work-conserving: no pass is empty while somebody waits, and the room that one tenant does not take others do, up to
  the gap.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

_MAX_REMEMBERED = 4096  # tenants with counters that say no more than a newcomer's

Work = TypeVar("Work")


class FairShares:
    """The counters of one deployment, of all its replicas. Any thread."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """`weights` of tenants, above 0; 1 of those that are not named."""
        self._weights = dict(weights or {})
        self._counters: dict[str, float] = {}
        self._served: dict[str, int] = {}  # when it was charged last, for ties
        self._left: dict[object, set[str]] = {}  # by replica: who was left out of its last pass
        self._floor = 0.0  # the least counter of the backlogged, as far as it ever got
        self._largest = 0.0  # cost of a pass
        self._num_charges = 0
        self._lock = threading.RLock()

    def weigh(self, weights: Mapping[str, float]) -> None:
        """From now on."""
        with self._lock:
            self._weights = dict(weights)

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def counter(self, tenant: str) -> float:
        """What it was served by its weight, lifted to what a newcomer has."""
        with self._lock:
            return max(self._counters.get(tenant, self._floor), self._floor)

    @property
    def counters(self) -> dict[str, float]:
        """Of all who are remembered, for people."""
        with self._lock:
            return {tenant: self.counter(tenant) for tenant in self._counters}

    @property
    def largest_pass(self) -> float:
        """Its cost."""
        return self._largest

    def order(self, tenants: Sequence[str]) -> list[str]:
        """Who goes first; of equals whoever was served longest ago."""
        with self._lock:
            return sorted(tenants, key=lambda tenant: (self.counter(tenant), self._served.get(tenant, 0), tenant))

    def interleaved(self, waiting: Mapping[str, Sequence[Work]], cost: Callable[[Work], float]) -> Iterator[Work]:
        """All that waits, each tenant's in its order, in the order in which it should go: as if each piece were charged
        when it is named. What fits of a prefix of that is divided max-min by weight.
        """
        if len(waiting) < 2:
            for own in waiting.values():
                yield from own
            return
        names = self.order([tenant for tenant, own in waiting.items() if own])
        heap = [(self.counter(tenant), place, tenant, 0) for place, tenant in enumerate(names)]
        weights = {tenant: self.weight(tenant) for tenant in names}
        while heap:
            counter, place, tenant, index = heap[0]
            own = waiting[tenant]
            yield own[index]
            if index + 1 < len(own):
                heapq.heapreplace(heap, (counter + cost(own[index]) / weights[tenant], place, tenant, index + 1))
            else:
                heapq.heappop(heap)

    def excess(self, charges: Mapping[str, float], left: Sequence[str]) -> dict[str, float]:
        """How much less each tenant of a pass must be served, for the gap to those who are left out to keep."""
        if not left:
            return {}
        with self._lock:
            after = {name: self.counter(name) + charges.get(name, 0.0) / self.weight(name) for name in left}
            least = min(left, key=lambda name: after[name])
            most = max(self._largest, sum(charges.values()))
            found = {}
            for tenant, charge in charges.items():
                room = most / min(self.weight(tenant), self.weight(least))
                over = self.counter(tenant) + charge / self.weight(tenant) - after[least] - room
                if over > 1e-9 * most:
                    found[tenant] = over * self.weight(tenant)
            return found

    def went(self, charges: Mapping[str, float], left: Sequence[str], *, replica: object = None) -> None:
        """A pass is planned: what it costs by tenant, and who was left out though they could have gone."""
        with self._lock:
            for tenant, cost in charges.items():
                self._num_charges += 1
                self._served[tenant] = self._num_charges
                self._counters[tenant] = self.counter(tenant) + cost / self.weight(tenant)
            for tenant in left:
                self._counters[tenant] = self.counter(tenant)
            self._left[replica] = set(left)
            self._largest = max(self._largest, sum(charges.values()))
            backlogged = set().union(*self._left.values())
            if backlogged:
                self._floor = max(self._floor, min(map(self.counter, backlogged)))
            elif charges:  # nobody waits: all are even
                self._floor = max(self._floor, *(self._counters[tenant] for tenant in charges))
            if len(self._counters) > _MAX_REMEMBERED:
                self._forget()

    def correct(self, tenant: str, cost: float) -> None:
        """What was measured beyond what was charged, or less than it: below 0."""
        with self._lock:
            self._counters[tenant] = self.counter(tenant) + cost / self.weight(tenant)

    def snapshot(self) -> dict[str, float]:
        """All that `restore` needs: counters, and as that of nobody ("") what a newcomer has."""
        with self._lock:
            return {"": self._floor} | {tenant: self.counter(tenant) for tenant in self._counters}

    def restore(self, counters: Mapping[str, float]) -> None:
        """What a `snapshot` said, before anybody is charged."""
        with self._lock:
            self._counters = {tenant: counter for tenant, counter in counters.items() if tenant}
            self._floor = counters.get("", 0.0)

    def close(self, replica: object) -> None:
        """A replica has ended: nobody waits there."""
        with self._lock:
            self._left.pop(replica, None)

    def _forget(self) -> None:
        """Those who have no more than a newcomer."""
        waiting = set().union(*self._left.values())
        for tenant in [name for name in self._counters if name not in waiting]:
            if self._counters[tenant] <= self._floor:
                del self._counters[tenant]
                self._served.pop(tenant, None)
