"""Who goes first: as the product has it, or as what it is held against.

Both baselines have the product's scheduler, packer and pass sizes. `fcfs` takes requests and fills passes in the order
of arrival, whoever's they are; it has 256 in memory, and so keeps nearer to that order than with more. `one` has one
request in memory and one pass in flight: what a service does that runs requests one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bench.simulator.books import Books
from scheduling.fair import FairShares
from scheduling.policy import MAX_ACTIVE, PassPolicy, passes_in_flight

Work = TypeVar("Work")


class RecordedShares(FairShares):
    """The product's shares, and books beside them."""

    def __init__(self, books: Books) -> None:
        super().__init__()
        self._books = books

    def went(self, charges: Mapping[str, float], left: Sequence[str], *, replica: object = None) -> None:
        super().went(charges, left, replica=replica)
        self._books.went(charges, left)

    def correct(self, tenant: str, cost: float) -> None:
        super().correct(tenant, cost)
        self._books.correct(tenant, cost)


class NoShares(RecordedShares):
    """All are even whatever they were served, and nobody is held back."""

    def counter(self, tenant: str) -> float:
        return 0.0

    def interleaved(self, waiting: Mapping[str, Sequence[Work]], cost: Callable[[Work], float]) -> Iterator[Work]:
        """By turn, which is the order of arrival."""
        return iter(sorted((one for own in waiting.values() for one in own), key=lambda one: one.turn))  # type: ignore[attr-defined]

    def excess(self, charges: Mapping[str, float], left: Sequence[str]) -> dict[str, float]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a simulated deployment is run."""

    is_fair: bool
    max_active: int = MAX_ACTIVE  # requests in memory, as of `cluster.config`
    pass_policy: PassPolicy = field(default_factory=PassPolicy)
    is_alone: bool = False  # one pass in flight

    def depth(self, stages: int) -> int:
        """Passes in flight."""
        return 1 if self.is_alone else passes_in_flight(stages)

    def shares(self, books: Books) -> FairShares:
        return RecordedShares(books) if self.is_fair else NoShares(books)


POLICIES: Mapping[str, Policy] = {
    "fair": Policy(is_fair=True),
    "fcfs": Policy(is_fair=False, max_active=256),
    "one": Policy(is_fair=False, is_alone=True, max_active=1, pass_policy=PassPolicy(max_members=1)),
}
