"""The deployments in the store: which are wanted, how far each is, and what it serves.

A row is there from the moment somebody wants a deployment until its last shard is gone. The gateway writes what is
wanted and rings; the controller reads that, works towards it, and writes how far it is. So whatever dies, the next
controller finds all of it here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from api.heating import COLUMNS, IS_DESCRIBED, Heating, keeping_of
from cluster.config import ALWAYS, DeploymentSpec, Heat, Keeping, Mode, Wanted
from cluster.requests import DeploymentState, Published, ReplicaStatus
from polytrace.codec import from_json, to_json
from polytrace.errors import CapacityError, ConflictError, NotFoundError

REFUSALS = {
    Mode.DRAINING: "{0} is drained: it finishes what it has and takes no new requests until an operator ends that "
    "(`polytrace resume {0}`)",
    Mode.REMOVING: "{0} is being removed: it finishes what it has and takes no new requests",
    Mode.DROPPING: "{0} is being removed and takes no new requests",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is known of a deployment, without its larger parts."""

    model: str
    state: DeploymentState
    progress: str
    updated: float  # seconds since the epoch
    mode: Mode = Mode.SERVING
    revision: int = 0  # another one each time it was deployed
    spec: DeploymentSpec | None = None
    replicas: tuple[ReplicaStatus, ...] = ()
    heat: Heat = Heat.HOT  # that is wanted
    why: str = ""  # it is not hot
    keeping: Keeping = ALWAYS
    last_used: float | None = None
    is_described: bool = False  # it was loaded once

    @property
    def is_found(self) -> bool:
        """Whether requests can be sent to it: it runs, or they load it."""
        is_loading = self.mode is Mode.SERVING and self.keeping.on_demand and self.is_described
        runs = self.state.is_serving or self.state in (DeploymentState.DRAINING, DeploymentState.DRAINED)
        return runs or (is_loading and self.state is not DeploymentState.FAILED)


