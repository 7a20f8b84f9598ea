"""The routes that say for how long deployments stay loaded: keep, load, evict. For operators, and audited."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from api.callers import operator_of
from api.heating import MAX_IDLE_MINUTES
from api.store import Store
from cluster.config import Heat
from cluster.hours import MAX_CHARS
from polytrace.codec import to_json
from polytrace.errors import UserError


class HeatRoutes:
    """Has no state of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/models/{name}/keeping", self.keep, methods=["PATCH"])
        router.add_api_route("/models/{name}/load", self.load, methods=["POST"], status_code=202)
        router.add_api_route("/models/{name}/evict", self.evict, methods=["POST"], status_code=202)

    async def keep(self, name: str, wish: Keep, request: Request) -> dict[str, Any]:
        """Changes how long a deployment stays loaded, and who may have it loaded. What is not named stays. For
        operators.

        `on_demand`: a request loads it when it is not, and it may make room for others while it is idle. `is_pinned`:
        it is loaded and stays so. `schedule`: hours in which it is kept loaded, such as "mon-fri 08:00-20:00" (UTC) or
        "mon-thu 08:00-20:00; fri 08:00-16:00 Europe/Berlin"; `null` is none. `idle_minutes`: without a request, after
        which it rests; `null`: until others need its room. `rests`: where it goes then, `warm` (its weights in memory)
        or `cold`.
        """
        operator = operator_of(request)
        change = wish.model_dump(exclude_unset=True)
        for flag in ("on_demand", "is_pinned", "rests"):
            if flag in change and change[flag] is None:
                raise UserError(f"{flag} is null; leave it out where it is to stay")
        if "rests" in change:
            change["rests"] = Heat(change["rests"])
        keeping = await to_thread.run_sync(self._store.keep, name, change)
        await to_thread.run_sync(
            partial(self._store.audit.record, operator, "models.keep", name, **wish.model_dump(exclude_unset=True))
        )
        return {"name": name, "keeping": to_json(keeping)}

    async def load(self, name: str, request: Request) -> dict[str, Any]:
        """Loads a deployment that rests, or tries one again that has failed. For operators."""
        operator = operator_of(request)
        await to_thread.run_sync(self._store.load, name)
        await to_thread.run_sync(partial(self._store.audit.record, operator, "models.load", name))
        return {"name": name, "heat": Heat.HOT.value}

    async def evict(self, name: str, wish: Evict, request: Request) -> dict[str, Any]:
        """Lets a deployment finish what it has and ends its shards; it stays known, and its weights `to` where they are
        said to. A request that comes before it is gone keeps one that is on demand. For operators.
        """
        operator = operator_of(request)
        heat = None if wish.to is None else Heat(wish.to)
        heat = await to_thread.run_sync(self._store.evict, name, heat, f"evicted by {operator}")
        await to_thread.run_sync(partial(self._store.audit.record, operator, "models.evict", name, to=heat.value))
        return {"name": name, "heat": heat.value}


class Keep(BaseModel):
    """How a deployment is kept. What is not named stays as it is."""

    model_config = ConfigDict(extra="forbid")

    on_demand: bool | None = None
    is_pinned: bool | None = None
    schedule: Annotated[str, Field(max_length=MAX_CHARS)] | None = None
    idle_minutes: Annotated[float, Field(gt=0, le=MAX_IDLE_MINUTES)] | None = None
    rests: Literal["warm", "cold"] | None = None


class Evict(BaseModel):
    """Where a deployment goes; `null`: where it rests."""

    model_config = ConfigDict(extra="forbid")

    to: Literal["warm", "cold"] | None = None
