"""When requests arrive: as a list of seconds from the start, the same for the same seed.

Open loops do not wait for answers, so a service that falls behind sees its queue grow, as it would with real users
(Schroeder et al., "Open Versus Closed", NSDI 2006). In a closed loop each client sends when it has its answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent users: gaps are exponential."""

    rate: float  # requests a second

    def times(self, seconds: float, rng: Random) -> Iterator[float]:
        at = rng.expovariate(self.rate)
        while at < seconds:
            yield at
            at += rng.expovariate(self.rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursty:
    """Notebooks and deadlines: silence, then many at once. The same rate as Poisson's over a long time."""

    rate: float  # requests a second, silence included
    burst: int = 16  # requests of one burst, on average
    within_s: float = 0.2  # a burst lasts so long

    def times(self, seconds: float, rng: Random) -> Iterator[float]:
        made = []
        start = rng.expovariate(self.rate / self.burst)
        while start < seconds:
            size = 1 + int(rng.expovariate(1.0 / self.burst))  # 1, 2, ... with about this mean
            made += [start + rng.random() * self.within_s for _ in range(size)]
            start += rng.expovariate(self.rate / self.burst)
        return iter(sorted(at for at in made if at < seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOnce:
    """A script that submits all it has, as fast as it can, and goes home."""

    requests: int
    within_s: float = 0.0

    def times(self, seconds: float, rng: Random) -> Iterator[float]:
        return iter(sorted(rng.random() * self.within_s for _ in range(self.requests)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """Clients that each wait for an answer before they send again."""

    clients: int
    think_s: float = 0.0  # between an answer and the next request, on average