class Catalogue(Heating):
    """What the store knows of deployments. Its methods may be called from any thread."""

    # --- what is wanted

    def want(self, spec: DeploymentSpec, *, replaces: bool = False) -> Deployment:
        """Deploys a model, or makes one that is drained or has failed serve again. The number of replicas may be new.

        With `replaces`, which is a start of the service, one that is the same stays drained.

        Raises ConflictError when the name belongs to a deployment of something else (unless `replaces`, or that has
        failed and never served), or to one that is being removed.
        """
        with self._db.transaction() as db:
            row = db.execute(
                f"SELECT spec, mode, state, {IS_DESCRIBED} FROM deployments WHERE model = ?", (spec.name,)
            ).fetchone()
            is_same = row is not None and row[0] is not None and _is_same(spec, _spec(row[0]))
            stays = replaces and is_same and Mode(row[1]) is Mode.DRAINING
            if row is not None and not replaces:
                has_never_served = row[2] == DeploymentState.FAILED.value and not row[3]
                _check_same(spec, None if has_never_served else row[0], Mode(row[1]))
            db.execute(
                "INSERT INTO deployments (model, state, progress, updated, spec) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (model) DO UPDATE SET spec = excluded.spec, mode = ?, heat = 'hot', "
                "revision = deployments.revision + 1",
                (
                    spec.name,
                    DeploymentState.STARTING.value,
                    "starting",
                    time.time(),
                    json.dumps(to_json(spec)),
                    (Mode.DRAINING if stays else Mode.SERVING).value,
                ),
            )
        return self._rung(spec.name)

    def drain(self, model: str) -> Deployment:
        """It takes no new requests from now on. Raises NotFoundError, or ConflictError when it is being removed."""
        return self._change_mode(model, Mode.DRAINING)

    def resume(self, model: str) -> Deployment:
        """It takes requests again, as it is. Raises NotFoundError, or ConflictError when it is being removed."""
        return self._change_mode(model, Mode.SERVING)

    def remove(self, model: str, *, now: bool) -> Deployment:
        """It takes no new requests and goes, when what it has is finished or `now`. Raises NotFoundError."""
        return self._change_mode(model, Mode.DROPPING if now else Mode.REMOVING)

    def resize(self, model: str, replicas: int) -> Deployment:
        """Another number of replicas, while it serves. Raises NotFoundError, or ConflictError when it is removed."""
        with self._db.transaction() as db:
            row = db.execute(
                "SELECT spec, mode FROM deployments WHERE model = ? AND spec IS NOT NULL", (model,)
            ).fetchone()
            if row is None:
                raise _unknown(model)
            if Mode(row[1]) in (Mode.REMOVING, Mode.DROPPING):
                raise ConflictError(f"{model} is being removed")
            spec = replace(_spec(row[0]), replicas=replicas)
            db.execute("UPDATE deployments SET spec = ? WHERE model = ?", (json.dumps(to_json(spec)), model))
        return self._rung(model)

    def limit_deployment(self, model: str, limits: str) -> None:
        """Gives a deployment its limits. Raises NotFoundError."""
        with self._db.transaction() as db:
            if not db.execute("UPDATE deployments SET limits = ? WHERE model = ?", (limits, model)).rowcount:
                raise NotFoundError(f"there is no deployment {model[:100]!r} here")

    def wanted(self) -> list[Wanted]:
        rows = self._db.rows(
            f"SELECT spec, mode, revision, heat, heat_why, last_used, {COLUMNS} FROM deployments "
            "WHERE spec IS NOT NULL ORDER BY model"
        )
        return [
            Wanted(
                spec=_spec(row[0]),
                mode=Mode(row[1]),
                revision=row[2],
                heat=Heat(row[3]),
                why=row[4],
                last_used=row[5],
                keeping=keeping_of(*row[6:]),
            )
            for row in rows
        ]

    # --- how far it is

    def deployments(self) -> list[Deployment]:
        rows = self._db.rows(
            "SELECT model, state, progress, updated, mode, revision, spec, replicas, heat, heat_why, last_used, "
            f"{IS_DESCRIBED}, {COLUMNS} FROM deployments ORDER BY model"
        )
        return [
            Deployment(
                model=row[0],
                state=DeploymentState(row[1]),
                progress=row[2],
                updated=row[3],
                mode=Mode(row[4]),
                revision=row[5],
                spec=_spec(row[6]) if row[6] else None,
                replicas=from_json(tuple[ReplicaStatus, ...], json.loads(row[7])),
                heat=Heat(row[8]),
                why=row[9],
                last_used=row[10],
                is_described=bool(row[11]),
                keeping=keeping_of(*row[12:]),
            )
            for row in rows
        ]

    def deployment(self, model: str) -> Deployment | None:
        return next((one for one in self.deployments() if one.model == model), None)

    def published(self, model: str) -> Published | None:
        """What the deployment serves, None before it was ready for the first time."""
        rows = self._db.rows(
            "SELECT source, dtype, description, tokenizer FROM deployments "
            "JOIN descriptions ON descriptions.model = deployments.model WHERE deployments.model = ?",
            (model,),
        )
        if not rows:
            return None
        source, dtype, description, tokenizer = rows[0]
        return Published(source=source, dtype=dtype, description=description, tokenizer=tokenizer)

    def set_state(self, model: str, state: DeploymentState, progress: str) -> None:
        with self._db.transaction(is_durable=False) as db:
            db.execute(
                "INSERT INTO deployments (model, state, progress, updated) VALUES (?, ?, ?, ?) ON CONFLICT (model) DO "
                "UPDATE SET state = excluded.state, progress = excluded.progress, updated = excluded.updated",
                (model, state.value, progress, time.time()),
            )
        self._ring_gateway()

    def set_all_states(self, state: DeploymentState, progress: str) -> None:
        """Of every deployment: the controller or the service itself has ended."""
        with self._db.transaction(is_durable=False) as db:
            db.execute(
                "UPDATE deployments SET state = ?, progress = ?, updated = ?, replicas = '[]'",
                (state.value, progress, time.time()),
            )
        self._ring_gateway()

    def set_replicas(self, model: str, replicas: Sequence[ReplicaStatus]) -> None:
        with self._db.transaction(is_durable=False) as db:
            db.execute(
                "UPDATE deployments SET replicas = ? WHERE model = ?", (json.dumps(to_json(list(replicas))), model)
            )

    def publish(self, model: str, published: Published) -> None:
        """Another description than before is another revision, which the gateway then looks at anew."""
        with self._db.transaction() as db:
            known = db.execute("SELECT description FROM descriptions WHERE model = ?", (model,)).fetchone()
            is_another = known is not None and bytes(known[0]) != published.description
            is_there = db.execute(
                "UPDATE deployments SET source = ?, dtype = ?, revision = revision + ? WHERE model = ?",
                (published.source, published.dtype, int(is_another), model),
            ).rowcount
            if is_there:
                db.execute(
                    "INSERT INTO descriptions (model, description, tokenizer) VALUES (?, ?, ?) ON CONFLICT (model) DO "
                    "UPDATE SET description = excluded.description, tokenizer = excluded.tokenizer",
                    (model, published.description, published.tokenizer),
                )

    def forget(self, model: str) -> None:
        with self._db.transaction() as db:
            gone = db.execute(
                "DELETE FROM deployments WHERE model = ? AND mode IN ('removing', 'dropping')", (model,)
            ).rowcount
            if gone:
                db.execute("DELETE FROM descriptions WHERE model = ?", (model,))
                db.execute("DELETE FROM shares WHERE model = ?", (model,))
        self._ring_gateway()

    # --- inside

    def _change_mode(self, model: str, mode: Mode) -> Deployment:
        with self._db.transaction() as db:
            row = db.execute("SELECT mode FROM deployments WHERE model = ?", (model,)).fetchone()
            if row is None:
                raise _unknown(model)
            if mode in (Mode.DRAINING, Mode.SERVING) and Mode(row[0]) in (Mode.REMOVING, Mode.DROPPING):
                raise ConflictError(f"{model} is being removed")
            db.execute("UPDATE deployments SET mode = ? WHERE model = ?", (mode.value, model))
        return self._rung(model)

    def _rung(self, model: str) -> Deployment:
        """Tells both sides; how it stood before they heard."""
        found = self.deployment(model)
        self._ring_controller()
        self._ring_gateway()
        return found or Deployment(
            model=model, state=DeploymentState.STOPPED, progress="is removed", updated=time.time(), mode=Mode.REMOVING
        )  # the controller has looked by itself


