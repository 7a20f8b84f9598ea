"""The routes of tenants, their users, and the audit log: for operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from api.audit import Audit
from api.callers import operator_of
from api.identity import Role
from api.tenants import MAX_MODELS, Tenants
from polytrace.codec import to_json

Limit = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
ModelName = Annotated[str, Field(min_length=1, max_length=100)]


class TenantRoutes:
    """`changed` is called when what somebody may do has changed."""

    def __init__(self, tenants: Tenants, audit: Audit, changed: Callable[[], None]) -> None:
        self._tenants = tenants
        self._audit = audit
        self._changed = changed

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/tenants", self.known)
        router.add_api_route("/tenants/{tenant}", self.get)
        router.add_api_route("/tenants/{tenant}", self.add, methods=["PUT"], status_code=201)
        router.add_api_route("/tenants/{tenant}", self.change, methods=["PATCH"])
        router.add_api_route("/tenants/{tenant}", self.remove, methods=["DELETE"], status_code=204)
        router.add_api_route("/tenants/{tenant}/users", self.users)
        router.add_api_route("/tenants/{tenant}/users/{user}", self.set_user, methods=["PUT"])
        router.add_api_route("/audit", self.acts)

    async def known(self, request: Request) -> dict[str, Any]:
        """All tenants."""
        operator_of(request)
        return {"tenants": to_json(await to_thread.run_sync(self._tenants.known))}

    async def get(self, tenant: str, request: Request) -> dict[str, Any]:
        """A tenant: its weight, its limits, and the deployments that it may use."""
        operator_of(request)
        return dict(to_json(await to_thread.run_sync(self._tenants.get, tenant)))

    async def add(self, tenant: str, terms: Terms, request: Request) -> dict[str, Any]:
        """A new tenant."""
        add = partial(self._tenants.add, tenant, operator_of(request), **terms.said())
        return dict(to_json(await to_thread.run_sync(add)))

    async def change(self, tenant: str, terms: Terms, request: Request) -> dict[str, Any]:
        """Changes what is named; of the limits too, and `null` gives one back to the service."""
        change = partial(self._tenants.change, tenant, operator_of(request), **terms.said())
        changed = await to_thread.run_sync(change)
        self._changed()
        return dict(to_json(changed))

    async def remove(self, tenant: str, request: Request) -> Response:
        """Forgets a tenant of which nothing is stored any more, with its users and keys."""
        await to_thread.run_sync(self._tenants.remove, tenant, operator_of(request))
        self._changed()
        return Response(status_code=204)

    async def users(self, tenant: str, request: Request) -> dict[str, Any]:
        """A tenant's users. Whoever came by a token of the identity provider only is not among them."""
        operator_of(request)
        return {"users": to_json(await to_thread.run_sync(self._tenants.users, tenant))}

    async def set_user(self, tenant: str, user: str, wish: Standing, request: Request) -> dict[str, Any]:
        """Makes a user, or changes what is named of one."""
        operator = operator_of(request)
        put = partial(self._tenants.set_user, tenant, user, operator, role=wish.role, is_disabled=wish.is_disabled)
        changed = await to_thread.run_sync(put)
        self._changed()
        return dict(to_json(changed))

    async def acts(
        self,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(ge=0, lt=1 << 62)] = None,
    ) -> dict[str, Any]:
        """What operators did, and users with their keys: the newest first; `before`: in front of that `seq`."""
        operator_of(request)
        look = partial(self._audit.entries, limit=limit, before=before)
        return {"entries": to_json(await to_thread.run_sync(look))}


class Terms(BaseModel):
    """What a tenant has. What is not named stays as it is."""

    model_config = ConfigDict(extra="forbid")

    is_disabled: bool = False
    weight: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 1.0
    limits: Annotated[dict[str, Limit | None], Field(max_length=100)] = {}
    models: Annotated[tuple[ModelName, ...], Field(max_length=MAX_MODELS)] | None = None  # None: all

    def said(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


class Standing(BaseModel):
    """What a user is. What is not named stays as it is."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = None
    is_disabled: bool | None = None
