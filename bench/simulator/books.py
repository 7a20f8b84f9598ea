"""What every tenant was served, who was left out meanwhile, and how far apart two backlogged tenants ever were.

Knows nothing of how it was decided. A tenant is backlogged from the first pass that left out something of it that could
have gone, or that waits in the store, until the first that did not. Served is what passes were planned to cost its
requests, put right by what was measured, in token-layers. All weights are equal here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

_WATCHED = 128  # backlogged tenants of whom all pairs are looked at, those that have waited longest


class Books:
    """Of one run."""

    def __init__(
        self,
        tenants: Sequence[str],
        clock: Callable[[], float],
        watched: Sequence[str] = (),
        in_store: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """`watched`: tenants whose service over time is kept; `in_store`: those of whom something waits there."""
        self._in_store = in_store
        self._places = {tenant: place for place, tenant in enumerate(tenants)}
        self._clock = clock
        self.served = np.zeros(len(tenants))
        self.largest_pass = 0.0
        self.largest_gap = 0.0  # by how much more one of two backlogged tenants was served than the other
        self.most_backlogged = 0
        self.watched = tuple(watched)
        self.times: list[float] = []
        self.lines: list[list[float]] = []  # by time: of each watched tenant what it was served so far
        self.gaps: list[float] = []  # by time: the largest gap of the pairs that are backlogged then
        self._watched = np.array([self._places[tenant] for tenant in watched], dtype=int)
        self._num_passes = 0
        self._since = np.full(len(tenants), -1)  # the pass since which a tenant is backlogged
        # of each pair, while both are backlogged: the least and the most that the first was ahead
        self._low = np.zeros((len(tenants), len(tenants)))
        self._high = np.zeros((len(tenants), len(tenants)))

    def went(self, charges: Mapping[str, float], left: Sequence[str]) -> None:
        """A pass is planned; `left` are those of whom it leaves something out."""
        self._num_passes += 1
        here = np.array(sorted(self._places[tenant] for tenant in {*left, *self._in_store()}), dtype=int)
        self.most_backlogged = max(self.most_backlogged, len(here))
        fresh = here[self._since[here] < 0]
        ended = np.ones(len(self._since), dtype=bool)
        ended[here] = False
        self._since[ended] = -1
        self._since[fresh] = self._num_passes
        if len(here) > _WATCHED:
            here = np.sort(here[np.argsort(self._since[here], kind="stable")[:_WATCHED]])
        self._begin(here)
        for tenant, cost in charges.items():
            self.served[self._places[tenant]] += cost
        self.largest_pass = max(self.largest_pass, sum(charges.values()))
        self._look(here)

    def correct(self, tenant: str, cost: float) -> None:
        """What was measured beyond what a pass was planned to cost, or below it."""
        self.served[self._places[tenant]] += cost

    def _begin(self, here: np.ndarray) -> None:
        """Pairs that are backlogged from this pass on begin with what they were served before it."""
        fresh = self._since[here] == self._num_passes
        if not fresh.any():
            return
        ahead = self._ahead(here)
        pairs = fresh[:, None] | fresh[None, :]
        block = np.ix_(here, here)
        self._low[block] = np.where(pairs, ahead, self._low[block])
        self._high[block] = np.where(pairs, ahead, self._high[block])

    def _look(self, here: np.ndarray) -> None:
        gap = 0.0
        if len(here) > 1:
            ahead, block = self._ahead(here), np.ix_(here, here)
            low, high = np.minimum(self._low[block], ahead), np.maximum(self._high[block], ahead)
            self._low[block], self._high[block] = low, high
            gap = float((high - low).max())
        self.largest_gap = max(self.largest_gap, gap)
        self.times.append(self._clock())
        self.gaps.append(gap)
        self.lines.append(self.served[self._watched].tolist())

    def _ahead(self, here: np.ndarray) -> np.ndarray:
        own = self.served[here]
        return np.asarray(own[:, None] - own[None, :])