def check_taking(model: str, mode: Mode) -> None:
    """Raises CapacityError with the reason when a deployment takes no new requests."""
    if mode in REFUSALS:
        raise CapacityError(REFUSALS[mode].format(model))


def _check_same(spec: DeploymentSpec, known: str | None, mode: Mode) -> None:
    if mode in (Mode.REMOVING, Mode.DROPPING):
        raise ConflictError(f"{spec.name} is being removed; deploy it again when it is gone")
    if known is None:
        return
    old = _spec(known)
    if not _is_same(spec, old):
        own, asked = asdict(replace(old, replicas=spec.replicas)), asdict(spec)
        others = ", ".join(f"{name} is {own[name]!r}, not {asked[name]!r}" for name in own if own[name] != asked[name])
        told = f"{spec.name} is {old.source} on {old.stages} x {old.ranks} shards ({old.dtype}, {old.device}) already"
        again = f"`polytrace {'resume' if mode is Mode.DRAINING else 'deploy'} {spec.name}` has it serve as it is"
        told = f"{told} ({others}); {again}; for another one `polytrace remove {spec.name}` first"
        raise ConflictError(f"{told}, or choose another name")


def _is_same(spec: DeploymentSpec, known: DeploymentSpec) -> bool:
    """Whether they are one deployment, of however many replicas."""
    return replace(known, replicas=spec.replicas) == spec


@lru_cache(maxsize=256)  # the controller asks at every ring of its bell
def _spec(text: str) -> DeploymentSpec:
    return from_json(DeploymentSpec, json.loads(text))


def _unknown(model: str) -> NotFoundError:
    return NotFoundError(f"there is no deployment {model[:100]!r} here")
