"""The routes to what was used, and to deployments' limits.

`GET /v1/usage?month=` is one's own; operators see everybody's, or a tenant's. CSV where a caller accepts it, or
asks with `format=csv`.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.admission import Admission
from api.callers import caller_of, operator_of
from api.identity import checked_name
from api.limits import OF_DEPLOYMENTS, TenantLimits, checked_limits, text_of
from api.store import Store
from api.usage import as_csv, check_month, day_of
from polytrace.codec import to_json
from polytrace.errors import NotFoundError

Limit = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)] | None


class UsageRoutes:
    """Has no state of its own."""

    def __init__(self, store: Store, admission: Admission) -> None:
        self._store = store
        self._admission = admission

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/usage", self.usage)
        router.add_api_route("/models/{name}/limits", self.limits)
        router.add_api_route("/models/{name}/limits", self.limit, methods=["PUT"])

    async def usage(
        self,
        request: Request,
        month: str | None = None,
        tenant: Annotated[str | None, Query(max_length=100)] = None,
        format: Literal["json", "csv"] | None = None,
    ) -> Response:
        """What was used in a month (`YYYY-MM`, default: this one), by tenant, user and deployment."""
        caller = caller_of(request)
        month = day_of(self._store.now())[:7] if month is None else check_month(month)
        if not caller.sees_figures and tenant not in (None, caller.tenant):
            raise NotFoundError(f"there is no tenant {tenant!r} here")
        if tenant is not None:
            checked_name(tenant, "tenant")  # it becomes a part of a header
        look = partial(self._store.usage, month, tenant=tenant)
        if not caller.sees_figures:
            look = partial(self._store.usage, month, tenant=caller.tenant, user=caller.user)
        entries = await to_thread.run_sync(look)
        if format == "csv" or (format is None and "text/csv" in request.headers.get("accept", "")):
            name = f"usage-{month}{'' if tenant is None else f'-{tenant}'}.csv"
            headers = {"Content-Disposition": f'attachment; filename="{name}"'}
            return Response(as_csv(entries), media_type="text/csv", headers=headers)
        return JSONResponse({"month": month, "usage": to_json(entries)})

    async def limits(self, name: str, request: Request) -> dict[str, Any]:
        """The limits that hold for the caller's requests to a deployment: the tenant's and the deployment's."""
        caller = caller_of(request)
        if not caller.may_use(name) or await to_thread.run_sync(self._store.deployment, name) is None:
            raise NotFoundError(f"there is no model {name[:100]!r} here")
        terms = await self._admission.terms(caller, name)
        return {
            "tenant": terms.tenant,
            "model": name,
            "tenants": to_json(terms.tenants),
            "deployments": to_json(terms.deployments),
        }

    async def limit(self, name: str, wish: Limits, request: Request) -> dict[str, Any]:
        """Gives a deployment limits of its own in the place of those it has; `null`, or nothing, is none."""
        operator = operator_of(request)
        limits = checked_limits(TenantLimits(**wish.model_dump()), f"the limits of {name}", OF_DEPLOYMENTS)
        await to_thread.run_sync(self._store.limit_deployment, name, text_of(limits))
        self._admission.forget()
        note = partial(self._store.audit.record, operator, "models.limit", name, limits=to_json(limits))
        await to_thread.run_sync(note)
        return {"name": name, "limits": to_json(limits)}


class Limits(BaseModel):
    """A deployment's limits, for the requests of all tenants."""

    model_config = ConfigDict(extra="forbid")

    requests_in_flight: Limit = None
    requests_a_minute: Limit = None
    request_bytes: Limit = None
    result_bytes: Limit = None
    token_layers: Limit = None
    passes: Limit = None
    tape_bytes: Limit = None
