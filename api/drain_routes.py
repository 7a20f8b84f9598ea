"""The routes that drain the whole service, and let it take requests again. For operators."""

from __future__ import annotations

from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import Request

from api.callers import figures_reader_of, operator_of
from api.status import RequestState
from api.store import Store
from polytrace.codec import to_json


class DrainRoutes:
    """Has no state of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/drain", self.state)
        router.add_api_route("/drain", self.begin, methods=["POST"], status_code=202)
        router.add_api_route("/drain", self.end, methods=["DELETE"])

    async def state(self, request: Request) -> dict[str, Any]:
        """Whether the service is drained, by whom, and how many requests wait and run. For monitors too."""
        figures_reader_of(request)
        return await self._told()

    async def begin(self, request: Request) -> dict[str, Any]:
        """No deployment takes requests from now on; those that wait and run are finished."""
        operator = operator_of(request)
        await to_thread.run_sync(partial(self._store.audit.record, operator, "service.drain", "all"))
        await to_thread.run_sync(self._store.draining.begin, str(operator))
        return await self._told()

    async def end(self, request: Request) -> dict[str, Any]:
        """Takes requests again, unless the service is stopping."""
        operator = operator_of(request)
        if await to_thread.run_sync(self._store.draining.end):
            await to_thread.run_sync(partial(self._store.audit.record, operator, "service.resume", "all"))
        return await self._told()

    async def _told(self) -> dict[str, Any]:
        drain = await to_thread.run_sync(self._store.draining.now)
        counts = (await to_thread.run_sync(self._store.open_requests)).values()
        return {
            "is_draining": drain is not None,
            "drain": None if drain is None else to_json(drain),
            "queued": sum(count.get(RequestState.QUEUED, 0) for count in counts),
            "running": sum(count.get(RequestState.RUNNING, 0) for count in counts),
        }
