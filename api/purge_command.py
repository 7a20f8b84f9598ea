"""`polytrace purge`: a tenant's data goes from a running service."""

from __future__ import annotations

from typing import Annotated

import typer

from api.asking import HERE, Key, Url, quoted
from api.console import errors
from api.service_calls import Service


def purge(
    tenant: Annotated[str, typer.Option(help="Whose data is to go.")],
    user: Annotated[str | None, typer.Option(help="Only this user's.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="What is kept for accounting too.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel what waits or runs, instead of refusing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Drop all requests, results, constants, kept values, states and edits of TENANT, or of one user. For operators."""
    whose = tenant if user is None else f"{tenant}/{user}"
    if not yes:
        typer.confirm(f"Everything that {whose} has on {url} goes for good. Go on?", abort=True)
    with errors():
        wish = {"cancel": cancel, "usage": everything} | ({} if user is None else {"user": user})
        gone = Service(url, key).ask("DELETE", f"/v1/tenants/{quoted(tenant)}/data", params=wish)
        told = ", ".join(f"{gone[what]} {what}" for what in ("requests", "contents", "kept", "edits", "usage"))
        print(f"{whose}: {told}; {gone['num_bytes']} bytes of contents and edits")
