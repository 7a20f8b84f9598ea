"""Whose waves go next: candidates by the counters of their tenants, and what a pass costs whom.

Owns the way from `scheduling.fair`'s counters to an order of candidates that `scheduling.policy` fills passes in.
Within a tenant the order stays as given. With one tenant nothing is changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeAlias, TypeVar

from scheduling.fair import FairShares
from scheduling.policy import Candidate


class Owned(Candidate, Protocol):
    """A candidate that somebody pays for."""

    @property
    def tenant(self) -> str: ...

    @property
    def is_suspect(self) -> bool:
        """Whether it goes before all others, and alone."""

    def cost(self, num_rows: int | None = None) -> float:
        """In token-layers, with so many of its rows, or all."""


AnyOwned = TypeVar("AnyOwned", bound=Owned)
ByTenant: TypeAlias = dict[str, list[AnyOwned]]  # those who wait


class FairChoice:
    """One replica's part in the shares."""

    def __init__(self, shares: FairShares, replica: object) -> None:
        self.shares = shares
        self._replica = replica

    def ordered(self, waiting: Sequence[AnyOwned], tenants: ByTenant[AnyOwned]) -> list[AnyOwned]:
        """Suspects as they are; else by tenants. Steps go before others, but not before those of a tenant that is
        behind all whose steps they are: it would wait for ever where steps take all there is.
        """
        if len(tenants) < 2 or waiting[0].is_suspect:
            return list(waiting)
        ready = list(self.shares.interleaved(tenants, lambda one: one.cost()))
        if self.is_behind_steps(tenants):
            return ready
        return [*(one for one in ready if one.is_step), *(one for one in ready if not one.is_step)]

    def is_behind_steps(self, tenants: ByTenant[AnyOwned]) -> bool:
        """Whether a tenant with no step that may go was served less than all that have some."""
        with_steps = {tenant for tenant, own in tenants.items() if any(one.is_step for one in own)}
        others = tenants.keys() - with_steps
        if not with_steps or not others:
            return False
        counter = self.shares.counter
        return min(map(counter, others)) < min(map(counter, with_steps))

    def trimmed(
        self, chosen: Sequence[tuple[AnyOwned, int]], tenants: ByTenant[AnyOwned]
    ) -> list[tuple[AnyOwned, int]]:
        """Without those that would bring their tenant further ahead of one that is left out than the gap allows. The
        first stays, and who must go together.
        """
        kept = list(chosen)
        if any(one.party is not None for one, _ in kept):
            return kept
        excess = self.shares.excess(_charges(kept), _left(kept, tenants))
        for place in range(len(kept) - 1, 0, -1):
            one, rows = kept[place]
            if excess.get(one.tenant, 0.0) > 0:
                excess[one.tenant] -= one.cost(rows)
                del kept[place]
        return kept

    def went(self, chosen: Sequence[tuple[AnyOwned, int]], tenants: ByTenant[AnyOwned]) -> None:
        """Charges those who are in a pass."""
        self.shares.went(_charges(chosen), _left(chosen, tenants), replica=self._replica)


def by_tenant(waiting: Sequence[AnyOwned]) -> ByTenant[AnyOwned]:
    """Each tenant's, in the order given: found once a pass, as many may wait."""
    found: dict[str, list[AnyOwned]] = {}
    for one in waiting:
        found.setdefault(one.tenant, []).append(one)
    return found


def _charges(chosen: Sequence[tuple[AnyOwned, int]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one, rows in chosen:
        found[one.tenant] = found.get(one.tenant, 0.0) + one.cost(rows)
    return found


def _left(chosen: Sequence[tuple[AnyOwned, int]], tenants: ByTenant[AnyOwned]) -> list[str]:
    """Tenants of whom something is left out, in a fixed order. Who is chosen is one of those who wait."""
    gone = Counter(one.tenant for one, _ in chosen)
    return [tenant for tenant, own in tenants.items() if len(own) > gone[tenant]]
