"""What the store wants of each deployment: to be loaded, to rest, and for how long it is kept.

Operators say so (`keep`, `load`, `evict`), a request that needs an on-demand deployment (`api.starting`), and the
controller (`cluster.demand`), which then works towards it. A deployment never rests while it has requests that have not
ended: `cool` and `api.starting` are transactions of one writer, so a request is either before the one or after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from api.database import Database, Transaction
from cluster.config import Heat, Keeping, Mode
from cluster.hours import hours_of
from polytrace.errors import ConflictError, NotFoundError, UserError

MAX_IDLE_MINUTES = 60.0 * 24 * 366
COLUMNS = "on_demand, is_pinned, schedule, idle_minutes, rests"  # of `Keeping`
IS_DESCRIBED = "EXISTS (SELECT 1 FROM descriptions WHERE descriptions.model = deployments.model)"  # it was loaded once


class Heating:
    """The part of the catalogue that knows of heat. Its methods may be called from any thread."""

    now: Callable[[], float]  # seconds since the epoch

    def __init__(self, db: Database, *, ring_controller: Callable[[], None], ring_gateway: Callable[[], None]) -> None:
        self._db = db
        self._ring_controller = ring_controller
        self._ring_gateway = ring_gateway

    def keep(self, model: str, change: Mapping[str, Any]) -> Keeping:
        """Changes what is named of how a deployment is kept. One that is pinned is loaded.

        Raises NotFoundError, and UserError for what cannot be.
        """
        with self._db.transaction() as db:
            before = _keeping(db, model)
            keeping = checked_keeping(replace(before, **change))
            plain = asdict(keeping)
            db.execute(
                "UPDATE deployments SET on_demand = ?, is_pinned = ?, schedule = ?, idle_minutes = ?, rests = ? "
                "WHERE model = ?",
                (
                    int(keeping.on_demand),
                    int(keeping.is_pinned),
                    plain["schedule"],
                    plain["idle_minutes"],
                    keeping.rests.value,
                    model,
                ),
            )
            if keeping.is_pinned:
                _heat_up(db, model, self.now())
        self._ring_both()
        return keeping

    def load(self, model: str) -> None:
        """A deployment is to be hot, and is tried again when that has failed. Raises NotFoundError, ConflictError."""
        with self._db.transaction() as db:
            _check_mode(db, model)
            _heat_up(db, model, self.now())
            db.execute("UPDATE deployments SET revision = revision + 1 WHERE model = ? AND state = 'failed'", (model,))
        self._ring_both()

    def evict(self, model: str, heat: Heat | None, why: str) -> Heat:
        """A deployment is to finish what it has and then be no hotter than this; None: as it rests. What it is to be.

        Raises NotFoundError, and ConflictError for one that is pinned, that its schedule keeps, or that is removed.
        """
        with self._db.transaction() as db:
            _check_mode(db, model)
            keeping = _keeping(db, model)
            if keeping.is_pinned:
                raise ConflictError(f"{model} is pinned: unpin it first")
            if keeping.schedule is not None and hours_of(keeping.schedule).until(self.now()) is not None:
                raise ConflictError(f"{model} is kept loaded by its schedule {keeping.schedule}: change that first")
            heat = heat or keeping.rests
            db.execute(
                "UPDATE deployments SET heat = ?, heat_why = ?, heat_since = ? WHERE model = ?",
                (heat.value, why, self.now(), model),
            )
        self._ring_both()
        return heat

    # --- the controller's (cluster.requests.ControllerStore)

    def cool(self, model: str, heat: Heat, why: str, cause: str) -> bool:
        """A deployment is to rest, unless it has requests that have not ended; whether it is so. `cause`: a word of
        why, for counts.
        """
        with self._db.transaction() as db:
            changed = db.execute(
                "UPDATE deployments SET heat = ?1, heat_why = ?2, heat_since = ?3 WHERE model = ?4 AND heat = 'hot' "
                "AND NOT EXISTS (SELECT 1 FROM requests WHERE model = ?4 AND state IN ('queued', 'running'))",
                (heat.value, why[:2000], self.now(), model),
            ).rowcount
        if changed:
            self._ring_both()
        return bool(changed)

    def heat_up(self, model: str) -> None:
        with self._db.transaction() as db:
            _heat_up(db, model, self.now())
        self._ring_both()

    def note_used(self, model: str, at: float) -> None:
        with self._db.transaction(is_durable=False) as db:
            db.execute("UPDATE deployments SET last_used = ? WHERE model = ?", (at, model))

    # --- inside

    def _ring_both(self) -> None:
        self._ring_controller()
        self._ring_gateway()


def keeping_of(on_demand: int, is_pinned: int, schedule: str | None, idle: float | None, rests: str) -> Keeping:
    """From the columns, in their order."""
    return Keeping(
        on_demand=bool(on_demand), is_pinned=bool(is_pinned), schedule=schedule, idle_minutes=idle, rests=Heat(rests)
    )


def checked_keeping(keeping: Keeping) -> Keeping:
    """The same. Raises UserError when it cannot be."""
    if keeping.schedule is not None:
        hours_of(keeping.schedule)
    idle = keeping.idle_minutes
    if idle is not None and not (math.isfinite(idle) and 0 < idle <= MAX_IDLE_MINUTES):
        raise UserError(f"idle_minutes is {idle:g}; it is more than 0 and at most {MAX_IDLE_MINUTES:,.0f}")
    if idle is not None and not keeping.on_demand and keeping.schedule is None:
        raise UserError("idle_minutes is for deployments that are loaded again: on demand, or by a schedule")
    if keeping.rests is Heat.HOT:
        raise UserError("a deployment rests warm or cold")
    return keeping


def _keeping(db: Transaction, model: str) -> Keeping:
    row = db.execute(f"SELECT {COLUMNS} FROM deployments WHERE model = ?", (model,)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no deployment {model[:100]!r} here")
    return keeping_of(*row)


def _check_mode(db: Transaction, model: str) -> None:
    row = db.execute("SELECT mode FROM deployments WHERE model = ?", (model,)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no deployment {model[:100]!r} here")
    if Mode(row[0]) in (Mode.REMOVING, Mode.DROPPING):
        raise ConflictError(f"{model} is being removed")


def _heat_up(db: Transaction, model: str, now: float) -> None:
    db.execute(
        "UPDATE deployments SET heat = 'hot', heat_why = '', heat_since = ? WHERE model = ? AND heat <> 'hot'",
        (now, model),
    )
