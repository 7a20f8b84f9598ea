"""Whom the commands ask about keys and tenants: a running service, or the folder of a store.

Both answer the same calls (`api.at_the_store`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from api.service_calls import Service

Url = Annotated[str, typer.Option(envvar="POLYTRACE_URL", help="Of the service.")]
Key = Annotated[str | None, typer.Option("--key", help="An own key; default: POLYTRACE_KEY.")]
InStore = Annotated[Path | None, typer.Option(help="Folder of a store of this machine, instead of a service.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
HERE = "http://127.0.0.1:8765"


class Asked(Protocol):
    """Answers calls; raises the errors that it answers with."""

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """The JSON of an answer; None where it has no body."""


def asked(url: str, key: str | None, store: Path | None) -> Asked:
    """The service, or the store where one is named."""
    if store is not None:
        from api.at_the_store import AtTheStore

        return AtTheStore(store)
    return Service(url, key)


def quoted(name: str) -> str:
    """A name as one part of a path. UserError for one that cannot be: the path with it would be another one."""
    from urllib.parse import quote

    from polytrace.errors import UserError

    if name in ("", ".", ".."):
        raise UserError(f"{name!r} is nobody's name")
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
