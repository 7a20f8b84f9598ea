"""The route that purges a tenant's data. For operators."""

from __future__ import annotations

from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import Request

from api.callers import operator_of
from api.identity import checked_name
from api.purging import purge
from api.store import Store
from polytrace.codec import to_json


class PurgeRoutes:
    """The route's state."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/tenants/{tenant}/data", self.purge, methods=["DELETE"])

    async def purge(
        self, tenant: str, request: Request, user: str | None = None, cancel: bool = False, usage: bool = False
    ) -> dict[str, Any]:
        """Everything that a tenant, or one user of his, has here goes: requests, results, contents, kept values, states
        and edits. `cancel`: what waits or runs is cancelled first; `usage`: what is kept for accounting goes too.
        """
        operator = operator_of(request)
        checked_name(tenant, "tenant")
        if user is not None:
            checked_name(user, "user")
        drop = partial(purge, self._store, tenant, user, is_cancelling=cancel, with_usage=usage)
        gone = dict(to_json(await to_thread.run_sync(drop)))
        note = partial(self._store.audit.record, operator, "purge", tenant, user=user, is_cancelling=cancel, gone=gone)
        await to_thread.run_sync(note)
        return {"tenant": tenant, "user": user} | gone
