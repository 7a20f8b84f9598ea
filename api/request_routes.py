"""The routes of requests that were accepted: how each does, its result, cancelling it, and the list of them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.answers import Answers, plain
from api.callers import caller_of
from api.identity import Identity
from api.listing import MAX_PAGE, Wanted, page_of
from api.logs import logs_since
from api.served import Deployments
from api.settings import GatewaySettings
from api.status import RequestState
from api.store import Store
from api.waiting import Waiting, no_request
from polytrace.errors import NotFoundError
from scheduling.plan import RequestId

LOADING_S = 2.0  # that a call waits for a request whose deployment is being loaded, before it tells how far that is

Name = Annotated[str | None, Query(max_length=100)]


class RequestRoutes:
    """Has no state of its own."""

    def __init__(
        self, store: Store, settings: GatewaySettings, deployments: Deployments, waiting: Waiting, answers: Answers
    ) -> None:
        self._store = store
        self._settings = settings
        self._deployments = deployments
        self._waiting = waiting
        self._answers = answers

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/requests", self.list_requests)
        router.add_api_route("/requests/{request_id}", self.status)
        router.add_api_route("/requests/{request_id}", self.cancel, methods=["DELETE"])
        router.add_api_route("/requests/{request_id}/result", self.result, methods=["GET"])
        router.add_api_route("/requests/{request_id}/result", self.result, methods=["HEAD"], include_in_schema=False)

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
        return {"requests": [plain(status) for status in page.requests], "next": page.before}

    async def status(
        self,
        request_id: str,
        request: Request,
        wait: Annotated[float, Query(ge=0)] = 0.0,
        passes_done: Annotated[int | None, Query(ge=0)] = None,
    ) -> Response:
        """How a request does; with `wait`, once it has ended, more than `passes_done` are, or the seconds are over.

        While its deployment is loaded a wait is shorter, and `waits_for` says how far that is.
        """
        wait_s, caller = min(wait, self._settings.max_wait_s), caller_of(request)
        if wait_s > LOADING_S and self._deployments.are_loading:
            before = await self._waiting.until_final(RequestId(request_id), 0.0, caller)
            if before.state is RequestState.QUEUED and self._deployments.waits_for(before.model) is not None:
                wait_s = LOADING_S
        status = await self._waiting.until_final(RequestId(request_id), wait_s, caller, passes_done=passes_done)
        return JSONResponse(await self._answers.stands(status) | {"logs": logs_since(status.logs, passes_done or 0)})

    async def result(self, request_id: str, request: Request) -> Response:
        """The result file of a finished request; 202 and the status while there is none."""
        status = await self._waiting.until_final(RequestId(request_id), 0.0, caller_of(request))
        return await self._answers.answer(status, is_whole=False)

    async def cancel(self, request_id: str, request: Request) -> Response:
        """Cancels a request that has not ended; says how it stands then."""
        await self._waiting.until_final(RequestId(request_id), 0.0, caller_of(request))  # NotFoundError
        status = await to_thread.run_sync(self._store.cancel, RequestId(request_id))
        if status is None:
            raise no_request(request_id)
        return JSONResponse(plain(status))


def _whose(caller: Identity, tenant: str | None, user: str | None) -> tuple[str | None, str | None]:
    """Whose requests are listed. Raises NotFoundError for a user who asks for another's."""
    if caller.is_operator:
        return tenant, user
    if tenant not in (None, caller.tenant) or user not in (None, caller.user):
        raise NotFoundError("there is nobody of this name here whose requests you could see")
    return caller.tenant, caller.user
