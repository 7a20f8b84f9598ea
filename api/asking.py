"""Whom the commands ask about keys and tenants: a running service, or the folder of a store.

With a folder they ask the same routes, in this process. So the first key of a store comes from the code that makes all
others, and a store that is being served may be asked too: its service hears of it within a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

Url = Annotated[str, typer.Option(envvar="POLYTRACE_URL", help="Of the service.")]
UseKey = Annotated[str | None, typer.Option("--key", help="An own key; default: POLYTRACE_KEY.")]
InStore = Annotated[Path | None, typer.Option(help="Folder of a store of this machine, instead of a service.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
HERE = "http://127.0.0.1:8765"


class Asked(Protocol):
    """Answers calls; raises the errors that it answers with."""

    def ask(self, method: str, path: str, **more: Any) -> Any: ...


def asked(url: str, key: str | None, store: Path | None) -> Asked:
    """The service, or the store where one is named."""
    if store is not None:
        return _AtTheStore(store)
    from api.operations import _Service

    return _Service(url, key)


class _AtTheStore:
    """The routes of keys and tenants over a store's database, for whoever may read and write its folder."""

    def __init__(self, folder: Path) -> None:
        from fastapi import APIRouter, Depends, FastAPI
        from starlette.requests import Request

        from api import problems
        from api.audit import Audit
        from api.database import open_database
        from api.first_key import AT_THE_STORE
        from api.key_routes import KeyRoutes
        from api.keys import Keys
        from api.tenant_routes import TenantRoutes
        from api.tenants import Tenants

        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = open_database(f"sqlite:///{folder.resolve() / 'store.db'}")

        def identify(request: Request) -> None:
            request.state.caller = AT_THE_STORE

        self._app = FastAPI(openapi_url=None)
        problems.install(self._app)
        router = APIRouter(prefix="/v1", dependencies=[Depends(identify)])
        KeyRoutes(Keys(database), _nobody_to_tell).add_to(router)
        TenantRoutes(Tenants(database), Audit(database), _nobody_to_tell).add_to(router)
        self._app.include_router(router)

    def ask(self, method: str, path: str, **more: Any) -> Any:
        import asyncio

        import httpx

        from polytrace.errors import from_fields

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://store") as client:
                return await client.request(method, path, **more)

        answer = asyncio.run(ask())
        body = answer.json() if answer.content else {}
        if answer.status_code >= 400:
            raise from_fields({"code": body["code"], "message": body["detail"]})
        return body


def quoted(name: str) -> str:
    """A name as one part of a path."""
    from urllib.parse import quote

    return quote(name, safe="")


def show(rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]], as_json: bool) -> None:
    """Rows as a table, or as JSON lines."""
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(tell(row) for tell in columns.values()))
    # a pipe has no width: nothing is cut there
    Console(width=None if sys.stdout.isatty() else 200).print(table, soft_wrap=False)


def when(at: float | None) -> str:
    """A time as people read it."""
    import time

    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _nobody_to_tell() -> None:
    """A service that has the store open looks again by itself."""
