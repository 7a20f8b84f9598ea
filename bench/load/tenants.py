"""Who sends: tenants with keys, weights, ways to arrive and mixes of experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.load.arrivals import AtOnce, Bursty, Closed, Poisson


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One of those who share the service."""

    name: str
    arrivals: Poisson | Bursty | AtOnce | Closed
    mix: Mapping[str, float] = field(
        default_factory=lambda: {"small": 1.0}
    )  # experiment of `bench.load.mixes` -> weight
    key: str | None = None
    weight: float = 1.0  # of its share; an own service is told, another one's operator has
    is_interactive: bool = True
    begins_s: float = 0.0  # ... and it is silent before


SCENARIOS: Mapping[str, tuple[Tenant, ...]] = {
    # a seminar: everybody at a notebook
    "notebooks": (
        Tenant(name="students", arrivals=Poisson(rate=20.0)),
        Tenant(name="lab", arrivals=Poisson(rate=10.0), mix={"small": 3.0, "lens": 1.0}),
        Tenant(name="deadline", arrivals=Bursty(rate=10.0)),
    ),
    # one who sweeps everything, beside people who look at single prompts
    "sweeper": (
        Tenant(name="sweeper", arrivals=Closed(clients=16), mix={"sweep": 1.0}, is_interactive=False),
        Tenant(name="people", arrivals=Poisson(rate=5.0)),
    ),
    # two who always have more waiting than a pass takes of them
    "backlogged": (
        Tenant(name="left", arrivals=Closed(clients=16), mix={"sweep": 1.0}, is_interactive=False),
        Tenant(name="right", arrivals=Closed(clients=32), mix={"sweep": 1.0, "lens": 2.0}, is_interactive=False),
    ),
    "mixed": (
        Tenant(name="students", arrivals=Closed(clients=24, think_s=0.05)),
        Tenant(name="sweeps", arrivals=Closed(clients=4), mix={"sweep": 1.0}, is_interactive=False),
        Tenant(name="writers", arrivals=Closed(clients=4), mix={"generation": 1.0}),
    ),
}
