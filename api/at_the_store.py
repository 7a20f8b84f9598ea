"""The routes of keys and tenants over a store's database, in this process: for whoever may write the store's folder.

So the first key of a store comes from the code that makes all others. A store that is being served may be asked too:
its service hears of it within a second.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from fastapi import APIRouter, Depends, FastAPI, Request

from api import problems
from api.audit import Audit
from api.database import open_database
from api.first_key import AT_THE_STORE
from api.key_routes import KeyRoutes
from api.keys import Keys
from api.opening import database_of
from api.tenant_routes import TenantRoutes
from api.tenants import Tenants
from polytrace.http_calls import check, json_of


class AtTheStore:
    """A store that is asked as a service is."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = open_database(database_of(folder))
        router = APIRouter(prefix="/v1", dependencies=[Depends(_identify)])
        KeyRoutes(Keys(database), _nobody_to_tell).add_to(router)
        TenantRoutes(Tenants(database), Audit(database), _nobody_to_tell).add_to(router)
        self._app = FastAPI(openapi_url=None)
        problems.install(self._app)
        self._app.include_router(router)

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """The JSON of an answer; None where it has no body. Raises the errors that a service would answer with."""
        return asyncio.run(self._ask(method, path, **more))

    async def _ask(self, method: str, path: str, **more: Any) -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://store") as client:
            answer = await client.request(method, path, **more)
        check(answer)
        return json_of(answer) if answer.content else None


async def _identify(request: Request) -> None:
    request.state.caller = AT_THE_STORE


def _nobody_to_tell() -> None:
    """The store's service, if there is one, is another process."""
