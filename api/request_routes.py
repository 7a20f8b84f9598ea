"""The route that lists requests: one's own, and for operators everybody's or a tenant's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.requests import Request

from api.callers import caller_of
from api.identity import Identity
from api.listing import MAX_PAGE, Wanted, page_of
from api.store import RequestState, RequestStatus, Store
from polytrace.errors import NotFoundError

Name = Annotated[str | None, Query(max_length=100)]


class RequestRoutes:
    """`plain`: a status as JSON, as `GET /v1/requests/{id}` has it."""

    def __init__(self, store: Store, plain: Callable[[RequestStatus], dict[str, Any]]) -> None:
        self._store = store
        self._plain = plain

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/requests", self.list_requests)

    async def list_requests(
        self,
        request: Request,
        state: RequestState | None = None,
        model: Name = None,
        tenant: Name = None,
        user: Name = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
        before: Annotated[int | None, Query(ge=0, lt=1 << 62)] = None,
    ) -> dict[str, Any]:
        """The caller's requests, the newest first; operators see everybody's. `next` of an answer is `before` of the
        next page, null behind the last one.
        """
        tenant, user = _whose(caller_of(request), tenant, user)
        wanted = Wanted(state=state, model=model, tenant=tenant, user=user)
        page = await to_thread.run_sync(partial(page_of, self._store, wanted, limit, before))
        return {"requests": [self._plain(status) for status in page.requests], "next": page.before}


def _whose(caller: Identity, tenant: str | None, user: str | None) -> tuple[str | None, str | None]:
    """Whose requests are listed. Raises NotFoundError for a user who asks for another's."""
    if caller.is_operator:
        return tenant, user
    if tenant not in (None, caller.tenant) or user not in (None, caller.user):
        raise NotFoundError("there is nobody of this name here whose requests you could see")
    return caller.tenant, caller.user
