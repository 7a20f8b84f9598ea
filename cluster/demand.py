"""Which deployments are loaded: those that somebody needs, as far as there is room.

Looks at all deployments now and then and changes what the store wants of each (`Heat`); their replica sets follow. It
loads what is pinned and what its schedule keeps loaded (a request loads an on-demand deployment by itself, in the
transaction that accepts it), lets rest what is idle, and when one waits for room lets those rest that were used least
lately. Ray says what there is room for; nothing is reckoned that it would not place.

Never loses a request: a deployment rests only while it has none (`ControllerStore.cool`), and one that cannot be loaded
refuses those that wait for it with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import Heat, Mode, Wanted
from cluster.hours import hours_of
from cluster.requests import ControllerStore, DeploymentState
from polytrace.errors import ServiceError

LOOK_S = 0.5  # between two looks
GRACE_S = 2.0  # without a request, before a deployment may rest at all
SETTLE_S = 3.0  # until the cluster has heard of all that those had who rest now
STUCK_S = 10.0  # that room which is enough in sum may take to do: it may lie on too many nodes

Resources = Mapping[str, float]  # of a Ray cluster

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a deployment stands."""

    wanted: Wanted
    state: DeploymentState
    progress: str
    is_busy: bool  # it has requests
    used: float  # when it had its last one, or became ready; seconds since the epoch
    holds: Resources  # of the cluster
    lacks: Resources  # and waits for

    @property
    def name(self) -> str:
        return self.wanted.spec.name


class Demand:
    """For the controller's thread. `free`: what nobody holds of the cluster."""

    def __init__(self, store: ControllerStore, free: Callable[[], Resources]) -> None:
        self._store = store
        self._free = free
        self._looked = 0.0
        self._notes: dict[str, str] = {}
        self._gone = 0.0  # when somebody was on the way to rest
        self._enough_since: dict[str, float] = {}  # by the deployment that waits although there is room in sum

    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return abs(self._store.now() - self._looked) >= LOOK_S

    def look(self, standings: Sequence[Standing]) -> dict[str, str]:
        """Changes what is wanted where it is time to; of those that wait for room, why nobody makes it."""
        now = self._looked = self._store.now()
        for one in standings:
            if one.wanted.mode is Mode.SERVING:
                self._see(one, now)
        return self._make_room(standings, now)

    def _see(self, one: Standing, now: float) -> None:
        keeping, is_hot = one.wanted.keeping, one.wanted.heat is Heat.HOT
        if is_kept(one.wanted, now):
            if not is_hot:
                self._store.heat_up(one.name)
        elif keeping.on_demand and one.state is DeploymentState.FAILED:
            told = f"{one.name} could not be loaded: {one.progress}"
            _log.warning("%s", told, extra={"model": one.name})
            self._store.refuse(one.name, ServiceError(told))
            self._store.cool(one.name, Heat.COLD, f"failed: {one.progress}", "failed")
        elif is_hot and may_rest(one, now) and (why := idle_for(one, now)) is not None:
            self._store.cool(one.name, keeping.rests, why, "idle")

    def _make_room(self, standings: Sequence[Standing], now: float) -> dict[str, str]:
        told: dict[str, str] = {}
        waiting = [one for one in standings if one.state is DeploymentState.WAITING and one.lacks]
        if not waiting:
            self._enough_since.clear()
            return told
        going = [one for one in standings if one.wanted.heat is not Heat.HOT and one.holds]
        if going:
            self._gone = now
        elif now - self._gone < SETTLE_S:
            return self._notes
        self._notes = told
        free = total([self._free(), *(one.holds for one in going)])
        candidates = [one for one in standings if one not in going and one.holds and one not in waiting]
        for one in waiting:
            resting = [other for other in candidates if can_make_room(other, now)]
            victims = choose(one.lacks, free, resting)
            if victims is None:
                told[one.name] = _why_not(candidates, now)
                continue
            if not victims and not going and self._is_stuck(one.name, now) and resting:
                victims = [min(resting, key=lambda other: other.used)]
            for victim in victims:
                _log.info("%s makes room for %s", victim.name, one.name, extra={"model": victim.name})
                self._store.cool(victim.name, victim.wanted.keeping.rests, f"made room for {one.name}", "room")
            candidates = [other for other in candidates if other not in victims]
            free = total([free, *(victim.holds for victim in victims)])
            free = {name: amount - one.lacks.get(name, 0.0) for name, amount in free.items()}
        return told

    def _is_stuck(self, name: str, now: float) -> bool:
        since = self._enough_since.setdefault(name, now)
        if now - since < STUCK_S:
            return False
        del self._enough_since[name]
        return True


def is_kept(wanted: Wanted, now: float) -> bool:
    """Whether a deployment is to be loaded whoever asks for it or not."""
    keeping = wanted.keeping
    return keeping.is_pinned or (keeping.schedule is not None and hours_of(keeping.schedule).until(now) is not None)


def may_rest(one: Standing, now: float) -> bool:
    """Whether nobody needs it just now."""
    return one.state.is_serving and not one.is_busy and now - one.used >= GRACE_S


def idle_for(one: Standing, now: float) -> str | None:
    """Why it rests, None while it does not."""
    keeping = one.wanted.keeping
    if keeping.idle_minutes is not None and now - one.used >= 60 * keeping.idle_minutes:
        return f"nobody asked for {keeping.idle_minutes:g} minutes"
    if keeping.idle_minutes is None and keeping.schedule is not None and not keeping.on_demand:
        return f"outside of {keeping.schedule}"
    return None


def can_make_room(one: Standing, now: float) -> bool:
    """Whether it may rest for the sake of others: only what a request or its schedule loads again."""
    keeping = one.wanted.keeping
    comes_back = keeping.on_demand or keeping.schedule is not None
    is_serving = one.wanted.mode is Mode.SERVING
    return is_serving and comes_back and may_rest(one, now) and not is_kept(one.wanted, now)


def choose(lacks: Resources, free: Resources, candidates: Iterable[Standing]) -> list[Standing] | None:
    """Those that are to rest so that there is room: as few as do, those used least lately first; none when there is
    room already. None when all of them would not do.
    """
    victims: list[Standing] = []
    for one in sorted(candidates, key=lambda one: one.used):
        if is_enough(lacks, total([free, *(victim.holds for victim in victims)])):
            break
        victims.append(one)
    if not is_enough(lacks, total([free, *(victim.holds for victim in victims)])):
        return None
    for one in list(victims):  # the first ones may have given what was not lacking
        others = [other for other in victims if other is not one]
        if is_enough(lacks, total([free, *(other.holds for other in others)])):
            victims = others
    return victims


def is_enough(lacks: Resources, free: Resources) -> bool:
    return all(free.get(name, 0.0) >= amount - 1e-6 for name, amount in lacks.items())


def total(parts: Iterable[Resources]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            found[name] = found.get(name, 0.0) + amount
    return found


def _why_not(others: Sequence[Standing], now: float) -> str:
    """Why those that hold something do not make room."""
    return "; ".join(f"{one.name} {_stays(one, now)}" for one in others) or "nothing else is loaded"


def _stays(one: Standing, now: float) -> str:
    keeping = one.wanted.keeping
    if keeping.is_pinned:
        return "is pinned"
    if is_kept(one.wanted, now):
        return f"is kept by its schedule {keeping.schedule}"
    if not keeping.on_demand and keeping.schedule is None:
        return "is not on demand"
    return "has requests" if one.is_busy or one.state.is_serving else f"is {one.state.value}"
