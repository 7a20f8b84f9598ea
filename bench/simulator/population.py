"""Who shares the deployment, and when each of them asks for what: the same for the same seed.

Three tenants of equal weight submit a tenth of all requests each in the first minute, and are backlogged from then on:
one with sweeps of several passes each, one who harvests activations of long texts, one with small patches. One
tenant asks for a single small trace now and then. All others are people at notebooks (one request at a time) and labs
(bursts), who together ask for less than what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from random import Random

from bench.load.arrivals import AtOnce, Bursty, Closed, Poisson
from bench.load.tenants import Tenant
from bench.simulator.experiments import EXPERIMENTS

STANDING = ("sweeps", "harvest", "patches")  # backlogged from the start, of equal weight
SINGLE = "single"
_LAB_SHARE = 0.1  # of the others are labs, with four tenths of what they all ask for
_LAB_REQUESTS = 0.4
_PEOPLE = {"lens": 4.0, "patch": 3.0, "ablation": 2.0, "steering": 2.0, "generation": 1.0}
_LABS = {"patch": 2.0, "ablation": 2.0, "steering": 1.0, "sweep": 0.2}


@dataclass(frozen=True, slots=True, order=True)
class Asked:
    """One request."""

    at: float  # seconds from the start
    tenant: str
    number: int  # of its tenant's
    experiment: str
    length: int  # of its prompt
    place: int  # where its tokens begin in a text that is the same for all
    is_interactive: bool


def population(requests: int, tenants: int, seconds: float) -> tuple[Tenant, ...]:
    """So many tenants, of whom those who come and go have enough for `seconds`. At least 6."""
    others = tenants - len(STANDING) - 1
    labs = max(1, int(others * _LAB_SHARE))
    single = max(1, requests // 500)
    rest = requests - 3 * (requests // 10) - single
    of_labs = rest * _LAB_REQUESTS / labs / seconds
    of_people = rest * (1 - _LAB_REQUESTS) / (others - labs) / seconds
    script = AtOnce(requests=requests // 10, within_s=seconds / 120)
    return (
        Tenant(name="sweeps", arrivals=script, mix={"sweep": 1.0}, is_interactive=False),
        Tenant(name="harvest", arrivals=script, mix={"activations": 1.0}, is_interactive=False),
        Tenant(name="patches", arrivals=script, mix={"patch": 1.0}, is_interactive=False),
        Tenant(name=SINGLE, arrivals=Poisson(rate=single / seconds), mix={"lens": 1.0}),
        *(Tenant(name=f"lab{n}", arrivals=Bursty(rate=of_labs, within_s=5.0), mix=_LABS) for n in range(labs)),
        *(Tenant(name=f"person{n}", arrivals=Poisson(rate=of_people), mix=_PEOPLE) for n in range(others - labs)),
    )


def kind_of(tenant: str) -> str:
    """The class of tenants that a tenant belongs to, for figures."""
    return tenant.rstrip("0123456789")


def asked(tenants: Sequence[Tenant], requests: int, seconds: float, seed: int, text_tokens: int) -> list[Asked]:
    """The first so many requests of all tenants, by time."""
    streams = [_of(tenant, 2 * seconds, Random(f"{seed}:{tenant.name}"), text_tokens) for tenant in tenants]
    return list(islice(merge(*streams), requests))


def _of(tenant: Tenant, seconds: float, rng: Random, text_tokens: int) -> Iterator[Asked]:
    assert not isinstance(tenant.arrivals, Closed), "who waits for answers is no list of times"
    names, weights = list(tenant.mix), list(tenant.mix.values())
    for number, at in enumerate(tenant.arrivals.times(seconds, rng)):
        experiment = rng.choices(names, weights)[0]
        lengths = EXPERIMENTS[experiment].lengths
        (length,) = rng.choices(list(lengths), list(lengths.values()))
        yield Asked(at, tenant.name, number, experiment, length, rng.randrange(text_tokens), tenant.is_interactive)
